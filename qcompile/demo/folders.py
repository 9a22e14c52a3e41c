"""Folders of the cache that exist only when they are whole: made aside, renamed, and checked by their record."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.demo.archives import unpack
from qcompile.demo.fetch import cache_dir, need_space
from qcompile.demo.progress import say

__all__ = ["new_folder", "unpacked", "whole"]

_DONE = "qcompile-demo.json"


def unpacked(name: str, filename: str, archive: Callable[[], Path], keep: Callable[[str], bool], limit: int) -> Path:
    """The folder ``name`` of the cache, with the files of ``archive()`` that ``keep`` accepts, unpacked on first use."""
    folder = cache_dir() / name
    if not whole(folder):
        source = archive()
        need_space(cache_dir(), limit, filename)
        with new_folder(folder) as (staging, _):
            unpack(source, staging, keep, limit)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A staging folder that becomes ``folder`` only when the block ends well, and a scratch folder that goes away."""
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as name:
        staging, scratch = Path(name) / "staging", Path(name) / "scratch"
        staging.mkdir()
        scratch.mkdir()
        yield staging, scratch
        sizes = {str(p.relative_to(staging)): p.stat().st_size for p in sorted(staging.rglob("*")) if p.is_file()}
        (staging / _DONE).write_text(json.dumps({"files": sizes}, indent=1), "utf-8")
        if folder.exists():
            say(f"  {folder} was not whole: made again")
            shutil.rmtree(folder)
        staging.replace(folder)


def whole(folder: Path) -> bool:
    """Whether every file that the folder's record names is there in its full length."""
    try:
        sizes = json.loads((folder / _DONE).read_text("utf-8"))["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
