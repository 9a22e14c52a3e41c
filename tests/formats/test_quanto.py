"""Quanto's files: decoded to the values that Quanto itself gives them, and refused where they are not what they say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qcompile.formats import quanto
from qcompile.kernels import QTensor

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "quanto"

#: Folder, shape, scheme. Without a bias, the shape of a weight in groups is not in the file.
LINEARS = [
    ("qint8_bf16_linear", (192, 256), "qint8/channel=0/symmetric/bfloat16"),
    ("qfloat8_e4m3_fp16_linear", (192, 256), "qfloat8_e4m3fn/channel=0/symmetric/float16"),
    ("qint4_bf16_linear", (192, 256), "qint4/group=128/shift/bfloat16"),
    ("qint4_odd_groups", (50, 96), "qint4/channel=0/shift/float32"),
    ("qint2_fp32_linear", (192, 256), "qint2/group=128/shift/float32"),
]


def _expected(folder: str) -> tuple[dict[str, Tensor], int]:
    with safe_open(FIXTURES / folder / "expected.safetensors", framework="pt") as file:
        step = int(file.metadata()["rows"].split()[1])
        return {name: file.get_tensor(name) for name in file.keys()}, step  # noqa: SIM118


def _as_quanto_rounds(q: QTensor) -> Tensor:
    """Quanto rounds to its dtype after the product and after the shift; we round once."""
    scale, group = q.scale.reshape(q.shape[0], -1), q.shape[1] // q.scale.reshape(q.shape[0], -1).shape[1]
    value = scale.repeat_interleave(group, 1) * q.codes().to(scale.dtype)
    return value if q.zero is None else value + q.zero.reshape(scale.shape).repeat_interleave(group, 1)


@pytest.mark.parametrize(("folder", "shape", "scheme"), LINEARS)
def test_a_linear_is_what_quanto_says(folder: str, shape: tuple[int, int], scheme: str) -> None:
    file = quanto.read(FIXTURES / folder, {"linear": shape})
    module, (expected, step) = file.modules["linear"], _expected(folder)
    assert module.weight is not None and list(file.modules) == ["linear"] and file.floats == {}
    assert str(module.weight.scheme) == scheme and module.shape == module.weight.shape == shape
    want = expected["linear"]
    assert torch.equal(_as_quanto_rounds(module.weight)[::step].to(want.dtype), want)
    close = module.weight.dequantize()[::step]
    if module.weight.scheme.scale_dtype == torch.bfloat16:
        # Two roundings of the larger terms, of which a difference is left.
        torch.testing.assert_close(close, want.float(), rtol=2**-8, atol=2**-8 * float(want.abs().max()))
    else:
        assert torch.equal(close.to(want.dtype), want)
    stored = load_file(FIXTURES / folder / "model.safetensors")
    if "linear.bias" in stored:
        assert module.bias is not None and torch.equal(module.bias, stored["linear.bias"])
    else:
        assert module.bias is None
    assert module.activations is None
    for scale in (module.input_scale, module.output_scale):
        assert scale is not None and scale.shape == () and float(scale) == 1


def test_a_folder_of_save_pretrained() -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    file = quanto.read(FIXTURES / "tinyllama_qint4", dict(zip(names, [(128, 128), (128, 256)], strict=True)))
    expected, step = _expected("tinyllama_qint4")
    assert list(file.modules) == names and list(file.floats) == ["model.layers.0.input_layernorm.weight"]
    for name in names:
        weight = file.modules[name].weight
        assert weight is not None
        assert torch.equal(weight.dequantize()[::step].to(expected[name].dtype), expected[name])


def test_a_bias_or_the_model_tells_the_shape() -> None:
    assert quanto.read(FIXTURES / "qint4_bf16_linear").modules["linear"].shape == (192, 256)
    with pytest.raises(ValueError, match=r"shape of linear.weight, 384 groups of 128; pass the float model"):
        quanto.read(FIXTURES / "qint2_fp32_linear")
    with torch.device("meta"):
        model = nn.ModuleDict({"linear": nn.Linear(256, 192, bias=False)})
        other = nn.ModuleDict({"linear": nn.Linear(128, 192, bias=False)})
    assert quanto.read(FIXTURES / "qint2_fp32_linear", model).modules["linear"].shape == (192, 256)
    for folder in ("qint2_fp32_linear", "qint8_bf16_linear"):
        with pytest.raises(ValueError, match=r"shape .*\[192, 128\]"):
            quanto.read(FIXTURES / folder, other)
    with pytest.raises(ValueError, match="names 'linear', which the model does not have"):
        quanto.read(FIXTURES / "qint2_fp32_linear", nn.Linear(256, 192))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Codes as Quanto packs them, written out byte by byte."""
    per = 8 // bits
    rows = -(-codes.shape[0] // per)
    out = torch.zeros(rows, *codes.shape[1:], dtype=torch.uint8)
    for i, row in enumerate(codes):
        out[i % rows] |= row << (bits * (i // rows))
    return out


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("shape", [(5, 6, 3, 3), (3, 54), (1, 18)])
def test_integer_shifts_odd_rows_and_convolutions(bits: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(bits)
    out, size = shape[0], 18
    columns = torch.Size(shape).numel() // out
    groups = out * columns // size
    codes = torch.randint(0, 1 << bits, (groups, size), generator=generator, dtype=torch.uint8)
    scale = torch.rand(groups, 1, generator=generator) + 0.1
    shift = torch.randint(0, 1 << bits, (groups, 1), generator=generator, dtype=torch.uint8)
    state = {"a.weight._data._data": _packed(codes, bits), "a.weight._scale": scale, "a.weight._shift": shift}
    file = quanto.decode(state, {"a": {"weights": f"qint{bits}", "activations": "none"}}, {"a": shape})
    weight = file.modules["a"].weight
    assert weight is not None and weight.scheme.mode == "affine" and file.modules["a"].shape == shape
    want = (scale * (codes.float() - shift.float())).reshape(out, columns)
    assert torch.equal(weight.dequantize(), want)
    assert list(state) == ["a.weight._data._data", "a.weight._scale", "a.weight._shift"]


def test_eight_bit_convolution_and_activations_alone() -> None:
    data, scale = torch.randint(-128, 128, (4, 3, 3, 3), dtype=torch.int8), torch.rand(4, 1, 1, 1) + 0.1
    state = {
        "conv.weight._data": data,
        "conv.weight._scale": scale,
        "norm.weight": torch.ones(4),
        "norm.output_scale": torch.tensor([0.5]),
    }
    entries = {
        "conv": {"weights": "qint8", "activations": "qint8"},
        "norm": {"weights": "none", "activations": "qfloat8_e5m2"},
    }
    file = quanto.decode(state, entries)
    conv, norm = file.modules["conv"], file.modules["norm"]
    assert conv.weight is not None and conv.shape == (4, 3, 3, 3)
    assert torch.equal(conv.weight.dequantize(), (data * scale).reshape(4, 27))
    assert conv.activations is not None and conv.activations.name == "qint8" and conv.input_scale is None
    assert norm.weight is None and norm.shape == () and norm.output_scale is not None and float(norm.output_scale) == 0.5
    assert list(file.floats) == ["norm.weight"]


def _state(folder: str = "qint4_bf16_linear") -> dict[str, Tensor]:
    return load_file(FIXTURES / folder / "model.safetensors")


MAP = {"linear": {"weights": "qint4", "activations": "none"}}
Break = Callable[[dict[str, Tensor]], object]
WRONG: list[tuple[Break, str]] = [
    (lambda s: s.pop("linear.weight._shift"), r"'linear.weight._shift' is missing"),
    (lambda s: s.pop("linear.weight._data._data"), r"'linear.weight._data._data' is missing"),
    (lambda s: s.update({"linear.weight": torch.ones(192, 256)}), r"not quantized .* before it was frozen"),
    (lambda s: s.update({"linear.weight._data._data": torch.ones(191, 128, dtype=torch.uint8)}), r"not fit the bfloat16"),
    (lambda s: s.update({"linear.weight._data._data": torch.ones(192, 128)}), r"must be uint8 .*, got float32 \[192, 128\]"),
    (lambda s: s.update({"linear.weight._data._data": torch.ones(192, dtype=torch.uint8)}), r"at least two axes"),
    (lambda s: s.update({"linear.weight._scale": torch.ones(384, 1)}), r"_shift must be like the scale, float32"),
    (lambda s: s.update({"linear.weight._scale": torch.ones(384, 1, dtype=torch.int32)}), r"_scale must be float32"),
    (lambda s: s["linear.weight._scale"].fill_(float("nan")), r"_scale holds NaN"),
    (lambda s: s.update({"linear.bias": torch.ones(7)}), r"does not tell the shape"),
    (lambda s: s.update({"linear.bias": torch.ones(192, 1)}), r"linear.bias must be floating point with one axis"),
    (lambda s: s.update({"linear.input_scale": torch.ones(2)}), r"linear.input_scale must be one floating point number"),
    (lambda s: s.update({"other.weight._scale": torch.ones(2)}), r"'other.weight._scale' is part of a quantized weight"),
    (
        lambda s: s.update({"linear.weight._shift": torch.full((384, 1), 16, dtype=torch.uint8)}),
        r"_shift holds 16, which is no code of qint4",
    ),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_wrong_state_dict_is_refused(change: Break, message: str) -> None:
    state = _state()
    change(state)
    with pytest.raises(ValueError, match=message):
        quanto.decode(state, MAP)


def test_other_wrong_values() -> None:
    state = _state("qint8_bf16_linear")
    eight = {"linear": {"weights": "qint8", "activations": "none"}}
    with pytest.raises(ValueError, match=r"linear.weight._data must be torch.float8_e4m3fn .* got int8"):
        quanto.decode(state, {"linear": {"weights": "qfloat8", "activations": "none"}})
    with pytest.raises(ValueError, match=r"_scale must be one a row of \[192, 256\], got bfloat16 \[96, 1\]"):
        quanto.decode({**state, "linear.weight._scale": state["linear.weight._scale"][:96]}, eight)
    with pytest.raises(ValueError, match="bias has 3 elements"):
        quanto.decode({**state, "linear.bias": torch.ones(3)}, eight)
    with pytest.raises(TypeError, match="tensors by name, got 'x': int"):
        quanto.decode({"x": 3}, eight)  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "not empty"),
        ([], "not empty"),
        ({"a": "qint8"}, "entry 'a' .* must have weights and activations"),
        ({"a": {"weights": "qint8"}}, "must have weights and activations"),
        ({"a": {"weights": "qint3", "activations": "none"}}, "weights of 'a' must be none, qint2, qint4, qint8, .* 'qint3'"),
        ({"a": {"weights": "qint8", "activations": "qint4"}}, "activations of 'a' must be none, qint8, "),
        ({"a": {"weights": ["qint8"], "activations": "none"}}, "weights of 'a' must be none"),
    ],
)
def test_a_wrong_map_is_refused(given: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quanto.decode({}, given)  # type: ignore[arg-type]


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither quanto_qmap\.json nor"):
        quanto.read(tmp_path)
    folder = tmp_path / "model"
    shutil.copytree(FIXTURES / "qint4_bf16_linear", folder)
    whole = folder / "model.safetensors"
    state = load_file(whole)
    names = sorted(state)
    for i, part in enumerate((names[:2], names[2:])):
        save_file({n: state[n] for n in part}, folder / f"part{i}.safetensors")
    index = {"weight_map": {n: f"part{int(n not in names[:2])}.safetensors" for n in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    data = whole.read_bytes()
    whole.unlink()
    sharded = quanto.read(folder).modules["linear"].weight
    one = quanto.read(FIXTURES / "qint4_bf16_linear").modules["linear"].weight
    assert sharded is not None and one is not None and torch.equal(sharded.data, one.data)
    for wrong in ("../model/part0.safetensors", "none.safetensors", 3):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": wrong}}))
        with pytest.raises(ValueError, match=re.escape(f"names {wrong!r}, which is no file of the folder")):
            quanto.read(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        quanto.read(folder)
    for cut in (0, 7, 100, len(data) - 1):
        whole.write_bytes(data[:cut])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            quanto.read(folder)
    whole.write_bytes(data)
    (folder / "quantization_map.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        quanto.read(folder)
