"""The heads take their shape at the first call, in place, in torch's own way."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from structkd import ConvAdapter, Projector
from structkd.projectors import StackedLinear, is_unshaped

HEADS = {
    "linear": (lambda: Projector(5, layers=1), (4, 3)),
    "mlp": (lambda: Projector(5, hidden_dim=6), (4, 3)),
    "map": (lambda: ConvAdapter(5, kernel_size=3), (4, 3, 2, 2)),
    "tokens": (lambda: ConvAdapter(5), (4, 7, 3)),
    "rows": (lambda: ConvAdapter(5), (4, 3)),
}
every_head = pytest.mark.parametrize(("make", "shape"), list(HEADS.values()), ids=list(HEADS))
OPTIMIZERS = {
    "SGD": lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9),
    "AdamW": lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
    "timm": lambda module: create_optimizer_v2(module, opt="adamw", lr=0.1, weight_decay=0.05),
}


@every_head
@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_an_optimizer_made_before_the_first_call_trains_it(make, shape, optimizer: str) -> None:
    head, x = make(), torch.randn(*shape)
    trains = OPTIMIZERS[optimizer](head)
    assert is_unshaped(head)
    loss = head(x).pow(3).sum()
    assert not is_unshaped(head)
    before = [p.detach().clone() for p in head.parameters()]
    loss.backward()
    trains.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, head.parameters(), strict=True))


@every_head
def test_it_starts_as_the_layers_of_torch_do(make, shape) -> None:
    x = torch.randn(*shape)
    torch.manual_seed(3)
    head = make()
    head(x)
    torch.manual_seed(3)
    for layer in [m for m in head.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        if isinstance(layer, nn.Linear):
            plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        else:
            plain = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size)
        assert torch.equal(plain.weight, layer.weight)


@every_head
def test_a_state_loads_before_and_after_the_first_call(make, shape, tmp_path) -> None:
    head, x = make(), torch.randn(*shape)
    assert not head.state_dict() or set(head.state_dict()) == {"net.1.num_batches_tracked"}
    make().load_state_dict(head.state_dict())
    wanted = head(x)
    torch.save(head.state_dict(), tmp_path / "head.pt")
    state = torch.load(tmp_path / "head.pt", weights_only=True)
    for other in (make(), copy.deepcopy(make()), pickle.loads(pickle.dumps(make()))):
        held = {id(p) for p in other.parameters()}
        other.load_state_dict(state)
        torch.testing.assert_close(other(x), wanted, rtol=0, atol=0)
        assert {id(p) for p in other.parameters()} == held
        assert repr(other) == repr(head)
    shaped = make()
    shaped(x)
    shaped.load_state_dict(state)
    torch.testing.assert_close(shaped(x), wanted, rtol=0, atol=0)


@every_head
def test_it_takes_the_dtype_of_what_it_meets_and_compiles_at_once(make, shape) -> None:
    torch.compiler.reset()
    head, x = make(), torch.randn(*shape, dtype=torch.float64)
    compiled = torch.compile(head, backend="aot_eager", fullgraph=True)
    value = compiled(x)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, head(x))


@every_head
def test_another_width_than_the_first_is_named(make, shape) -> None:
    head = make()
    head(torch.randn(*shape))
    wider = list(shape)
    wider[-1 if len(shape) == 3 else 1] += 1
    with pytest.raises(ValueError, match=r"took its shape from .*3.*make a new one"):
        head(torch.randn(*wider))


@pytest.mark.parametrize(("make", "shape"), [(Projector, (4, 3)), (ConvAdapter, (4, 3, 2, 2))])
def test_equal_widths_need_no_head(make, shape) -> None:
    x = torch.randn(*shape)
    head = make(skip_equal=True)
    assert head(x, 3) is x
    assert not list(head.parameters())
    fresh = make(skip_equal=True)
    fresh.load_state_dict(head.state_dict())
    assert fresh(x, 4).shape[1] == 4
    with pytest.raises(ValueError, match="not known"):
        make()(x)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Projector(0), ValueError, "out_dim must be at least 1"),
        (lambda: Projector(2.5), TypeError, "out_dim must be a whole number"),
        (lambda: Projector(4, layers=0), ValueError, "layers must be at least 1"),
        (lambda: ConvAdapter(4, kernel_size=2), ValueError, "kernel_size must be odd"),
        (lambda: Projector(4)(torch.zeros(2, 3, 4)), ValueError, r"takes rows \(B, D\)"),
        (lambda: ConvAdapter(4)(torch.zeros(2)), ValueError, r"takes maps \(B, C, H, W\)"),
    ],
)
def test_bad_input_is_named(call, error, message: str) -> None:
    with pytest.raises(error, match=message):
        call()


WIDTHS = [(3, 4), (5, 2), (1, 3)]


def _layers(seed: int) -> list[nn.Linear]:
    torch.manual_seed(seed)
    return [nn.Linear(into, out) for into, out in WIDTHS]


def test_stacked_weights_are_those_of_single_layers_and_train_alike() -> None:
    layers = _layers(1)
    torch.manual_seed(1)
    stacked = StackedLinear(bias=True)
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    ours = torch.optim.SGD(stacked.parameters(), **options)
    theirs = torch.optim.SGD([p for layer in layers for p in layer.parameters()], **options)
    for _ in range(4):
        loss: Tensor = torch.zeros(())
        for layer, (weight, bias) in zip(layers, stacked(WIDTHS, torch.zeros(())), strict=True):
            torch.testing.assert_close(weight, layer.weight, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(bias, layer.bias, rtol=1e-6, atol=1e-7)
            loss = loss + weight.pow(2).sin().sum() + bias.sum()
        wanted = sum(layer.weight.pow(2).sin().sum() + layer.bias.sum() for layer in layers)
        for optimizer, value in ((ours, loss), (theirs, wanted)):
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
    rows, columns = stacked.weight.shape
    padding = torch.ones(rows, columns, dtype=torch.bool)
    start = 0
    for into, out in WIDTHS:
        padding[start : start + out, :into] = False
        start += out
    assert (stacked.weight[padding] == 0).all()


def test_stacked_weights_of_other_stages_are_named_and_none_need_nothing() -> None:
    stacked = StackedLinear(bias=False)
    stacked(WIDTHS, torch.zeros(()))
    with pytest.raises(ValueError, match=r"took its shape .*make a new one"):
        stacked([(3, 4)], torch.zeros(()))
    nothing = StackedLinear(bias=True)
    assert nothing([], torch.zeros(())) == []
    assert not list(nothing.parameters())
