"""``freeze``: the float weights are gone, and the module is a module like any other."""

from __future__ import annotations

import copy
import gc
import io
import multiprocessing
import pickle
import weakref
from pathlib import Path

import pytest
import safetensors.torch
import torch
from eager import KERNEL, error, rounded
from torch import Tensor, nn

import qcompile
from qcompile import QModuleMixin


class Net(nn.Module):
    """One of each way of holding weights: rows, a kernel, a table, gates, attention's stack, a raw parameter, a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.conv = nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.norm = nn.LayerNorm(32)
        self.mix = nn.Parameter(torch.randn(32, 32) / 8)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.table(tokens).mT).mT
        x = self.gru(x)[0]
        x = x + self.attention(x, x, x)[0]
        return self.head(self.norm(x @ self.mix.t()))


def _tokens() -> Tensor:
    return torch.randint(0, 50, (2, 9))


def _net(weights: str = "qint4", activations: str | None = "qint8", frozen: bool = True) -> nn.Module:
    model = qcompile.quantize(Net().eval(), weights=weights, activations=activations)
    if activations:
        with qcompile.Calibration(), torch.no_grad():
            model(_tokens())
    return qcompile.freeze(model) if frozen else model


def _same(a: nn.Module, b: nn.Module) -> None:
    tokens = _tokens()
    with torch.no_grad():
        torch.testing.assert_close(a(tokens), b(tokens), rtol=0, atol=0)


KINDS = [("qint4", None), ("qint8", "qint8"), ("qfloat8", "qfloat8")]
kinds = pytest.mark.parametrize("weights, activations", KINDS)
freezing = pytest.mark.parametrize("frozen", [False, True])


@kinds
def test_frozen_output_is_that_of_the_codes(weights: str, activations: str | None) -> None:
    original = Net().eval()
    model = qcompile.quantize(copy.deepcopy(original), weights=weights)
    tokens = _tokens()
    with torch.no_grad():
        expected = rounded(original, model)(tokens)
        assert error(model(tokens), expected) < 1e-5
        assert error(qcompile.freeze(model)(tokens), expected) < (1e-5 if "float" in weights else 4 * KERNEL)


def test_float_tensors_are_gone() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(4)))
    before = sum(p.nbytes for p in model.parameters())
    alive = [weakref.ref(p) for p in model.parameters()]
    storage = [weakref.ref(p.untyped_storage()) for p in model.parameters()]
    qcompile.freeze(qcompile.quantize(model, weights="qint4"))
    gc.collect()
    assert not [r for r in (*alive, *storage) if r() is not None]
    tensors = [o for o in gc.get_objects() if issubclass(type(o), Tensor) and tuple(o.shape) == (256, 256)]
    assert not [t for t in tensors if t.is_floating_point()]
    held = sum(b.nbytes for b in model.buffers())
    # 4 bits a code, and 16 bits of scale with 8 of zero point for each 32 of them: 4.75 of 32 bits.
    assert held <= 0.16 * before and sum(p.nbytes for p in model.parameters()) == 0
    model(torch.randn(2, 256))
    assert sum(b.nbytes for b in model.buffers()) == held


def test_running_decodes_nothing_for_good() -> None:
    model = _net()
    held = {n: (b.data_ptr(), b.nbytes) for n, b in model.named_buffers()}
    model(_tokens())
    gc.collect()
    assert {n: (b.data_ptr(), b.nbytes) for n, b in model.named_buffers()} == held
    assert not [o for m in model.modules() for o in vars(m).values() if isinstance(o, Tensor) and type(o) is Tensor]


def test_freezing_again_changes_nothing_and_a_part_alone_works() -> None:
    model = qcompile.quantize(Net().eval(), weights="qint4")
    qcompile.freeze(model.head)
    assert model.head.frozen and not model.conv.frozen and isinstance(model.conv._parameters["weight"], nn.Parameter)
    y = model(_tokens() * 0)
    buffers = dict(model.head.named_buffers())
    qcompile.freeze(model)
    qcompile.freeze(model)
    assert all(b is buffers[n] for n, b in model.head.named_buffers())
    assert error(model(_tokens() * 0), y) < 4 * KERNEL
    one = qcompile.quantize(nn.Linear(64, 64))
    one.freeze()
    assert one.frozen


def test_what_cannot_be_frozen_says_so() -> None:
    with pytest.raises(ValueError, match="nothing in the model is quantized"):
        qcompile.freeze(nn.Linear(4, 4))
    model = qcompile.quantize(nn.Sequential(nn.Linear(64, 64)), weights="qint4")
    with torch.no_grad():
        model[0]._parameters["weight"][0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0\.weight.*(NaN|finite)"):
        qcompile.freeze(model)


@kinds
@freezing
def test_deepcopy_pickle_and_save_of_the_module(weights: str, activations: str | None, frozen: bool) -> None:
    model = _net(weights, activations, frozen)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False),
        copy.deepcopy(copy.deepcopy(model)),
    ):  # fmt: skip
        _same(model, other)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()]
        assert not {t.data_ptr() for t in model.state_dict().values()} & {
            t.data_ptr() for t in other.parameters() if t.numel()
        }
        if not frozen:
            _same(qcompile.freeze(copy.deepcopy(model)), qcompile.freeze(other))


@kinds
def test_state_dict_through_files(weights: str, activations: str | None, tmp_path: Path) -> None:
    model = _net(weights, activations)
    state = model.state_dict()
    assert all(type(t) is Tensor for t in state.values())
    assert not [n for n in state if "q_" in n], "named as the parameters are"
    safetensors.torch.save_file({n: t.contiguous() for n, t in state.items()}, tmp_path / "m.safetensors")
    torch.save(state, tmp_path / "m.pt")
    for stored in (
        safetensors.torch.load_file(tmp_path / "m.safetensors"), torch.load(tmp_path / "m.pt", weights_only=True),
    ):  # fmt: skip
        other = _net(weights, activations)
        with pytest.raises(AssertionError):
            _same(model, other)
        assert other.load_state_dict(stored).missing_keys == []
        _same(model, other)


@kinds
def test_frozen_state_into_an_unfrozen_module_freezes_it(weights: str, activations: str | None) -> None:
    model, other = _net(weights, activations), _net(weights, activations, frozen=False)
    assert not other.head.frozen
    other.load_state_dict(model.state_dict())
    _same(model, other)
    assert all(m.frozen for m in other.modules() if isinstance(m, QModuleMixin))


def test_float_state_into_a_frozen_module_raises() -> None:
    unfrozen, frozen = _net(frozen=False), _net()
    before = copy.deepcopy(frozen)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        frozen.load_state_dict(unfrozen.state_dict())
    assert torch.equal(before.head.q_weight._codes, frozen.head.q_weight._codes)
    with pytest.raises(RuntimeError, match=r"head\.weight"):
        frozen.load_state_dict(Net().state_dict())


def test_unfrozen_state_dict_is_that_of_the_float_model() -> None:
    original = Net()
    model = qcompile.quantize(copy.deepcopy(original), weights="qint4")
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in original.named_parameters()]
    fresh = Net()
    model.load_state_dict(fresh.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_casts_change_what_is_computed_in_not_what_is_stored(
    weights: str, activations: str | None, dtype: torch.dtype
) -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    qcompile.quantize(model, weights=weights, activations=activations)
    x = torch.randn(5, 64)
    if activations:
        with qcompile.Calibration(streamline=False):
            model(x)
    y = qcompile.freeze(model)(x)
    codes = {n: t.clone() for n, t in model.state_dict().items() if "bias" not in n}
    model.to(dtype)
    assert model[0].weight.dtype == dtype and model(x.to(dtype)).dtype == dtype
    assert error(model(x.to(dtype)), y) < 0.1
    for name, value in codes.items():
        now = model.state_dict()[name]
        assert now.dtype == value.dtype and torch.equal(now.float(), value.float()), name
    model.float()
    bias = error(model[0].bias, copy.deepcopy(model[0].bias).to(dtype))
    assert model(x).dtype == torch.float32 and error(model(x), y) < 0.02 + bias


@kinds
def test_meta_and_back(weights: str, activations: str | None) -> None:
    model = _net(weights, activations)
    state, other = model.state_dict(), copy.deepcopy(model).to("meta")
    assert all(t.is_meta for t in (*other.parameters(), *other.buffers()))
    assert {n: (t.shape, t.dtype) for n, t in other.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in state.items()
    }
    other.load_state_dict(state, assign=True)
    _same(model, other)


def _read(model: nn.Module, tokens: Tensor, answers: object) -> None:
    with torch.no_grad():
        answers.put(model(tokens).sum().item())  # type: ignore[attr-defined]


def test_shared_memory() -> None:
    model = _net("qint8", None).share_memory()
    assert all(t.is_shared() for t in (*model.parameters(), *model.buffers()))
    tokens, answers = _tokens(), multiprocessing.get_context("fork").SimpleQueue()
    worker = multiprocessing.get_context("fork").Process(target=_read, args=(model, tokens, answers))
    with torch.no_grad():
        expected = model(tokens).sum().item()
    # A child of fork must not meet the parent's thread pool.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    worker.start()
    worker.join(60)
    torch.set_num_threads(threads)
    assert worker.exitcode == 0
    assert answers.get() == pytest.approx(expected, rel=1e-4)
