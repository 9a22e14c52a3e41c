"""``qcompile.save`` and ``qcompile.load``: a folder with one safetensors file and one JSON file.

Nothing that is read is unpickled or executed; names, shapes, dtypes, sizes and operators are checked before memory is taken.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.export import ExportedProgram

from qcompile import stored_tensors
from qcompile.passes.decision import Decision
from qcompile.progress import progress_bar

__all__ = ["load", "read_report", "save"]

FORMAT, VERSION = "qcompile", 1

_STRUCTURE, _TENSORS = "qcompile.json", "tensors.safetensors"

#: A structure with more bytes is refused: that of a model with ten thousand operators has about ten million.
_LARGEST = 1 << 30

_KEYS = ("format", "version", "kind", "torch", "checksum", "tensors", "state", "constants", "examples", "program")


def save(program: ExportedProgram, folder: str | Path) -> Path:
    """Write a program to a folder, whole or not at all.

    The folder holds ``tensors.safetensors``, which other tools can read, and ``qcompile.json``, the graph with all that
    belongs to it: names, dynamic shapes, mutated buffers, example inputs, the report.

    Args:
        program: what :func:`qcompile.quantize` returned, or any other exported program.
        folder: a path that does not exist yet, an empty folder, or one that ``save`` wrote before, which is replaced.

    Returns:
        The folder.

    Raises:
        TypeError: not an exported program.
        ValueError: the program holds something that cannot be stored safely, such as TorchScript objects or operators of
            unknown libraries; or the folder holds something else.

    Example:
        >>> import qcompile, tempfile, torch
        >>> x = torch.randn(3, 64)
        >>> program = qcompile.quantize(torch.export.export(torch.nn.Linear(64, 128).eval(), (x,)))
        >>> folder = save(program, tempfile.mkdtemp() + "/model")
        >>> torch.equal(load(folder).module()(x), program.module()(x))
        True
    """
    from qcompile import stored_graph

    if not isinstance(program, ExportedProgram):
        raise TypeError(
            f"qcompile.save takes an exported program (what qcompile.quantize returned), got {type(program).__name__}"
        )
    folder = Path(folder)
    _check_target(folder)
    document: dict[str, Any] = {"format": FORMAT, "version": VERSION, "kind": "exported_program", "torch": torch.__version__}
    document["program"] = stored_graph.encode(program)
    tensors = _gather(program, document)
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        work.chmod(0o755)
        document["tensors"] = stored_tensors.write(work / _TENSORS, tensors, progress_bar())
        document["checksum"] = _checksum(document)
        text = json.dumps({k: document[k] for k in _KEYS}, allow_nan=False)
        (work / _STRUCTURE).write_text(text, "utf-8")
        _put(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return folder


def load(folder: str | Path) -> ExportedProgram:
    """Read a program that :func:`save` wrote: the same graph, the same bits.

    Args:
        folder: where it lies.

    Raises:
        FileNotFoundError: there is no such program.
        ValueError: it is of another format or version, damaged, incomplete, or has operators that are not allowed; the
            message says what was found.
    """
    import qcompile.kernels  # noqa: F401  registers the operators that the graph names
    from qcompile import stored_graph

    folder = Path(folder)
    document = _read(folder)
    stored_graph.check(document["program"])
    names = _names(document)
    held = stored_tensors.read(folder, document["tensors"], progress_bar())
    if set(held) != set(names):
        lost, extra = sorted(set(names) - set(held)), sorted(set(held) - set(names))
        raise ValueError(f"{str(folder)!r}: tensors {lost[:5]} are not there, {extra[:5]} belong to nothing")
    state = {name: held[f"state/{name}"] for name in document["state"]}
    constants = {name: held[f"constants/{name}"] for name in document["constants"]}
    try:
        return stored_graph.decode(document["program"], state, constants, _examples(document, held))
    except ValueError as error:
        raise ValueError(f"{str(folder)!r}: {error} (written with torch {document['torch']})") from error


def read_report(folder: Path) -> Any:
    """The report of a stored program, read without its tensors; a :class:`~qcompile.report.Report`."""
    from qcompile import stored_graph
    from qcompile.report import Part, Report

    document = _read(folder)
    stored_graph.check(document["program"])
    for node in document["program"]["graph_module"]["graph"]["nodes"]:
        custom = node["metadata"].get("custom")
        held = json.loads(custom).get("qcompile") if custom else None
        if held:
            return Report((Part(folder.name, tuple(Decision.from_dict(d) for d in held["decisions"])),))
    raise ValueError(f"the program in {str(folder)!r} carries no report: it was not quantized")


def _gather(program: ExportedProgram, document: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of a program by the names that they get in the file; their lists go into ``document``."""
    tensors: dict[str, Tensor] = {}
    for kind, held in (("state", program.state_dict), ("constants", program.constants)):
        for name, tensor in held.items():
            if not isinstance(tensor, Tensor):
                raise ValueError(f"{name!r} is a {type(tensor).__name__}; only tensors can be stored")
            tensors[f"{kind}/{name}"] = tensor
        document[kind] = list(held)
    document["examples"] = None
    if program.example_inputs is not None:
        leaves: list[Any] = []
        for i, leaf in enumerate(pytree.tree_leaves(program.example_inputs)):
            if isinstance(leaf, Tensor):
                tensors[f"examples/{i}"] = leaf
                leaves.append({"tensor": f"examples/{i}"})
            elif leaf is None or type(leaf) in (bool, int, float, str):
                leaves.append({"value": leaf})
            else:
                raise ValueError(f"example input {i} is a {type(leaf).__name__}; tensors and plain values can be stored")
        document["examples"] = leaves
    return tensors


