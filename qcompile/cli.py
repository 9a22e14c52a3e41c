"""The command line: ``qcompile`` and ``python -m qcompile``.

Exit status: 0 when all went well, 1 when a demo could not run, 2 for a wrong argument or file, said in one line.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.progress import progress_bar, stage

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from qcompile.options import Options

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Example:
        >>> main(["report", "no/such/file.pt2"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        from qcompile.demo import main as demo

        return demo(arguments[1:])
    if arguments[:1] == ["gpu-check"]:
        from qcompile.gpucheck import main as gpu_check

        return gpu_check(arguments[1:])
    try:
        given = _parser().parse_args(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    # What torch's own code warns of is no news to someone at a command line.
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        given.run(given)
    except (ValueError, TypeError, OSError) as error:
        text = " ".join(str(error).split())
        print(f"qcompile {given.command}: error: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def quantize(given: argparse.Namespace) -> None:
    """``quantize IN -o OUT``."""
    from qcompile.export import quantize_exported
    from qcompile.report import report
    from qcompile.report_text import footer, size

    out = Path(given.out)
    if out.resolve() == Path(given.input).resolve():
        raise ValueError("IN and OUT are the same; name another file, the float model is needed to quantize differently")
    options = _options(given)
    program = quantize_exported(_load(given.input), options, progress_bar())
    _save(program, out)
    written = sum(p.stat().st_size for p in out.iterdir()) if out.is_dir() else out.stat().st_size
    print("\n".join(footer(report(program))[:2]))
    print(f"wrote {out}, {size(written)}")


def report(given: argparse.Namespace) -> None:
    """``report FILE|DIR``."""
    from qcompile.dump import write_text
    from qcompile.report import report as report_of

    source = Path(given.input)
    made = report_of(source if source.is_dir() else _load(given.input))
    if given.html:
        write_text(Path(given.html), made.to_html(f"{source.name}: qcompile report"))
        print(f"wrote {given.html}")
    if given.json:
        print(made.to_json(indent=1))
    elif not given.html:
        print(made)


def dump(given: argparse.Namespace) -> None:
    """``dump IN DIR``."""
    from qcompile.dump import use_folder
    from qcompile.export import lowered, quantize_exported
    from qcompile.report import rows_of

    options = _options(given)
    with use_folder(given.folder):
        program = _load(given.input)
        if next(rows_of(program.graph), None) is None:
            program = quantize_exported(program, options, progress_bar())
        with stage("lowering"):
            lowered(program, options)
    print(f"open {Path(given.folder) / 'index.html'} in a browser")


def bench(given: argparse.Namespace) -> None:
    """``bench IN``."""
    from qcompile.cli_bench import compare
    from qcompile.export import quantize_exported
    from qcompile.report import rows_of

    options = _options(given)
    program = _load(given.input)
    if next(rows_of(program.graph), None) is not None:
        raise ValueError(f"{given.input} is quantized already; bench takes a float program, and quantizes it itself")
    quantized = quantize_exported(program, options, progress_bar())
    print(compare(program, quantized, str(options.weights), given.runs))


def passes(given: argparse.Namespace) -> None:
    """``passes`` and ``passes IN NAME ...``."""
    from qcompile.cli_passes import listing, parse, run_on

    if not given.input:
        print(listing())
        return
    if not given.names:
        raise ValueError("name the passes to run, in order; `qcompile passes` lists them")
    chosen = [parse(name) for name in given.names]
    text, program = run_on(_load(given.input), chosen, show=given.show)
    print(text)
    if given.out:
        _save(program, Path(given.out))
        print(f"wrote {given.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="qcompile", description="A quantizing compiler for PyTorch.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
        made.set_defaults(run=run)
        return made

    one = command("quantize", quantize, "quantize the weights of an exported program")
    one.add_argument("input", metavar="IN", help="what torch.export.save wrote, or a folder of qcompile.save")
    one.add_argument("-o", "--out", required=True, metavar="OUT", help="a .pt2 file, or a folder")
    _quantization(one)

    one = command("report", report, "say of every matmul-like operator how it was quantized, or why not")
    one.add_argument("input", metavar="FILE|DIR", help="a quantized .pt2 file, or a folder of qcompile.save")
    one.add_argument("--json", action="store_true", help="as JSON on standard output")
    one.add_argument("--html", metavar="OUT", help="as a page in this file")

    one = command("dump", dump, "quantize and lower a program, and write what each pass did as pages")
    one.add_argument("input", metavar="IN", help="an exported program, quantized already or not")
    one.add_argument("folder", metavar="DIR", help="the folder to write to")
    _quantization(one)

    one = command("bench", bench, "time a program compiled as float against the same quantized, in turns")
    one.add_argument("input", metavar="IN", help="a float .pt2 file that holds its example inputs")
    one.add_argument("--runs", type=_positive, default=20, help="timed runs of each (default: 20)")
    _quantization(one)

    command("demo", None, "real models, float against quantized (`qcompile demo --help` has its options)")

    command("gpu-check", None, "check and time the GPU kernels (`qcompile gpu-check --help` has its options)")

    one = command("passes", passes, "list the passes, or run some on a program, in the order given")
    one.add_argument("input", nargs="?", metavar="IN", help="an exported program")
    one.add_argument("names", nargs="*", metavar="NAME", help="passes, with options as in select{weights=qint4}")
    one.add_argument("-o", "--out", metavar="OUT", help="where to write the result")
    one.add_argument("--show", action="store_true", help="print the resulting graph")
    return parser


def _quantization(parser: argparse.ArgumentParser) -> None:
    """Arguments for every option of quantization."""
    group = parser.add_argument_group("quantization")
    group.add_argument("--weights", default="qint8", help="qint2 ... qint8, qfloat8 and its kin (default: qint8)")
    group.add_argument("--group-size", type=int, metavar="N", help="elements that share a scale")
    group.add_argument("--mode", help="symmetric, affine or shift")
    group.add_argument("--scale-dtype", metavar="DTYPE", help="float32, float16 or bfloat16")
    group.add_argument("--embeddings", metavar="QTYPE", help="dtype of lookup tables")
    group.add_argument("--include", action="append", metavar="PATTERN", help="only these weights (may be repeated)")
    group.add_argument("--exclude", action="append", metavar="PATTERN", help="not these weights (may be repeated)")
    group.add_argument("--optimizer", help="max, mse or hqq: how the range of a scale is found")
    group.add_argument("--min-elements", type=int, metavar="N", help="leave smaller weights alone")


def _options(given: argparse.Namespace) -> Options:
    from qcompile.options import Options

    names = (
        "weights", "group_size", "mode", "scale_dtype", "embeddings", "include", "exclude", "optimizer", "min_elements",
    )  # fmt: skip
    return Options.parse({n: getattr(given, n) for n in names if getattr(given, n) is not None})


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _load(source: str) -> ExportedProgram:
    """An exported program of either form."""
    import logging

    import torch

    import qcompile

    path = Path(source)
    with stage(f"loading {path.name}"):
        if path.is_dir():
            return qcompile.load(path)
        if not path.is_file():
            raise FileNotFoundError(f"no file {source!r}")
        logger = logging.getLogger("torch.export")
        level = logger.level
        logger.setLevel(logging.CRITICAL)
        try:
            return torch.export.load(path)
        except Exception as error:
            reason = str(error).strip().splitlines()
            raise ValueError(
                f"{source!r} is not what torch.export.save writes ({type(error).__name__}: {reason[0] if reason else ''}); "
                "a model that torch.export cannot trace is quantized in Python, by qcompile.quantize(model)"
            ) from error
        finally:
            logger.setLevel(level)


def _save(program: ExportedProgram, out: Path) -> None:
    """Write a program: to a ``.pt2`` file, else to a folder; whole or not at all."""
    import tempfile

    import torch

    import qcompile

    with stage(f"writing {out.name}"):
        if out.suffix != ".pt2":
            if out.suffix:
                raise ValueError(f"OUT must end in .pt2, or name a folder, got {str(out)!r}")
            qcompile.save(program, out)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as work:
            torch.export.save(program, Path(work) / out.name)
            (Path(work) / out.name).replace(out)


def _version() -> str:
    import qcompile

    return f"qcompile {qcompile.__version__}"
