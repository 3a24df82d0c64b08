"""Cases of the criteria on intermediate maps: FitNets, AT, NST, VID."""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.maps import AttentionTransferLoss, NeuronSelectivityLoss
from structkd.criteria.regression import FitNetLoss, VariationalInformationLoss
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import maps


def _shapes(rng: torch.Generator, kind: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of a student's and a teacher's features, without the batch."""
    width_s, width_t = pick(rng, 1, 4), pick(rng, 1, 4)
    if kind == "rows":
        return (width_s,), (width_t,)
    if kind == "tokens":
        count = pick(rng, 2, 4)
        return (count, width_s), (count, width_t)
    height, width = pick(rng, 1, 4), pick(rng, 2, 4)
    return (width_s, height, width), (width_t, pick(rng, 1, 4), pick(rng, 2, 4))


def _regression(build, oracle, kind: str):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        shape_s, shape_t = _shapes(rng, kind)
        torch.manual_seed(seed)
        student = Features(intermediate=normal(rng, batch, *shape_s))
        teacher = Features(intermediate=normal(rng, batch, *shape_t))
        return Example(build(student, teacher), student, teacher)

    def definition(example: Example) -> Tensor:
        maps_s = maps.tokens_to_map(example.student.intermediate[0])
        maps_t = maps.tokens_to_map(example.teacher.intermediate[0])
        return oracle(example.criterion, *maps.common_size(maps_s, maps_t))

    return make, ("intermediate",), definition


def _fitnet(kind: str, distance=maps.mean_square, **options: object):
    def oracle(criterion: FitNetLoss, map_s: Tensor, map_t: Tensor) -> Tensor:
        conv = criterion.regressor.conv
        return distance(maps.convolve(map_s, conv.weight, conv.bias), map_t)

    def build(student: Features, teacher: Features) -> FitNetLoss:
        return shaped(FitNetLoss(**options), student, teacher)

    return _regression(build, oracle, kind)


def _vid(kind: str):
    def oracle(criterion: VariationalInformationLoss, map_s: Tensor, map_t: Tensor) -> Tensor:
        hidden, gaussian = map_s, criterion.gaussian
        for layer in (0, 2):
            hidden = maps.convolve(hidden, gaussian.mean[layer].weight).clamp(min=0)
        mean = maps.convolve(hidden, gaussian.mean[4].weight)
        return maps.gaussian_code_length(mean, gaussian.rho, map_t)

    def build(student: Features, teacher: Features) -> VariationalInformationLoss:
        criterion = shaped(VariationalInformationLoss(init_variance=0.7), student, teacher)
        with torch.no_grad():
            criterion.gaussian.rho += torch.linspace(-1, 1, len(criterion.gaussian.rho))
        return criterion

    return _regression(build, oracle, kind)


def _pairs(criterion, oracle, *kinds: str, widen: int = 0, enlarge: int = 0):
    """Several pairs of maps; ``widen`` adds channels to both, ``enlarge`` height and width."""

    def grow(shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) == 2:
            return shape[0], shape[1] + widen
        return shape[0] + widen, *(side + enlarge for side in shape[1:])

    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        shapes = [_shapes(rng, kind) for kind in kinds]
        student = [normal(rng, batch, *grow(shape_s)) for shape_s, _ in shapes]
        teacher = [normal(rng, batch, *grow(shape_t)) for _, shape_t in shapes]
        return Example(criterion(), Features(intermediate=student), Features(intermediate=teacher))

    def definition(example: Example) -> Tensor:
        return sum(
            oracle(maps.tokens_to_map(map_s), maps.tokens_to_map(map_t))
            for map_s, map_t in zip(
                example.student.intermediate, example.teacher.intermediate, strict=True
            )
        )

    return make, ("intermediate",), definition


def _zero_fitnet(seed: int) -> Example:
    feats = Features(intermediate=normal(generator(seed), 4, 3, 2, 2))
    criterion = shaped(FitNetLoss(), feats, feats)
    torch.nn.init.dirac_(criterion.regressor.conv.weight)
    torch.nn.init.zeros_(criterion.regressor.conv.bias)
    return Example(criterion, feats, feats)


def _zero_attention(seed: int) -> Example:
    value = normal(generator(seed), 4, 3, 2, 2)
    return Example(
        AttentionTransferLoss(),
        Features(intermediate=3 * value),
        Features(intermediate=-value),
    )


def _zero_selectivity(size: int):
    def zero(seed: int) -> Example:
        # The order, sign and length of the channels do not matter.
        value = normal(generator(seed), 4, 3, size, size)
        mixed = value[:, [2, 0, 1]] * torch.tensor([3.0, -0.5, 1.0]).view(3, 1, 1)
        return Example(
            NeuronSelectivityLoss(), Features(intermediate=mixed), Features(intermediate=value)
        )

    return zero


def _cube(map_s: Tensor, map_t: Tensor) -> Tensor:
    return maps.attention_transfer(map_s, map_t, 3.0)


CASES = [
    Case("fitnet-maps", *_fitnet("maps"), zero=_zero_fitnet),
    Case("fitnet-3x3", *_fitnet("maps", kernel_size=3)),
    Case("fitnet-tokens", *_fitnet("tokens")),
    Case("fitnet-rows", *_fitnet("rows")),
    Case("fitnet-log", *_fitnet("maps", maps.log_share, form="log", kernel_size=3)),
    Case("fitnet-log-tokens", *_fitnet("tokens", maps.log_share, form="log")),
    # One position a sample: a batch of one would have no variance.
    Case("fitnet-log-rows", *_fitnet("rows", maps.log_share, form="log"), min_batch=2),
    Case("vid-maps", *_vid("maps")),
    Case("vid-tokens", *_vid("tokens")),
    Case("vid-rows", *_vid("rows")),
    Case(
        "at-maps",
        *_pairs(AttentionTransferLoss, maps.attention_transfer, "maps", "maps"),
        zero=_zero_attention,
    ),
    Case(
        "at-cube-tokens",
        *_pairs(lambda: AttentionTransferLoss(p=3), _cube, "tokens", "maps"),
    ),
    # Up to 16 positions under at least 9 channels: position Grams.
    Case(
        "nst-positions",
        *_pairs(NeuronSelectivityLoss, maps.neuron_selectivity, "maps", "tokens", widen=8),
        zero=_zero_selectivity(2),
    ),
    # At least 12 positions above up to 4 channels: channel Grams.
    Case(
        "nst-channels",
        *_pairs(NeuronSelectivityLoss, maps.neuron_selectivity, "maps", "maps", enlarge=2),
        zero=_zero_selectivity(5),
    ),
]
