"""Criteria, what they are compared with, and the shapes they are compared on.

A peer is made of the criterion beside it, whose parameters it takes, and has the same signature:
(student, teacher, target) -> loss. Those without a package are written from the papers in the form
of the CRD benchmark's code. An ImportError says that a package is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import structkd
from structkd import Criterion, Features

Loss = Callable[[Any, Any, Any], Tensor]
CLASSES, DATASET = 10, 50_000
# What the axes of each kind of input are, and its three sizes. Maps: ResNets' stages.
AXES = {
    "logits": ("B", "K"),
    "pixels": ("B", "K", "H"),
    "rows": ("B", "D"),
    "map": ("B", "C_s", "C_t", "H"),
    "flow": ("B", "C_s", "C_t", "H"),
    "both": ("B", "C_s", "C_t", "H"),
}
SIZES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "logits": {"small": (64, 10), "usual": (256, 100), "large": (256, 1000)},
    "pixels": {"small": (4, 8, 32), "usual": (4, 8, 128), "large": (4, 19, 256)},
    "rows": {"small": (32, 64), "usual": (128, 512), "large": (256, 2048)},
    "map": {"small": (64, 16, 16, 8), "usual": (64, 64, 128, 8), "large": (64, 128, 256, 16)},
    "flow": {"small": (64, 16, 16, 8), "usual": (64, 64, 64, 8), "large": (64, 128, 128, 16)},
    "both": {"small": (64, 16, 16, 8), "usual": (64, 64, 128, 8), "large": (64, 128, 256, 16)},
}


@dataclass
class Case:
    """A criterion and its peers: how each is made and how near its answer is (None: another)."""

    kind: str
    make: Callable[[], Criterion]
    peers: Mapping[str, tuple[Callable[[Any], Loss], float | None]]
    sizes: Mapping[str, tuple[int, ...]]


def inputs(
    kind: str, size: tuple[int, ...], device: str, dtype: torch.dtype, channels_last: bool
) -> tuple[Any, ...]:
    """Returns what student and teacher say, which have something in common, and the labels."""
    torch.manual_seed(0)

    def pair(*shapes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        first, second = (torch.randn(shape, device=device) for shape in shapes)
        second[:, : first.shape[1]] += first[:, : second.shape[1]]
        if channels_last and first.dim() == 4:
            first, second = (v.to(memory_format=torch.channels_last) for v in (first, second))
        return first.to(dtype).requires_grad_(), second.to(dtype)

    def labels(*shape: int) -> Tensor:
        return torch.randint(size[1] if kind in ("logits", "pixels") else CLASSES, shape).to(device)

    if kind in ("logits", "rows"):
        return *pair(size, size), labels(size[0])
    if kind == "pixels":
        shape = (*size, size[2])
        return *pair(shape, shape), labels(size[0], size[2], size[2])
    batch, width_s, width_t, side = size
    shapes = (batch, width_s, side, side), (batch, width_t, side, side)
    if kind in ("map", "both"):
        return *pair(*shapes), labels(batch)
    pairs = [pair(*shapes) for _ in range(2)]
    return [s for s, _ in pairs], [t for _, t in pairs], labels(batch)


def features(kind: str, value: Any) -> Features:
    """Returns what a network gave, under the name that criteria read."""
    index = torch.arange(len(value if isinstance(value, Tensor) else value[0]))
    if kind in ("logits", "pixels"):
        return Features(logits=value, index=index.to(value.device))
    if kind == "rows":
        return Features(embedding=value, index=index.to(value.device))
    if kind == "both":
        embedding = value.detach().mean((2, 3)).requires_grad_(value.requires_grad)
        return Features(intermediate=value, embedding=embedding)
    return Features(intermediate=value)


def usual_kd(_: Any, temperature: float | Tensor = 4.0) -> Loss:
    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        if s.dim() == 4:
            s, t = (value.movedim(1, -1).flatten(0, 2) for value in (s, t))
        log_s, share = F.log_softmax(s / temperature, 1), F.softmax(t / temperature, 1)
        return F.kl_div(log_s, share, reduction="batchmean") * temperature**2

    return loss


def learned_kd(_: Any) -> Loss:
    """The published curriculum: its temperature is trained through both softmaxes."""
    raw = torch.ones(1, requires_grad=True)

    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        raw.grad = None
        return usual_kd(None, 1 + 20 * raw.to(s.device).sigmoid())(s, t, _).squeeze()

    return loss


def torchdistill(kind: str, factor: float = 1.0, **options: Any) -> Callable[[Any], Loss]:
    """One of torchdistill's, which read dicts of modules' inputs and outputs."""

    def made(_: Any) -> Loss:
        from torchdistill.losses import mid_level

        loss = getattr(mid_level, kind)(**options)
        return lambda s, t, _: factor * loss({"a": {"output": s}}, {"a": {"output": t}})

    return made


# Where they find what the dicts hold. Without labels they leave the temperature's square out.
_SCORES = {
    **{f"{side}_module_path": "a" for side in ("student", "teacher")},
    **{f"{side}_module_io": "output" for side in ("student", "teacher")},
    "alpha": 0.0,
}
_MAPS = {"a": {side: {"path": "a", "io": "output"} for side in ("student", "teacher")}}
_CC = {
    **{f"{side}_linear_path": "a" for side in ("student", "teacher")},
    "kernel_config": {"type": "gaussian", "gamma": 0.4, "max_p": 2},
    "reduction": "batchmean",
}
_RKD = {
    **{f"{side}_output_path": "a" for side in ("student", "teacher")},
    **{"dist_factor": 25.0, "angle_factor": 50.0, "reduction": "mean"},
}


def published_dkd(criterion: Any) -> Loss:
    tau = 4.0

    def loss(s: Tensor, t: Tensor, target: Tensor) -> Tensor:
        own = F.one_hot(target, s.shape[1]).bool()
        p_s, p_t = F.softmax(s / tau, 1), F.softmax(t / tau, 1)
        two_s, two_t = (torch.stack([(p * own).sum(1), (p * ~own).sum(1)], 1) for p in (p_s, p_t))
        binary = F.kl_div(two_s.log(), two_t, reduction="batchmean") * tau**2
        others = F.kl_div(
            F.log_softmax(s / tau - 1000.0 * own, 1),
            F.softmax(t / tau - 1000.0 * own, 1),
            reduction="batchmean",
        )
        return criterion.alpha * binary + criterion.beta * others * tau**2

    return loss


def attention(_: Any) -> Loss:
    def at(f: Tensor) -> Tensor:
        return F.normalize(f.pow(2).mean(1).view(len(f), -1))

    return lambda s, t, _: (at(s) - at(t)).pow(2).mean()


def selectivity(_: Any) -> Loss:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a.unsqueeze(1) * b.unsqueeze(2)).sum(-1).pow(2)

    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        s, t = (F.normalize(f.flatten(2), dim=2) for f in (s, t))
        return kernel(t, t).mean() + kernel(s, s).mean() - 2 * kernel(s, t).mean()

    return loss


def regressor(criterion: Any) -> Loss:
    """FitNets: a 1x1 convolution, FitNetLoss's own where it is that, and the squared error."""
    conv = getattr(getattr(criterion, "regressor", None), "conv", None) or nn.LazyConv2d(0, 1)

    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        if isinstance(conv, nn.LazyConv2d):
            conv.out_channels = t.shape[1]
            conv.to(s.device)
        conv.zero_grad()
        return F.mse_loss(conv(s.float()), t.float())

    return loss


