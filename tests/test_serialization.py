"""``save`` and ``load``: the same bits come back, and nothing that is damaged or ill-meant gets in."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from small import Cache, Mlp, Tied, distance
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import qcompile
from qcompile import stored_folder, stored_tensors, stored_text
from qcompile.export import lowered

FOLDER = "program"


def _exported(model: nn.Module, *inputs: Any, **options: Any) -> ExportedProgram:
    return export(model.eval(), inputs, **options)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small quantized program that takes a dynamic batch."""
    program = _exported(Mlp(), torch.randn(4, 64), dynamic_shapes={"x": {0: Dim("batch", min=2, max=50)}})
    return qcompile.save(qcompile.quantize(program, "qint4"), tmp_path / FOLDER)


def _tamper(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the structure, and mend its checksum: as someone would who means ill."""
    file = folder / "qcompile.json"
    document = json.loads(file.read_text())
    change(document)
    document["checksum"] = stored_folder.checksum(document)
    file.write_text(json.dumps(document))


def _graph(document: dict[str, Any]) -> dict[str, Any]:
    return document["program"]["graph_module"]["graph"]


# What comes back


@pytest.mark.parametrize("weights", [None, "qint8", "qint4", "qint3", "qfloat8"])
def test_the_same_bits_come_back(tmp_path: Path, weights: str | None) -> None:
    program = _exported(Mlp(), torch.randn(4, 64), dynamic_shapes={"x": {0: Dim("batch", min=2, max=50)}})
    program = program if weights is None else qcompile.quantize(program, weights)
    again = qcompile.load(qcompile.save(program, tmp_path / FOLDER))
    for rows in (2, 7, 50):
        x = torch.randn(rows, 64)
        assert torch.equal(again.module()(x), program.module()(x))
    assert list(again.state_dict) == list(program.state_dict)
    for name, tensor in program.state_dict.items():
        other = again.state_dict[name]
        assert torch.equal(other.view(torch.uint8), tensor.view(torch.uint8)), name
        assert type(other) is type(tensor)
        assert other.requires_grad == tensor.requires_grad
        assert other.stride() == tensor.stride()
    assert [(n.op, n.name, str(n.target)) for n in again.graph.nodes] == [
        (n.op, n.name, str(n.target)) for n in program.graph.nodes
    ]


def test_dynamic_shapes_stay_bounded(saved: Path) -> None:
    program = qcompile.load(saved)
    (bounds,) = program.range_constraints.values()
    assert (int(bounds.lower), int(bounds.upper)) == (2, 50)
    with pytest.raises((RuntimeError, AssertionError)):
        program.module()(torch.randn(51, 64))


def test_the_report_comes_back(saved: Path) -> None:
    fresh = qcompile.quantize(_exported(Mlp(), torch.randn(4, 64)), "qint4")
    rows = [r.weight for r in qcompile.report(fresh).rows]
    assert [r.weight for r in qcompile.report(qcompile.load(saved)).rows] == rows == ["up.weight", "down.weight"]
    assert qcompile.report(saved).totals == qcompile.report(qcompile.load(saved)).totals


@pytest.mark.parametrize("persistent", [True, False])
def test_a_mutated_buffer_mutates_after_loading(tmp_path: Path, persistent: bool) -> None:
    inputs = (torch.randn(1, 64), torch.tensor([0]))
    program = qcompile.quantize(_exported(Cache(persistent=persistent), *inputs), "qint8", min_elements=0)
    folder = qcompile.save(program, tmp_path / FOLDER)
    first = qcompile.load(folder).module()(*inputs)
    one, other = program.module(), qcompile.load(folder).module()
    for position in range(4):
        x = torch.randn(1, 64)
        expected = one(x, torch.tensor([position]))
        assert torch.equal(other(x, torch.tensor([position])), expected)
    assert not torch.equal(other(*inputs), first)
    # What ran after loading is not in the file.
    assert torch.equal(qcompile.load(folder).module()(*inputs), first)


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    program = _exported(Tied(), torch.randint(0, 160, (2, 5)))
    folder = qcompile.save(program, tmp_path / FOLDER)
    again = qcompile.load(folder)
    assert again.state_dict["embed.weight"] is again.state_dict["head.weight"]
    assert (folder / "tensors.safetensors").stat().st_size < 1.5 * 160 * 64 * 4


def test_a_lowered_program_comes_back(tmp_path: Path) -> None:
    program = lowered(qcompile.quantize(_exported(Mlp(), torch.randn(4, 64)), "qint4"))
    again = qcompile.load(qcompile.save(program, tmp_path / FOLDER))
    x = torch.randn(4, 64)
    assert torch.equal(again.module()(x), program.module()(x))
    assert any("linear_chain" in str(n.target) for n in again.graph.nodes)


class _Containers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 96)

    def forward(self, pair: tuple[Tensor, Tensor], *, more: dict[str, Any], scale: float = 2.0) -> dict[str, Tensor]:
        return {"y": self.linear(pair[0] + pair[1]) * scale, "z": more["b"].sum(-1)}


def test_nested_inputs_and_plain_values(tmp_path: Path) -> None:
    pair = (torch.randn(3, 64), torch.randn(3, 64))
    keywords = {"more": {"b": torch.randn(3, 4)}, "scale": 3.0}
    program = qcompile.quantize(export(_Containers().eval(), (pair,), keywords), min_elements=0)
    again = qcompile.load(qcompile.save(program, tmp_path / FOLDER))
    args, given_keywords = again.example_inputs
    assert torch.equal(args[0][1], pair[1])
    assert given_keywords["scale"] == 3.0
    expected = program.module()(pair, **keywords)
    for key, value in again.module()(*args, **given_keywords).items():
        assert torch.equal(value, expected[key])


def test_it_compiles_after_loading(saved: Path) -> None:
    program = qcompile.load(saved)
    x = torch.randn(5, 64)
    got, wanted = qcompile.compile(program)(x), program.module()(x)
    assert distance(got, wanted) < 0.02


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.uint16, torch.complex64,
]  # fmt: skip


def _random(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) > 0.5
    if dtype.is_floating_point or dtype.is_complex:
        return (torch.randn(shape, dtype=torch.complex64 if dtype.is_complex else torch.float32) * 3).to(dtype)
    return torch.randint(0, 100, shape).to(dtype)


def _bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    base = _random(dtype, 7, 5)
    tensors = {"whole": _random(dtype, 3, 4), "turned": _random(dtype, 3, 4).t(), "part": base[2:5, 1:3], "none": base[:0]}
    index = stored_tensors.write(tmp_path / "t.safetensors", tensors)
    again = stored_tensors.read(tmp_path, json.loads(json.dumps(index)))
    for name, tensor in tensors.items():
        assert again[name].dtype == dtype
        assert again[name].shape == tensor.shape
        assert tensor.numel() == 0 or again[name].stride() == tensor.stride()
        assert _bits(again[name]) == _bits(tensor), name


def _strides(tensor: torch.Tensor) -> list[int]:
    """The strides that mean something: an axis of one element is never stepped along."""
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


@given(st.data())
def test_any_views_of_shared_memory(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("views")
    base = torch.randn(data.draw(st.integers(1, 97)))
    views = {}
    for i in range(data.draw(st.integers(1, 4))):
        shape = data.draw(st.lists(st.integers(0, 4), max_size=3))
        strides = data.draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
        reach = stored_tensors._span(shape, strides)
        if reach <= base.numel():
            views[f"v{i}"] = base.as_strided(shape, strides, data.draw(st.integers(0, base.numel() - reach)))
    index = stored_tensors.write(folder / "t.safetensors", views)
    again = stored_tensors.read(folder, index)
    assert all(torch.equal(again[k], v) and again[k].shape == v.shape for k, v in views.items())
    # Views that overlapped overlap still, in the same places.
    live = [k for k, v in views.items() if v.numel()]
    assert len({again[k].untyped_storage().data_ptr() for k in live}) <= 1
    moved = {again[k].storage_offset() - views[k].storage_offset() for k in live}
    assert len(moved) <= 1
    assert all(_strides(again[k]) == _strides(views[k]) for k in live)


def test_the_file_is_plain_safetensors(saved: Path) -> None:
    held = safetensors.torch.load_file(saved / "tensors.safetensors")
    assert held["state/up.weight_data"].dtype == torch.uint8
    assert held["state/up.weight_scale"].shape == (160, 2)


# What is refused at saving


def test_only_exported_programs_and_quantized_modules(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="exported program"):
        qcompile.save({}, tmp_path / FOLDER)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="nothing in the model is quantized"):
        qcompile.save(Mlp(), tmp_path / FOLDER)
    assert not (tmp_path / FOLDER).exists()


def test_a_folder_with_other_things_is_left_alone(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        qcompile.save(qcompile.load(saved), tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_saving_again_replaces(saved: Path) -> None:
    other = qcompile.quantize(_exported(nn.Linear(64, 128), torch.randn(3, 64)))
    qcompile.save(other, saved)
    assert [r.weight for r in qcompile.report(saved).rows] == ["weight"]
    assert [p.name for p in saved.parent.iterdir()] == [FOLDER]


def test_a_failed_save_leaves_what_was_there(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = qcompile.load(saved)
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(stored_tensors, "_write_file", full)
    with pytest.raises(OSError, match="disk full"):
        qcompile.save(program, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before
    assert [p.name for p in saved.parent.iterdir()] == [FOLDER]


# What is refused at loading


def test_a_missing_program(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"qcompile\.json"):
        qcompile.load(tmp_path)


def test_missing_tensors(saved: Path) -> None:
    (saved / "tensors.safetensors").unlink()
    with pytest.raises(ValueError, match="missing"):
        qcompile.load(saved)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_that_was_cut_off(saved: Path, keep: int) -> None:
    for name in ("tensors.safetensors", "qcompile.json"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:keep])
        with pytest.raises(ValueError, match=r"cut off|not whole"):
            qcompile.load(saved)
        (saved / name).write_bytes(content)
    qcompile.load(saved)


def test_every_flipped_bit_is_noticed(saved: Path) -> None:
    for name in ("tensors.safetensors", "qcompile.json"):
        content = (saved / name).read_bytes()
        for place in range(0, len(content), max(1, len(content) // 40)):
            broken = bytearray(content)
            broken[place] ^= 1 << (place % 7)
            (saved / name).write_bytes(broken)
            with pytest.raises(ValueError, match=r"."):
                qcompile.load(saved)
        (saved / name).write_bytes(content)


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: dict[str, Any]) -> None:
        inner: Any = document
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return change


UP = ("tensors", "tensors", "state/up.weight_scale")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format", value="gguf"), "format is 'gguf'"),
        (_set("version", value=2), "version 2"),
        (_set("kind", value="module"), "holds a module"),
        (_set("kind", value="other"), "of kind 'other'"),
        (_set("extra", value=1), "must have"),
        (_set("state", value=["up.weight_scale"]), "not there"),
        (_set("examples", value=[]), "belong to nothing"),
        (_set("examples", value=[{"tensor": "examples/0"}, {"value": 1}]), "2 example inputs"),
        (_set("examples", value=[{"code": "1"}]), "example input"),
        (_set("tensors", "file", value="../t.safetensors"), "name of a safetensors file"),
        (_set("tensors", "bytes", value=1), "cut off"),
        (_set("tensors", "sha256", value="0" * 64), "sha256"),
        (_set(*UP, "shape", value=[160, 3]), "said"),
        (_set(*UP, "shape", value=[1 << 50, 1 << 50]), "said"),
        (_set(*UP, "shape", value=[-160, -2]), "from 0"),
        (_set(*UP, "shape", value="96"), "must be list"),
        (_set(*UP, "dtype", value="float32"), "said"),
        (_set(*UP, "dtype", value="object"), "unknown dtype"),
        (_set(*UP, "device", value="nowhere"), "unknown device"),
        (_set(*UP, "entry", value="state/other"), "missing tensors"),
        (_set(*UP, value={"entry": "state/up.weight_scale"}), "must have"),
        (_set("program", "graph_module", value={}), "lacks"),
        (_set("program", "schema_version", "major", value=1 << 20), "version"),
    ],
)
def test_a_wrong_description(saved: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    _tamper(saved, change)
    with pytest.raises(ValueError, match=message):
        qcompile.load(saved)


def test_a_view_beyond_its_memory(saved: Path) -> None:
    def change(document: dict[str, Any]) -> None:
        document["tensors"]["tensors"]["state/up.weight_scale"] |= {"stride": [1 << 40, 1], "offset": 0}

    _tamper(saved, change)
    with pytest.raises(ValueError, match="said"):
        qcompile.load(saved)


def test_a_header_that_claims_too_much(saved: Path) -> None:
    """A safetensors header with offsets beyond the file, and an index that agrees with it."""
    file = saved / "tensors.safetensors"
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["state/up.weight_scale"] |= {"shape": [1 << 40], "data_offsets": [0, 2 << 40]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    def change(document: dict[str, Any]) -> None:
        document["tensors"] |= {"bytes": file.stat().st_size, "sha256": stored_tensors._digest(file)}
        document["tensors"]["tensors"]["state/up.weight_scale"]["shape"] = [1 << 40]

    _tamper(saved, change)
    with pytest.raises(ValueError, match="safetensors"):
        qcompile.load(saved)


def test_more_tensors_than_are_named(saved: Path) -> None:
    file = saved / "tensors.safetensors"
    held = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**held, "more": torch.zeros(3)}, file)

    def change(document: dict[str, Any]) -> None:
        document["tensors"] |= {"bytes": file.stat().st_size, "sha256": stored_tensors._digest(file)}

    _tamper(saved, change)
    with pytest.raises(ValueError, match=r"unexpected tensors \['more'\]"):
        qcompile.load(saved)


def _first_call(document: dict[str, Any]) -> dict[str, Any]:
    return next(n for n in _graph(document)["nodes"] if "qcompile" in n["target"])


def _attack_node_name(document: dict[str, Any], code: str) -> None:
    _first_call(document)["name"] = f"a = {code}; b"


def _attack_value_name(document: dict[str, Any], code: str) -> None:
    values = _graph(document)["tensor_values"]
    values[f"a = {code}; b"] = next(iter(values.values()))


def _attack_target(document: dict[str, Any], code: str) -> None:
    _first_call(document)["target"] = "torch.hub.load"


def _attack_file_operator(document: dict[str, Any], code: str) -> None:
    _first_call(document)["target"] = "torch.ops.aten.from_file.default"


def _attack_symbol(document: dict[str, Any], code: str) -> None:
    for meta in _graph(document)["tensor_values"].values():
        for size in meta["sizes"]:
            if "as_expr" in size:
                size["as_expr"]["expr_str"] = code


def _attack_guard(document: dict[str, Any], code: str) -> None:
    document["program"]["guards_code"] = [code]


def _attack_fields(document: dict[str, Any], code: str) -> None:
    document["program"]["graph_module"]["module_call_graph"][0]["signature"]["forward_arg_names"] = [f"x={code}"]


def _spec(document: dict[str, Any], change: Callable[[Any], None]) -> None:
    signature = document["program"]["graph_module"]["module_call_graph"][0]["signature"]
    version, tree = json.loads(signature["in_spec"])
    change(tree)
    signature["in_spec"] = json.dumps([version, tree])


def _attack_import(document: dict[str, Any], code: str) -> None:
    context = {
        "default_factory_module": "os", "default_factory_name": "getcwd", "dict_context": "[]",
    }  # fmt: skip
    leaf = {"type": "collections.defaultdict", "context": context, "children_spec": []}
    _spec(document, lambda tree: tree["children_spec"].append(leaf))


def _attack_enum(document: dict[str, Any], code: str) -> None:
    context = json.dumps([{"__enum__": True, "fqn": "antigravity:Nothing", "name": "x"}])
    leaf = {"type": "builtins.dict", "context": context, "children_spec": []}
    _spec(document, lambda tree: tree["children_spec"].append(leaf))


def _attack_key(document: dict[str, Any], code: str) -> None:
    _spec(document, lambda tree: tree["children_spec"][1].update(context=json.dumps([f'x") or {code} or ("'])))


def _attack_buffer(document: dict[str, Any], code: str) -> None:
    for spec in document["program"]["graph_module"]["signature"]["input_specs"]:
        if "buffer" in spec:
            spec["buffer"]["buffer_name"] = f'x", {code}, "'


@pytest.mark.parametrize(
    "attack",
    [
        _attack_node_name, _attack_value_name, _attack_target, _attack_file_operator, _attack_symbol, _attack_guard,
        _attack_fields, _attack_import, _attack_enum, _attack_key, _attack_buffer,
    ],
    ids=lambda f: f.__name__.removeprefix("_attack_"),
)  # fmt: skip
def test_nothing_in_a_file_is_executed(saved: Path, tmp_path: Path, attack: Callable[[dict[str, Any], str], None]) -> None:
    mark = tmp_path / "executed"
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    _tamper(saved, lambda document: attack(document, code))
    with pytest.raises(stored_text.StoredTextError):
        qcompile.load(saved)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    [
        "s0", "Symbol('s27', positive=True, integer=True)", "Add(Mul(Integer(-1), Symbol('s0', integer=True)), Integer(3))",
        "Max(1, s0)", "FloorDiv(s0, 2)", "Pow(s0, Integer(2))", "s0 + 2*u1 - 1", "Rational(1, 2)",
    ],
)  # fmt: skip
def test_sizes_that_are_allowed(text: str) -> None:
    stored_text.expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "s0.__class__", "(lambda: 1)()", "open('x')", "s0[0]", "'text'", "Symbol('a b')", "Symbol(s0)",
        "Symbol('s0', cls=1)", "9**9**9", "LShift(1, 1000000000)", "Pow(2, Integer(99999999))", "[1]", "s0 if s0 else 1",
        "1" * 50, "f(s0)", "s0; s1", "exec", "Float('1', dps='x')", "PowByNatural(2, s0)", "ſ0",
    ],
)  # fmt: skip
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(stored_text.StoredTextError):
        stored_text.expression(text)


def test_guards() -> None:
    stored_text.guard("L['x'].size()[1] >= 2")
    stored_text.guard("Mod(L['more']['b'].size()[0], 4) == 0")
    for text in ("L['x'].tolist()", "L.__class__", "L['x'].size.__self__", "print(L)", "L['x\"]'] == 1", "math.inf"):
        with pytest.raises(stored_text.StoredTextError):
            stored_text.guard(text)


@pytest.mark.parametrize(
    "name", ["torch.ops.aten.linear.default", "torch.ops.qcompile.linear.default", "_operator.getitem", "_operator.mul"]
)
def test_operators_that_are_allowed(name: str) -> None:
    stored_text.target(name)


@pytest.mark.parametrize(
    "name",
    [
        "torch.hub.load", "torch.load", "torch.ops.aten.from_file.default", "torch.ops.load_library", "os.system",
        "_operator.methodcaller", "_operator.attrgetter", "math.__loader__", "torch.ops.aten.no_such.default",
        "torch.ops.mine.op.default", "torch.ops.aten.linear", "torch.ops.aten.__class__.default", "#ext:op", "builtins.eval",
    ],
)  # fmt: skip
def test_operators_that_are_refused(name: str) -> None:
    with pytest.raises(stored_text.StoredTextError):
        stored_text.target(name)