def _names(document: dict[str, Any]) -> list[str]:
    """The names of all tensors that the parts of a document speak of."""
    names = [f"{kind}/{name}" for kind in ("state", "constants") for name in document[kind]]
    return names + [leaf["tensor"] for leaf in document["examples"] or () if "tensor" in leaf]


def _examples(document: dict[str, Any], held: dict[str, Tensor]) -> Any:
    """Example inputs in the structure of the program's inputs."""
    leaves = document["examples"]
    if leaves is None:
        return None
    calls = document["program"]["graph_module"]["module_call_graph"]
    signature = calls[0].get("signature") if calls else None
    if signature is None:
        raise ValueError("the stored graph does not say how it is called")
    structure = pytree.treespec_loads(signature["in_spec"])
    if structure.num_leaves != len(leaves):
        raise ValueError(f"{len(leaves)} example inputs are stored, the program takes {structure.num_leaves}")
    return pytree.tree_unflatten([held[x["tensor"]] if "tensor" in x else x["value"] for x in leaves], structure)


def _read(folder: Path) -> dict[str, Any]:
    """The JSON document, with the form of everything but graph and tensors checked."""
    path = folder / _STRUCTURE
    if not path.is_file():
        raise FileNotFoundError(f"no program in {str(folder)!r}: there is no {_STRUCTURE}")
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
    if set(document) != set(_KEYS) or document["kind"] != "exported_program":
        raise ValueError(f"{str(path)!r} must have {', '.join(_KEYS)}; found {', '.join(map(str, document))}")
    if document["checksum"] != _checksum(document):
        raise ValueError(f"{str(path)!r} is not what was written: its checksum differs, it was changed or damaged")
    for kind in ("state", "constants"):
        if not isinstance(document[kind], list) or not all(isinstance(n, str) for n in document[kind]):
            raise ValueError(f"{str(path)!r}: {kind} must be a list of names")
    if document["examples"] is not None:
        _check_examples(document["examples"])
    return document


def _check_examples(leaves: object) -> None:
    for leaf in leaves if isinstance(leaves, list) else [None]:
        value = next(iter(leaf.values())) if isinstance(leaf, dict) and len(leaf) == 1 else leaf
        kind = next(iter(leaf)) if isinstance(leaf, dict) and len(leaf) == 1 else None
        simple = value is None or isinstance(value, (bool, int, float, str))
        if not (kind == "tensor" and isinstance(value, str)) and not (kind == "value" and simple):
            raise ValueError(f"an example input must be a tensor's name or a plain value, found {str(leaf)[:80]}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def _checksum(document: dict[str, Any]) -> str:
    """Of everything but itself."""
    rest = {k: document[k] for k in _KEYS if k != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _check_target(folder: Path) -> None:
    if folder.is_dir():
        others = sorted(p.name for p in folder.iterdir() if p.name not in (_STRUCTURE, _TENSORS))
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
