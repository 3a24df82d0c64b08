"""A captured map is the named layer's own, whatever else runs that object or takes its name."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.ao.quantization as quantization
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint_sequential

import structkd
from structkd import FeatureCapture
from tests.devices import drawn


def image(size: int = 8) -> Tensor:
    return drawn(2, 3, size, size)


class Shared(nn.Module):
    """One layer ends both stages and one begins both heads; ``seen`` says what each gave or got."""

    def __init__(self, act: nn.Module | None = None, recompute: bool = False) -> None:
        super().__init__()
        act, drop = act or nn.ReLU(), nn.Dropout(0.0)
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), act)
        self.stage2 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), act)
        self.head = nn.Sequential(drop, nn.Linear(8, 5))
        self.aux = nn.Sequential(drop, nn.Linear(8, 5))
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        one = self._run(self.stage1, x)
        two = self._run(self.stage2, one)
        rows = two.mean((2, 3)), one.mean((2, 3))
        self.seen = {"stage1": one, "stage2": two, "head:input": rows[0], "aux:input": rows[1]}
        return self.head(rows[0]) + self.aux(rows[1])

    def _run(self, stage: nn.Sequential, x: Tensor) -> Tensor:
        if self.recompute:  # calls the parts of a chain and not the chain
            return checkpoint_sequential(stage, 1, x, use_reentrant=False)
        return stage(x)


LAYERS = ["stage1", "stage1.1", "stage2", "stage2.1"]
ROWS = ["head:input", "head.0:input", "aux:input", "aux.0:input"]


@pytest.mark.parametrize("act", [nn.ReLU(), nn.Identity(), nn.Dropout(0.5), nn.BatchNorm2d(8)])
def test_a_layer_object_in_several_places_is_read_where_it_was_named(act: nn.Module) -> None:
    net = Shared(act).to(torch.get_default_device())
    for layer, row in zip(LAYERS, ROWS, strict=True):
        feats = FeatureCapture(net, intermediate=layer, embedding=row)(image())
        assert feats.intermediate[0] is net.seen[layer.removesuffix(".1")]
        assert torch.equal(feats.embedding, net.seen[row.replace(".0", "")])


def test_a_shared_layer_is_read_where_it_was_named_in_one_compiled_graph() -> None:
    torch.compiler.reset()
    net = Shared()
    capture = FeatureCapture(net, intermediate=LAYERS, embedding="aux.0:input")
    fast = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        fast(image())
        feats = capture.read()
        one = net.stage1(image())
        two = net.stage2(one)
        for got, want in zip(feats.intermediate, (one, one, two, two), strict=True):
            torch.testing.assert_close(got, want)
        torch.testing.assert_close(feats.embedding, one.mean((2, 3)))


@pytest.mark.parametrize("named", ["stage1", "stage1.1", "stage2", "stage2.1"])
def test_parts_that_are_called_without_their_chain_are_not_taken_for_another_places(
    named: str,
) -> None:
    capture = FeatureCapture(Shared(recompute=True), intermediate=named)
    with pytest.raises(RuntimeError, match=rf"layer '{named}'.*stage[12]\.1'.*name another layer"):
        capture(image())
    own = FeatureCapture(Shared(recompute=True), intermediate=f"{named[:6]}.0")
    assert own(image()).intermediate[0].shape == (2, 8, 8, 8)


def test_a_checkpointed_chain_that_shares_nothing_is_read_at_its_end() -> None:
    net = Shared(recompute=True)
    net.stage2[1] = nn.ReLU()
    feats = FeatureCapture(net, intermediate=["stage1", "stage2"])(image())
    assert feats.intermediate[0] is net.seen["stage1"]
    assert feats.intermediate[1] is net.seen["stage2"]


class Twice(nn.Module):
    """Two names of one chain, of one layer by itself, and of what is in a shared part."""

    def __init__(self, runs: str) -> None:
        super().__init__()
        self.a = self.b = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        self.act = self.same = nn.ReLU()
        self.runs = runs

    def forward(self, x: Tensor) -> Tensor:
        for name in self.runs:
            x = self.act({"a": self.a, "b": self.b}[name](x))
        return x.mean((2, 3))


@pytest.mark.parametrize("name", ["a", "b", "a.0", "b.1", "act", "same"])
def test_one_object_under_two_names_is_read_or_refused(name: str) -> None:
    once = FeatureCapture(Twice("b"), intermediate=name, layout="NCHW")(image())
    assert once.intermediate[0].shape == (2, 3, 8, 8)
    twice = FeatureCapture(Twice("ab"), intermediate=name, layout="NCHW")
    with pytest.raises(RuntimeError, match=rf"'{name}' is the same object as.*name another layer"):
        twice(image())


def test_one_object_under_one_name_that_runs_twice_gives_its_last_output() -> None:
    net = Twice("ab")
    del net.b, net.same
    net.b = lambda x: net.a(x)
    feats = FeatureCapture(net, intermediate="a")(image())
    want = net.a(net.act(net.a(image())))
    torch.testing.assert_close(feats.intermediate[0], want)


def test_an_object_twice_in_one_chain() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Sequential(act, nn.Conv2d(3, 4, 3), act), nn.Flatten(2))
    feats = FeatureCapture(net, intermediate="0")(image())
    torch.testing.assert_close(feats.intermediate[0], net[0](image()))
    with pytest.raises(RuntimeError, match=r"'0\.0' is the same object as '0\.2'"):
        FeatureCapture(net, intermediate="0.0")(image())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.stage = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.fc = nn.Linear(8, 5)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        if self.recompute:
            x = checkpoint_sequential(self.stage, 1, x, use_reentrant=False)
        else:
            x = self.stage(x)
        return self.fc(x.mean((2, 3)))


class Adapted(nn.Module):
    """A low-rank adapter around a frozen layer, which still runs."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2)
        self.up = nn.Linear(2, base.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def qat(net: Net) -> None:
    net.train().qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(net, inplace=True)


def fused(net: Net) -> None:
    quantization.fuse_modules(net.eval(), [["conv", "bn"]], inplace=True)


def pruned_to_fewer(net: Net) -> None:
    net.conv = nn.Conv2d(3, 8, 3)


def new_head(net: Net) -> None:
    net.fc = nn.Linear(8, 3)


def adapter(net: Net) -> None:
    net.fc = Adapted(net.fc)


def new_part_of_a_recomputed_chain(net: Net) -> None:
    net.stage[1] = nn.GELU()
    net.recompute = True


def longer_recomputed_chain(net: Net) -> None:
    net.stage.append(nn.BatchNorm2d(8))
    net.recompute = True


def removed(net: Net) -> None:
    net.fc = None
    net.forward = lambda x: net.stage(net.conv(x)).mean((2, 3))


OPTIONS = {"conv": "intermediate", "stage": "intermediate", "fc": "logits"}


@pytest.mark.parametrize(
    ("swap", "name"),
    [
        (qat, "conv"),
        (fused, "conv"),
        (pruned_to_fewer, "conv"),
        (new_head, "fc"),
        (adapter, "fc"),
        (removed, "fc"),
        (new_part_of_a_recomputed_chain, "stage"),
        (longer_recomputed_chain, "stage"),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_that_was_replaced_is_named(swap: Callable[[Net], None], name: str) -> None:
    net = Net()
    options = {OPTIONS[name]: name}
    capture = FeatureCapture(net, **options)
    capture(image())
    swap(net)
    with pytest.raises(RuntimeError, match=rf"'{name}' was replaced.*after the swap"):
        capture(image())
    if swap is not removed:
        feats = FeatureCapture(net, **options)(image())
        assert feats.logits is not None


def test_a_replaced_layer_that_was_not_named_is_told_with_the_field() -> None:
    net = Net()
    net.get_classifier = lambda: net.fc  # as timm's models do
    capture = FeatureCapture(net)
    assert capture(image()).embedding.shape == (2, 8)
    new_head(net)
    feats = capture(image())
    assert feats.embedding is None
    assert "'fc' was replaced" in feats.absent["embedding"]


def compiled_part(net: Net) -> None:
    net.stage = torch.compile(net.stage, backend="aot_eager")


def compiled_in_place(net: Net) -> None:
    net.stage.compile(backend="aot_eager")


def checkpointed(net: Net) -> None:
    net.stage = checkpoint_wrapper(net.stage)


def pruned(net: Net) -> None:
    prune.l1_unstructured(net.stage[0], "weight", 0.5)


def weight_norm(net: Net) -> None:
    parametrizations.weight_norm(net.stage[0])


def new_neighbour(net: Net) -> None:
    net.stage[1] = nn.GELU()


@pytest.mark.parametrize("first", [True, False], ids=["capture-first", "capture-after"])
@pytest.mark.parametrize(
    "change",
    [compiled_part, compiled_in_place, checkpointed, pruned, weight_norm, new_neighbour],
)
def test_what_keeps_a_layer_in_its_place_is_no_replacement(
    change: Callable[[Net], None], first: bool
) -> None:
    torch.compiler.reset()
    net = Net().eval()
    if not first:
        change(net)
    capture = FeatureCapture(net, intermediate="stage")
    if first:
        capture(image())
        change(net)
    for _ in range(2):
        got = capture(image()).intermediate[0]
        torch.testing.assert_close(got, net.stage(net.bn(net.conv(image()))))
    got.sum().backward()
    assert any(p.grad is not None for p in net.conv.parameters())


def test_a_layer_inside_a_part_that_was_compiled_and_run_before_is_read() -> None:
    torch.compiler.reset()
    net = Net().eval()
    compiled_in_place(net)
    net(image())
    feats = FeatureCapture(net, intermediate="stage.0")(image())
    assert feats.intermediate[0].shape == (2, 8, 4, 4)


def test_a_distiller_says_that_its_students_layer_was_replaced() -> None:
    student = Net()
    distiller = structkd.Distiller(
        student, Net(), structkd.CORALLoss(), layers={"embedding": "fc:input"}
    )
    new_head(student)
    with pytest.raises(RuntimeError, match="Distiller"):
        distiller(image(), x_teacher=image())
