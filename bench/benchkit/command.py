"""The command line that all scripts of bench/ share, and what they do at the end."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from benchkit import machine, peers
from benchkit.records import Record, Run

__all__ = ["finish", "parser"]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that every script takes; ``doc`` is the script's docstring."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--threads", type=int, default=0, help="0 = as many as there are CPUs")
    made.add_argument("--emulate-avx2", action="store_true", help="hold torch and the kernels to AVX2")
    made.add_argument("--json", type=Path, default=None, help="a file to write the figures to")
    return made


def finish(args: argparse.Namespace, bench: str, records: list[Record]) -> None:
    """Write the figures to ``--json``, if that was given."""
    if args.json is not None:
        words = [word for word in sys.argv if not word.startswith("--json=")]
        if "--json" in words:
            at = words.index("--json")
            del words[at : at + 2]
        words[0] = f"bench/{Path(words[0]).name}"
        said = shlex.join(["python", *words])
        Run(bench, said, machine.describe(), peers.versions(), records).save(args.json)