def variational(criterion: Any) -> Loss:
    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        mean = criterion.gaussian.mean(s.float())
        variance = F.softplus(criterion.gaussian.rho) + 1e-5
        variance = variance.view(1, -1, 1, 1)
        return torch.mean(0.5 * ((mean - t.float()) ** 2 / variance + torch.log(variance)))

    return loss


def flows(_: Any) -> Loss:
    def matrix(f: Any) -> Tensor:
        first, second = (value.flatten(2) for value in f)
        return (first.unsqueeze(2) * second.unsqueeze(1)).mean(-1)

    return lambda s, t, _: (matrix(s) - matrix(t)).pow(2).mean()


def relational(_: Any) -> Loss:
    def pairwise(e: Tensor) -> Tensor:
        square = e.pow(2).sum(1)
        found = (square[:, None] + square - 2 * e @ e.t()).clamp(min=1e-12).sqrt().clone()
        found[range(len(e)), range(len(e))] = 0
        return found / found[found > 0].mean()

    def angles(e: Tensor) -> Tensor:
        unit = F.normalize(e.unsqueeze(0) - e.unsqueeze(1), p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        distance = F.smooth_l1_loss(pairwise(s), pairwise(t))
        return 25 * distance + 50 * F.smooth_l1_loss(angles(s), angles(t))

    return loss


def distances(_: Any) -> Loss:
    def scaled(e: Tensor) -> Tensor:
        found = torch.pdist(e)
        return found / found.mean()

    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        gap = F.smooth_l1_loss(scaled(s), scaled(t))  # of each pair once, of none with itself
        return 25 * gap * (len(s) - 1) / len(s)

    return loss


def metric_learning(_: Any) -> Loss:
    from pytorch_metric_learning.distances import LpDistance

    distance = LpDistance(normalize_embeddings=False)

    def scaled(e: Tensor) -> Tensor:
        found = distance(e)
        return found / (found.sum() / (len(e) * (len(e) - 1)))

    return lambda s, t, _: 25 * F.smooth_l1_loss(scaled(s), scaled(t))


def twins(criterion: Any) -> Loss:
    from lightly.loss import BarlowTwinsLoss

    loss = BarlowTwinsLoss(lambda_param=criterion.lambd)
    return lambda s, t, _: loss(s, t)


def vicreg(_: Any) -> Loss:
    from lightly.loss import VICRegLoss

    loss = VICRegLoss()
    return lambda s, t, _: loss(s, t)


def covariances(_: Any) -> Loss:
    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        return (s.T.cov() - t.T.cov()).square().sum() / (4 * s.shape[1] ** 2)

    return loss


def congruence(criterion: Any) -> Loss:
    peer = torchdistill("CCKDLoss", **_CC)(criterion)
    heads = criterion.student_embedding, criterion.teacher_embedding
    return lambda s, t, _: peer(*(F.normalize(h(v)) for h, v in zip(heads, (s, t), strict=True)), _)


def channel_wise(_: Any) -> Loss:
    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        share = F.softmax(t.view(-1, t.shape[2] * t.shape[3]) / 4.0, dim=1)
        log = F.log_softmax(s.view(-1, s.shape[2] * s.shape[3]) / 4.0, dim=1)
        return F.kl_div(log, share, reduction="sum") * 16.0 / (s.shape[0] * s.shape[1])

    return loss


def contrastive(criterion: Any) -> Loss:
    """The memory of RepDistiller: rows are gathered for every sample, (B, K + 1, 128)."""
    heads, tau = (criterion.head_s, criterion.head_t), criterion.temperature
    banks = [F.normalize(torch.randn(DATASET, 128)) for _ in heads]
    level: list[Tensor] = []
    count = criterion.negatives

    def part(v: Tensor, bank: Tensor, where: Tensor) -> Tensor:
        rows = torch.index_select(bank, 0, where.view(-1)).view(len(v), count + 1, -1)
        out = torch.exp(torch.bmm(rows, v.unsqueeze(2)) / tau)
        if len(level) < 2:
            level.append(out.mean().detach() * DATASET)
        out = out / level[0]
        noise = count / DATASET
        right = torch.log(out[:, 0] / (out[:, 0] + noise + 1e-7))
        wrong = torch.log(noise / (out[:, 1:] + noise + 1e-7))
        return -(right.sum() + wrong.sum()) / len(v)

    def loss(s: Tensor, t: Tensor, _: Any) -> Tensor:
        for index, bank in enumerate(banks):
            banks[index] = bank.to(s.device)
        where = torch.randint(DATASET, (len(s), count + 1), device=s.device)
        where[:, 0] = own = torch.arange(len(s), device=s.device)
        rows = [F.normalize(head(v.float())) for head, v in zip(heads, (s, t), strict=True)]
        value = part(rows[0], banks[1], where) + part(rows[1], banks[0], where)
        with torch.no_grad():
            for bank, row in zip(banks, rows, strict=True):
                bank[own] = F.normalize(0.5 * bank[own] + 0.5 * row)
        return value

    return loss


def soft_dice(_: Any) -> Loss:
    from segmentation_models_pytorch.losses import DiceLoss

    loss = DiceLoss("multiclass", smooth=1.0)
    return lambda s, t, target: loss(s, target)


def cross_entropy(_: Any) -> Loss:
    return lambda s, t, target: F.cross_entropy(s, target)


def _of(function: Callable[..., Tensor]) -> Callable[[Any], Loss]:
    return lambda _: lambda s, t, target: function(s, t)


_WIDE = {
    **SIZES["map"],
    **{"64 to 64": (128, 64, 64, 8), "128 to 128": (128, 128, 128, 8)},
    **{"64 to 256": (32, 64, 256, 28), "512 to 512": (128, 512, 512, 7)},
    **{"512 to 512, few": (32, 512, 512, 7), "512 to 2048, few": (32, 512, 2048, 7)},
}
_DEEP = {**SIZES["rows"], "d = 8192": (128, 8192)}
_TRIPLES = {**SIZES["rows"], "large": (256, 512)}
_BANKS = {"usual": (64, 128), "large": (128, 512)}


def cases() -> dict[str, Case]:
    """Returns the cases by the names of the table."""
    kd = torchdistill("KDLoss", 16.0, temperature=4.0, **_SCORES)
    lskd = torchdistill("LogitStdKDLoss", 4.0, temperature=2.0, **_SCORES)
    at, rkd = torchdistill("ATLoss", at_pairs=_MAPS), torchdistill("RKDLoss", **_RKD)
    ce, td, crd = ("F.cross_entropy", cross_entropy), "torchdistill", "CRD code"
    # Title, kind of input, and for each peer its name, its making and how near its answer is.
    told: list[tuple[Any, ...]] = [
        ("KDLoss", "logits", ("F.kl_div", usual_kd, 1e-4), (td, kd, 1e-4)),
        ("KDLoss, pixels", "pixels", ("F.kl_div", usual_kd, 1e-4), (*ce, None)),
        ("DKDLoss", "logits", ("published", published_dkd, 1e-3)),
        ("LogitStandardizationLoss", "logits", (td, lskd, None)),
        ("LogitMSELoss", "logits", ("F.mse_loss", _of(F.mse_loss), 1e-4)),
        ("CurriculumTemperatureLoss", "logits", ("F.kl_div", learned_kd, None)),
        ("SupervisionLoss", "logits", (*ce, 1e-4)),
        ("SupervisionLoss, pixels", "pixels", (*ce, 1e-4)),
        ("DiceLoss", "pixels", ("smp", soft_dice, None), (*ce, None)),
        ("ChannelWiseLoss", "pixels", ("published", channel_wise, 1e-3)),
        ("AttentionTransferLoss", "map", (crd, attention, 1e-3), (td, at, 1e-3)),
        ("NeuronSelectivityLoss", "map", (crd, selectivity, 1e-2)),
        ("FitNetLoss", "map", ("conv, mse", regressor, 1e-4)),
        ("VariationalInformationLoss", "map", (crd, variational, 1e-4)),
        ("FlowMatrixLoss", "flow", (crd, flows, 1e-3)),
        ("DenseStructureLoss", "map", ("FitNets", regressor, None)),
        ("RelationalLoss", "rows", (crd, relational, 1e-3), (td, rkd, 1e-3)),
        (
            *("RelationalLoss, distances", "rows", ("torch.pdist", distances, 1e-3)),
            ("pytorch-metric-learning", metric_learning, 1e-2),
        ),
        ("CorrelationCongruenceLoss", "rows", (td, congruence, None)),
        ("ContrastiveRepresentationLoss", "rows", (crd, contrastive, None)),
        (
            *("CrossCorrelationLoss", "rows", ("lightly", twins, 3e-2)),
            ("lightly VICReg", vicreg, None),
        ),
        ("CORALLoss", "rows", ("paper", covariances, 1e-3)),
    ]
    options: dict[str, dict[str, Any]] = {
        "RelationalLoss, distances": {"angle_weight": 0.0},
        "ContrastiveRepresentationLoss": {"dataset_size": DATASET, "negatives": 4096},
        "CrossCorrelationLoss": {"projector": "none", "center": True},
    }
    sizes = {
        **{"DenseStructureLoss": _WIDE, "CrossCorrelationLoss": _DEEP, "CORALLoss": _DEEP},
        "NeuronSelectivityLoss": {**SIZES["map"], "large": (64, 128, 128, 8)},
        **{"RelationalLoss": _TRIPLES, "ContrastiveRepresentationLoss": _BANKS},
    }
    # Those without a peer: their time, growth and memory stand in the JSON file alone.
    kinds = {"logits": "logits", "embedding": "rows", "intermediate": "map"}
    for name, criterion in structkd.criteria.CRITERIA.items():
        if not any(title.split(",")[0] == name for title, *_ in told):
            reads = structkd.criteria.base.fields_read(criterion())
            told.append((name, kinds[reads[0]] if len(reads) == 1 else "both"))
    return {
        title: Case(
            kind,
            partial(structkd.criteria.CRITERIA[title.split(",")[0]], **options.get(title, {})),
            {peer: (make, tolerance) for peer, make, tolerance in peers},
            sizes.get(title, SIZES[kind]),
        )
        for title, kind, *peers in told
    }
