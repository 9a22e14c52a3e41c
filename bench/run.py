"""All benchmarks against whichever peers are installed, and the page that shows them. ``make bench`` is this.

    python bench/run.py                            # everything, some 20 minutes; writes docs/benchmarks.md
    python bench/run.py --quick                    # less of everything, into a temporary folder
    python bench/run.py --only layers,language     # these anew; the page keeps what the others measured before
    python bench/run.py --emulate-avx2             # the part of the page that is held to AVX2
    python bench/run.py --render                   # the page and its plots anew from the figures that are kept

Each script is a process of its own and can be run by itself; what it measured is kept as JSON beside the page. One that
fails is said and does not stop the others; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchkit import page, plots
from benchkit.records import Run

HERE = Path(__file__).resolve().parent
JOBS: dict[str, list[str]] = {
    "inner_loops": [],
    "layers": [],
    "language": [],
    "encoder": [],
    "vision": [],
    "token_time": [],
    "quantizers": [],
    "grid": [],
    "compile_time": [],
}
"""Script to its arguments, in the order in which they run."""

QUICK: dict[str, list[str]] = {
    "layers": ["--shapes", "4096x4096,1536x576", "--rows", "1,8,32,512", "--also", "", "--seconds", "0.5", "--passes", "1"],
    "language": ["--variants", "qint4,Q4_0", "--rounds", "2"],
    "encoder": ["--batches", "1x128", "--seconds", "5"],
    "vision": ["--batches", "1", "--seconds", "5"],
    "quantizers": ["--size", "1024", "--rows", "1,32", "--seconds", "2"],
    "grid": ["--sizes", "64,1024", "--rows", "1,32,256"],
    "compile_time": ["--variants", "qint4"],
}
AVX2 = ("layers", "language", "encoder", "vision", "token_time", "quantizers", "grid")


def main() -> None:
    args = _arguments()
    names = args.only.split(",") if args.only else [n for n in JOBS if not args.emulate_avx2 or n in AVX2]
    unknown = [name for name in names if name not in JOBS]
    if unknown:
        raise SystemExit(f"--only {args.only!r}: {', '.join(unknown)} is none of {', '.join(JOBS)}")
    out = args.out or (Path(tempfile.mkdtemp(prefix="qcompile-bench-")) if args.quick else HERE.parent / "docs")
    figures = out / "benchmarks"
    failed = [] if args.render else measure(names, figures, args.quick, args.emulate_avx2)
    target = write(out)
    print(f"\n{target}")
    native = load(figures, "")
    print(page.goals_table(native or load(figures, "-avx2")))
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def measure(names: list[str], figures: Path, quick: bool, avx2: bool) -> list[str]:
    """Run the scripts, one after the other, each writing its figures; the names of those that failed."""
    failed = []
    for name in names:
        file = figures / f"{name}{'-avx2' if avx2 else ''}.json"
        words = [sys.executable, str(HERE / f"{name}.py"), *(QUICK.get(name, []) if quick else JOBS[name])]
        words += [*(["--emulate-avx2"] if avx2 else []), "--json", str(file)]
        print(f"\n=== {name}", flush=True)
        start = time.perf_counter()
        status = subprocess.run(words, check=False).returncode
        ending = f", FAILED with status {status}" if status else ""
        print(f"=== {name}: {time.perf_counter() - start:.0f} s{ending}", flush=True)
        if status:
            failed.append(name)
    return failed


def write(out: Path) -> Path:
    """The page and its plots, from the figures that are kept below ``out``."""
    figures = out / "benchmarks"
    native, emulated = load(figures, ""), load(figures, "-avx2")
    if not native and not emulated:
        raise SystemExit(f"{figures} holds no figures: run without --render first")
    target = out / "benchmarks.md"
    page.render(native, emulated, plots.draw(native or emulated, figures), target)
    return target


def load(figures: Path, ending: str) -> dict[str, Run]:
    """The kept runs of one kind, by script, in the order of ``JOBS``."""
    files = {name: figures / f"{name}{ending}.json" for name in JOBS}
    return {name: Run.load(file) for name, file in files.items() if file.exists()}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything; docs/ stays as it is")
    parser.add_argument("--only", default="", help=f"comma separated, of {', '.join(JOBS)}")
    parser.add_argument("--emulate-avx2", action="store_true", help="hold torch and the kernels to AVX2")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=None, help="the folder of the page (default: docs)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
