"""Two processes compute what one process computes on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import structkd
from structkd import Criterion, FeatureCapture, Features
from structkd.distributed import average_gradients, broadcast_state, gather_batch, world_size
from tests.cases.case import shaped
from tests.devices import DEVICES
from tests.processes import start

WORLD, BATCH = 2, 8
# How many of the samples rank 0 takes.
SHARES = {"even": 4, "uneven": 5}
# Only the first rows have labels: with uneven shares, rank 1 has none.
TARGET = torch.tensor([0, -100, 1, 2, 3, -100, -100, -100])


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3, padding=1)
        self.fc = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer(x).relu().mean((2, 3)))


def _crd() -> Criterion:
    return structkd.ContrastiveRepresentationLoss(BATCH, embedding_dim=4, negatives=3, gather=True)


CRITERIA: dict[str, Callable[[], Criterion]] = {
    "ds-measured": lambda: structkd.DSLoss(gather=True),
    "ds-printed": lambda: structkd.DSLoss(variant="printed", gather=True),
    "sem-linear": lambda: structkd.CrossCorrelationLoss(
        student_projector=nn.Linear(5, 6), gather=True
    ),
    "sem-mlp": lambda: structkd.CrossCorrelationLoss(
        student_projector=structkd.Projector(6), gather=True
    ),
    "dcm": lambda: structkd.UniformityCalibrationLoss(gather=True),
    "coral": lambda: structkd.CORALLoss(gather=True),
    "rkd": lambda: structkd.RelationalLoss(gather=True),
    "srm": lambda: structkd.SupervisionLoss(gather=True),
    "ds-srm": lambda: structkd.DSLoss(srm=True, gather=True),
    "dkd": lambda: structkd.DKDLoss(gather=True),
    "crd": _crd,
}
# Its heads see their own rank's samples only: their gradients are the mean's, which DDP takes.
ONLY_WRAPPED = ("crd",)


def _shares(device: str) -> list[str]:
    """On a card the ranks must agree, and its own assertion ends the process if they do not."""
    return ["even"] if device == "cuda" else list(SHARES)


def _setup(
    name: str, device: str | torch.device = "cpu"
) -> tuple[Net, Net, Criterion, Tensor, Tensor]:
    torch.manual_seed(0)
    student, teacher = Net(5).double(), Net(6).double()
    criterion = shaped(CRITERIA[name]().double(), _example(5), _example(6))
    images = torch.randn(BATCH, 3, 4, 4, dtype=torch.float64).to(device)
    modules = (module.to(device) for module in (student, teacher, criterion))
    return *modules, images, TARGET.to(device)


def _example(width: int) -> Features:
    """What gives a criterion its shape, with nothing in it and in one process."""
    maps = torch.ones(BATCH, width, 4, 4, dtype=torch.float64)
    return Features(
        logits=maps[:, :4, 0, 0],
        embedding=maps.mean((2, 3)),
        intermediate=maps,
        index=torch.arange(BATCH),
    )


def _run(
    name: str, student: nn.Module, teacher: Net, criterion: nn.Module, rows: slice
) -> tuple[Tensor, dict[str, Tensor]]:
    device = teacher.fc.weight.device
    _, _, _, images, target = _setup(name, device)
    feats_s = FeatureCapture(student, intermediate="layer", embedding="fc:input")(images[rows])
    feats_s = feats_s.replace(index=torch.arange(BATCH, device=device)[rows])
    with torch.no_grad():
        feats_t = FeatureCapture(teacher, intermediate="layer", embedding="fc:input")(images[rows])
    loss = criterion(feats_s, feats_t, target[rows])
    # DDP averages only once every parameter has a gradient: the cross-entropy reaches them all.
    (loss + 0 * feats_s.logits.sum()).backward()
    if not isinstance(criterion, DistributedDataParallel):
        average_gradients(criterion)  # its own parameters, which nobody averages otherwise
    grads = {
        f"{part}.{key.removeprefix('module.')}": parameter.grad
        for part, module in (("student", student), ("criterion", criterion))
        for key, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return loss.detach(), grads


def _rows(rank: int, share: str) -> slice:
    cut = SHARES[share]
    return slice(0, cut) if rank == 0 else slice(cut, BATCH)


def _worker(rank: int, names: list[str], device: str, out: str) -> None:
    results = {}
    for name in names:
        for wrapped in (False, True):
            for share in _shares(device):
                student, teacher, criterion, _, _ = _setup(name, device)
                ddp = DistributedDataParallel(student)
                trains = any(p.requires_grad for p in criterion.parameters())
                module = DistributedDataParallel(criterion) if wrapped and trains else criterion
                found = _run(name, ddp, teacher, module, _rows(rank, share))
                results[name, wrapped, share] = found
    if rank == 0:
        torch.save(list(results.items()), out)


@pytest.fixture(scope="module", params=DEVICES)
def distributed(request, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("ddp")
    out, device = folder / "results.pt", request.param
    start(_worker, folder, WORLD, list(CRITERIA), device, str(out), device=device)
    return dict(torch.load(out, weights_only=True, map_location="cpu"))


@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("wrapped", [False, True], ids=["criterion-bare", "criterion-ddp"])
@pytest.mark.parametrize("name", list(CRITERIA))
def test_value_and_gradient_equal_the_single_process(distributed, name, wrapped, share) -> None:
    if (name, wrapped, share) not in distributed:
        pytest.skip("on a card all ranks must hold as many samples")
    student, teacher, criterion, _, _ = _setup(name)
    value, grads = _run(name, student, teacher, criterion, slice(None))
    shared_value, shared_grads = distributed[name, wrapped, share]
    torch.testing.assert_close(shared_value, value)
    assert shared_grads.keys() == grads.keys()
    for key, want in grads.items():
        if key.startswith("criterion") and name in ONLY_WRAPPED and not wrapped:
            continue
        torch.testing.assert_close(shared_grads[key], want, msg=lambda m, k=key: f"{k}: {m}")


def _gather_worker(rank: int, out: str) -> None:
    mine = torch.arange(BATCH * 3.0).view(BATCH, 3)[_rows(rank, "uneven")].requires_grad_()
    whole = gather_batch(mine)
    weight = torch.arange(BATCH * 3.0).view(BATCH, 3)
    (weight * whole).sum().backward()
    index = gather_batch(torch.arange(BATCH)[_rows(rank, "uneven")])
    torch.save([whole.detach(), index, mine.grad], f"{out}{rank}")


def test_uneven_shards_come_together_with_their_gradients(tmp_path) -> None:
    start(_gather_worker, tmp_path, WORLD, str(tmp_path / "out"))
    everything = torch.arange(BATCH * 3.0).view(BATCH, 3)
    for rank in range(WORLD):
        whole, index, grad = torch.load(tmp_path / f"out{rank}", weights_only=True)
        torch.testing.assert_close(whole, everything)
        assert index.tolist() == list(range(BATCH))
        # Both ranks ask for it, and the mean over ranks halves that.
        torch.testing.assert_close(grad / WORLD, everything[_rows(rank, "uneven")])


def _training() -> tuple[Net, Criterion]:
    student = Net(5).double()
    criterion = _crd() + structkd.SupervisionLoss(gather=True) + 0.5 * structkd.DSLoss(gather=True)
    return student, shaped(criterion.double(), _example(5), _example(6))


def _train(
    student: nn.Module, criterion: nn.Module, rows: slice, after: Callable[[], None] | None = None
) -> dict[str, Tensor]:
    device = next(student.parameters()).device
    _, teacher, _, images, target = _setup("srm", device)
    trained = [*student.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    capture = FeatureCapture(student, intermediate="layer", embedding="fc:input")
    with torch.no_grad():
        feats_t = FeatureCapture(teacher, intermediate="layer", embedding="fc:input")(images[rows])
    for _ in range(3):
        optimizer.zero_grad()
        student(images[rows])
        feats_s = capture.read().replace(index=torch.arange(BATCH, device=device)[rows])
        criterion(feats_s, feats_t, target[rows]).backward()
        if after is not None:
            after()
        optimizer.step()
    state = {**student.state_dict(), **criterion.state_dict()}
    return {
        name.removeprefix("module."): value
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _training_worker(rank: int, device: str, out: str) -> None:
    for share in _shares(device):
        for how in ("ddp", "by hand"):
            torch.manual_seed(1 + rank)  # the ranks start apart
            student, criterion = (module.to(device) for module in _training())
            rows = _rows(rank, share)
            if how == "ddp":
                wrapped = DistributedDataParallel(student), DistributedDataParallel(criterion)
                state = _train(*wrapped, rows)
            else:
                both = nn.ModuleList([student, criterion])
                broadcast_state(both)
                state = _train(student, criterion, rows, lambda m=both: average_gradients(m))
            torch.save(state, f"{out}-{share}-{how}-{rank}")


@pytest.mark.parametrize("device", DEVICES)
def test_loops_with_and_without_ddp_train_as_one_process_does(tmp_path, device: str) -> None:
    """Parameters and, on all ranks, the banks of contrastive distillation."""
    out = tmp_path / "state"
    start(_training_worker, tmp_path, WORLD, device, str(out), device=device)
    torch.manual_seed(1)
    wanted = _train(*_training(), slice(None))
    banks = [name for name in wanted if "bank_" in name]
    assert len(banks) == 2
    for share in _shares(device):
        for how in ("ddp", "by hand"):
            for rank in range(WORLD):
                saved = f"{out}-{share}-{how}-{rank}"
                state = torch.load(saved, weights_only=True, map_location="cpu")
                assert state.keys() == wanted.keys()
                for name, want in wanted.items():
                    torch.testing.assert_close(
                        state[name],
                        want,
                        rtol=1e-9,
                        atol=1e-11,
                        msg=lambda m, n=name, h=how, s=share: f"{n}, {h}, {s}: {m}",
                    )


def _small_batch_worker(rank: int, out: str) -> None:
    criterion = structkd.CORALLoss(gather=True)
    feats = Features(embedding=torch.full((1, 3), float(rank)))
    value = criterion(feats, Features(embedding=torch.zeros(1, 3)))
    if rank == 0:
        Path(out).write_text(str(float(value)))


def test_one_sample_a_process_is_enough_where_the_whole_batch_counts(tmp_path) -> None:
    out = tmp_path / "value"
    start(_small_batch_worker, tmp_path, WORLD, str(out))
    # Rows (0, 0, 0) and (1, 1, 1): every covariance entry is 1/2, and 9 * (1/2)^2 / (4 * 9) = 1/16.
    assert float(out.read_text()) == pytest.approx(1 / 16)


def test_one_process_gathers_nothing() -> None:
    shard = torch.ones(2, 3, requires_grad=True)
    assert world_size() == 1
    assert gather_batch(shard) is shard


def test_what_has_no_shape_yet_cannot_be_broadcast(monkeypatch) -> None:
    monkeypatch.setattr("structkd.distributed.world_size", lambda: 2)
    with pytest.raises(RuntimeError, match=r"DSLoss has parameters without a shape.*example=x"):
        broadcast_state(structkd.DSLoss())


def _bare_capture_worker(rank: int, out: str) -> None:
    net = Net(5)
    capture = FeatureCapture(net, embedding="fc:input")
    said = ""
    try:
        capture(torch.randn(2, 3, 4, 4))
    except RuntimeError as error:
        said = str(error)
    ddp = DistributedDataParallel(net)
    ddp(torch.randn(2, 3, 4, 4))
    read = capture.read().embedding.shape  # the wrapped one called, then read
    with torch.no_grad():
        frozen = capture(torch.randn(2, 3, 4, 4)).embedding.shape  # nothing to average
    wrapped = FeatureCapture(ddp, embedding="fc:input")(torch.randn(2, 3, 4, 4)).embedding.shape
    compiled = FeatureCapture(torch.compile(ddp, backend="eager"), embedding="fc:input")
    within = compiled(torch.randn(2, 3, 4, 4)).embedding.shape  # DDP averages under the compiler's
    if rank == 0:
        torch.save([said, list(read), list(frozen), list(wrapped), list(within)], out)


def test_calling_the_bare_network_under_several_processes_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    start(_bare_capture_worker, tmp_path, WORLD, str(out))
    said, *shapes = torch.load(out, weights_only=True)
    assert "gradients are not averaged" in said
    assert "FeatureCapture(ddp)" in said
    assert shapes == [[2, 5]] * 4
