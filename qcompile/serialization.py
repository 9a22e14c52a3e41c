"""``qcompile.save`` and ``qcompile.load``: a folder with one safetensors file and one JSON file.

Nothing that is read is unpickled or executed; names, shapes, dtypes, sizes and operators are checked before memory is taken.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.export import ExportedProgram

from qcompile import stored_folder, stored_tensors
from qcompile.passes.decision import Decision
from qcompile.progress import progress_bar

__all__ = ["load", "read_report", "save"]

_KEYS = ("format", "version", "kind", "torch", "checksum", "tensors", "state", "constants", "examples", "program")


def save(model: ExportedProgram | nn.Module, folder: str | Path) -> Path:
    """Write a program, or a quantized module, to a folder, whole or not at all.

    The folder holds ``tensors.safetensors``, which other tools can read, and ``qcompile.json``: of a program the graph with
    all that belongs to it (names, dynamic shapes, mutated buffers, example inputs, the report), of a module its
    :func:`~qcompile.quantization_map`.

    Args:
        model: what :func:`qcompile.quantize` returned, or any other exported program.
        folder: a path that does not exist yet, an empty folder, or one that ``save`` wrote before, which is replaced.

    Returns:
        The folder.

    Raises:
        TypeError: neither an exported program nor a module.
        ValueError: the program holds something that cannot be stored safely, such as TorchScript objects or operators of
            unknown libraries; the module is not quantized; or the folder holds something else.

    Example:
        >>> import qcompile, tempfile, torch
        >>> x = torch.randn(3, 64)
        >>> program = qcompile.quantize(torch.export.export(torch.nn.Linear(64, 128).eval(), (x,)))
        >>> folder = save(program, tempfile.mkdtemp() + "/model")
        >>> torch.equal(load(folder).module()(x), program.module()(x))
        True
    """
    from qcompile import stored_graph, stored_module

    folder = Path(folder)
    if isinstance(model, nn.Module):
        return stored_module.save(model, folder)
    if not isinstance(model, ExportedProgram):
        raise TypeError(
            "qcompile.save takes an exported program or a module (what qcompile.quantize returned), got "
            f"{type(model).__name__}"
        )
    document: dict[str, Any] = {
        "format": stored_folder.FORMAT,
        "version": stored_folder.VERSION,
        "kind": "exported_program",
        "torch": torch.__version__,
        "program": stored_graph.encode(model),
    }
    stored_folder.write(folder, document, _gather(model, document))
    return folder


def load(folder: str | Path, model: nn.Module | None = None, device: torch.device | str | None = None) -> Any:
    """Read what :func:`save` wrote: the same graph or module, the same bits.

    Args:
        folder: where it lies.
        model: for a module that was saved: a float model of the same architecture, also on the meta device; it becomes the
            quantized one, as by :func:`qcompile.requantize`. Folders that Quanto wrote are read, too.
        device: for a module: where it goes; None: the CPU.

    Returns:
        An ``ExportedProgram``, or ``model``.

    Raises:
        FileNotFoundError: there is no such program.
        ValueError: it is of another format or version, damaged, incomplete, or has operators that are not allowed; the
            message says what was found. A module was saved but no ``model`` given, or a program, and one was.
    """
    import qcompile.kernels  # noqa: F401  registers the operators that the graph names
    from qcompile import stored_graph, stored_module

    folder = Path(folder)
    if model is not None:
        return stored_module.load(folder, model, device)
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
    """The JSON document of a program, with the form of everything but graph and tensors checked."""
    document = stored_folder.read(folder)
    path = folder / stored_folder.STRUCTURE
    if document.get("kind") == "module":
        raise ValueError(f"{str(folder)!r} holds a module; load it into one of its architecture: load(folder, model)")
    stored_folder.check_form(folder, document, _KEYS)
    if document["kind"] != "exported_program":
        raise ValueError(f"{str(path)!r} is of kind {document['kind']!r}; known are exported_program and module")
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
