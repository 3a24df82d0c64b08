"""Distillation methods by name, with published weights; a further one is one entry.

Weights are those of the CRD benchmark (Tian et al., RepDistiller), for cross-entropy at weight 1
plus the criterion, unless an entry says otherwise. Its losses are means over elements, summed over
stages, as the library's are: its numbers hold here unconverted wherever it computes the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, Literal

import structkd
from crossmodal.stages import AdaptedStages, Layers, regressor
from structkd import Features
from structkd.criteria.base import Criterion

Family = Literal["baseline", "logits", "features", "relations", "structure"]


@dataclass(frozen=True)
class Setup:
    """What a criterion may need beyond features: classes, training images, images a step."""

    classes: int
    samples: int
    batch_size: int


Build = Callable[..., Criterion]


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: its name in the paper's tables.
        family: what it reads, as the paper groups its rows.
        build: ``build(feats_s, feats_t, setup, **options) -> Criterion`` from two example forward
            passes; None trains without a teacher.
        supervision: weight of the labels' cross-entropy when the method stands alone.
        weight: weight of the criterion, alone and in a sum.
        layers: ``one`` hands it the last stage but one, ``all`` every stage.
    """

    title: str
    family: Family
    build: Build | None
    supervision: float = 1.0
    weight: float = 1.0
    layers: Layers = "one"


def _plain(criterion: Callable[..., Criterion], **defaults: Any) -> Build:
    """A criterion that needs no sizes."""
    return lambda feats_s, feats_t, setup, **options: criterion(**{**defaults, **options})


def _sized(criterion: Any, **defaults: Any) -> Build:
    """A criterion that takes its sizes from the example features."""

    def build(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
        built: Criterion = criterion.from_features(feats_s, feats_t, **{**defaults, **options})
        return built

    return build


def _fitnets(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    criterion = structkd.FitNetLoss.from_features(feats_s, feats_t, **options)
    criterion.regressor = regressor(criterion.regressor)  # type: ignore[assignment]
    return criterion


def _vid(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    # The criterion reads one map; the benchmark's weight is for the sum over all stages.
    return reduce(
        add,
        (
            structkd.VariationalInformationLoss.from_features(
                feats_s, feats_t, layer=layer, **options
            )
            for layer in range(min(len(feats_s.intermediate), len(feats_t.intermediate)))
        ),
    )


def _crd(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    # The benchmark draws 16384 negatives out of 50,000 images. More draws than images would repeat
    # them at the same cost; the loss's scale is that of the bank, whatever their number.
    negatives = min(16384, setup.samples)
    return structkd.ContrastiveRepresentationLoss.from_features(
        feats_s, feats_t, **{"dataset_size": setup.samples, "negatives": negatives, **options}
    )


def _semckd(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    return structkd.SemanticCalibrationLoss.from_features(
        feats_s, feats_t, **{"batch_size": setup.batch_size, **options}
    )


def _fsp(feats_s: Features, feats_t: Features, setup: Setup, **options: Any) -> Criterion:
    # FSP wants equal channels. The paper's ResNets have them; most pairs of networks do not.
    criterion = structkd.FlowMatrixLoss(**{"flows": "chain", **options})
    return AdaptedStages(criterion, feats_s, feats_t)


METHODS: Mapping[str, Method] = {
    "alone": Method("Baseline-S", "baseline", None),
    "kd": Method(
        "KD", "logits", _plain(structkd.KDLoss, temperature=4.0), supervision=0.1, weight=0.9
    ),
    # No benchmark has ALKD and AFKD. A weight scales the discriminator's steps too, and at 1 it
    # diverges with the students' learning rates.
    "alkd": Method("ALKD", "logits", _sized(structkd.AdversarialLogitsLoss), weight=0.1),
    # DKD, LSKD and CTKD by their own code; DKD's ramp over its first 20 of 240 epochs is left out.
    "dkd": Method("DKD", "logits", _plain(structkd.DKDLoss)),
    "lskd": Method("LSKD", "logits", _plain(structkd.LogitStandardizationLoss), supervision=0.1),
    "ctkd": Method(
        "CTKD", "logits", _sized(structkd.CurriculumTemperatureLoss), supervision=0.1, weight=0.9
    ),
    # The weight of the Knowledge-Distillation-Zoo, which has this mean; Ba & Caruana use no labels.
    "logits": Method("Logits", "logits", _plain(structkd.LogitMSELoss), weight=0.1),
    "fitnets": Method("Fitnets", "features", _fitnets, weight=100),
    "at": Method(
        "AT", "features", _plain(structkd.AttentionTransferLoss), weight=1000, layers="all"
    ),
    # With the student's own part at 1 as well, all its embeddings died on MNIST: 10 % accuracy.
    "afkd": Method(
        "AFKD",
        "features",
        _sized(structkd.AdversarialFeatureLoss, adversarial_weight=0.1),
        weight=0.1,
    ),
    "nst": Method(
        "NST", "features", _plain(structkd.NeuronSelectivityLoss), weight=50, layers="all"
    ),
    "vid": Method("VID", "features", _vid, layers="all"),
    "crd": Method("CRD", "features", _crd, weight=0.8),
    # Its own code has 400 and adds KD (here semckd+kd). At 400 it diverges with learning rate 0.1.
    "semckd": Method("SemCKD", "features", _semckd, weight=40, layers="all"),
    "rkd": Method("RKD", "relations", _plain(structkd.RelationalLoss)),
    # The benchmark trains on FSP before it trains on labels; here both at once.
    "fsp": Method("FSP", "relations", _fsp, weight=50, layers="all"),
    # The benchmark's CC (0.02) compares no kernel matrices: it sums products of neighbouring rows'
    # gaps. The Zoo's is the paper's, a mean over B x B as ours, and takes 100.
    "cc": Method("CC", "relations", _sized(structkd.CorrelationCongruenceLoss), weight=100),
    "vpr": Method("VPR", "relations", _plain(structkd.DistilVPRLoss)),
    "ds": Method("DS", "structure", _sized(structkd.DSLoss)),
}
