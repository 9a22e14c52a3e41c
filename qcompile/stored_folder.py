"""A folder with one safetensors file and one JSON document: written whole or not at all, read with nothing trusted."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from qcompile import stored_tensors
from qcompile.progress import progress_bar

__all__ = ["STRUCTURE", "TENSORS", "checksum", "read", "write"]

FORMAT, VERSION = "qcompile", 1

STRUCTURE, TENSORS = "qcompile.json", "tensors.safetensors"

#: A structure with more bytes is refused: that of a model with ten thousand operators has about ten million.
_LARGEST = 1 << 30


def write(folder: Path, document: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a document and its tensors, replacing what was written there before.

    Args:
        folder: a path that does not exist yet, an empty folder, or one that this function wrote.
        document: plain values for JSON; gets ``tensors`` (their index) and ``checksum``.

    Raises:
        ValueError: the folder holds something else, or a tensor cannot be stored.
    """
    _check_target(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        work.chmod(0o755)
        document["tensors"] = stored_tensors.write(work / TENSORS, tensors, progress_bar())
        document["checksum"] = checksum(document)
        (work / STRUCTURE).write_text(json.dumps(document, allow_nan=False), "utf-8")
        _put(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read(folder: Path) -> dict[str, Any]:
    """The document: of this format and version, and as it was written; what is in it is for the caller to check.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is something else, damaged, or of another version.
    """
    path = folder / STRUCTURE
    if not path.is_file():
        raise FileNotFoundError(f"no program in {str(folder)!r}: there is no {STRUCTURE}")
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{str(path)!r} has {path.stat().st_size} bytes, more than any program needs")
    try:
        document = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} is not whole: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ValueError(f"{str(path)!r} is not a qcompile program: its format is {found!r}")
    if document.get("version") != VERSION:
        raise ValueError(f"{str(path)!r} has version {document.get('version')!r} of the format, this reads {VERSION}")
    return document


def check_form(folder: Path, document: Mapping[str, Any], keys: Sequence[str]) -> None:
    """Raise a ValueError unless a document has exactly these keys, and its checksum is right."""
    path = str(folder / STRUCTURE)
    if set(document) != set(keys):
        raise ValueError(f"{path!r} must have {', '.join(keys)}; found {', '.join(map(str, document))}")
    if document["checksum"] != checksum(document):
        raise ValueError(f"{path!r} is not what was written: its checksum differs, it was changed or damaged")


def checksum(document: Mapping[str, Any]) -> str:
    """Of everything but itself."""
    rest = {k: document[k] for k in document if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _check_target(folder: Path) -> None:
    if folder.is_dir():
        others = sorted(p.name for p in folder.iterdir() if p.name not in (STRUCTURE, TENSORS))
        if others:
            raise ValueError(f"{str(folder)!r} holds {', '.join(others[:5])}; name a new or an empty folder")
    elif folder.exists():
        raise ValueError(f"{str(folder)!r} is a file; name a folder")


def _put(work: Path, folder: Path) -> None:
    """Move a finished folder to its place; what was there is dropped last, and put back where that fails."""
    if not folder.exists():
        work.rename(folder)
        return
    old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
    folder.rename(old / "replaced")
    try:
        work.rename(folder)
    except OSError:
        (old / "replaced").rename(folder)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)
