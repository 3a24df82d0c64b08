"""Cases of the adversarial criteria.

The value holds the discriminator's loss on detached students, so its gradient is not the value's;
tests/criteria/test_adversarial.py compares the gradients of both players.
"""

from __future__ import annotations

import torch
from torch import Tensor

from structkd import Features
from structkd.criteria.adversarial import AdversarialFeatureLoss, AdversarialLogitsLoss
from tests.cases.case import Case, Example, generator, normal, pick, shaped
from tests.reference import adversarial as reference


def alkd(seed: int, batch: int) -> Example:
    rng = generator(seed)
    classes = pick(rng, 1, 5)
    torch.manual_seed(seed)
    criterion = AdversarialLogitsLoss(
        hidden_dim=6, blocks=pick(rng, 0, 2), l1_weight=0.4, adversarial_weight=0.6
    )
    student, teacher = (Features(logits=normal(rng, batch, classes)) for _ in range(2))
    target = torch.randint(0, classes, (batch,), generator=rng)
    return Example(shaped(criterion, student, teacher), student, teacher, target)


def alkd_terms(example: Example) -> dict[str, Tensor]:
    return reference.alkd(
        example.criterion.discriminator,
        example.student.logits,
        example.teacher.logits,
        example.target,
        l1_weight=0.4,
        adversarial_weight=0.6,
    )


def afkd(source: str = "embedding", tokens: bool = False):
    def make(seed: int, batch: int) -> Example:
        rng = generator(seed)
        width_s, width_t = pick(rng, 1, 5), pick(rng, 1, 5)
        torch.manual_seed(seed)
        criterion = AdversarialFeatureLoss(source=source, hidden_dim=6, adversarial_weight=0.6)
        if source == "embedding":
            student = Features(embedding=normal(rng, batch, width_s))
            teacher = Features(embedding=normal(rng, batch, width_t))
        elif tokens:
            student = Features(intermediate=normal(rng, batch, 3, width_s))
            teacher = Features(intermediate=normal(rng, batch, 2, width_t))
        else:
            student = Features(intermediate=normal(rng, batch, width_s, 2, 3))
            teacher = Features(intermediate=normal(rng, batch, width_t, 3, 1))
        return Example(shaped(criterion, student, teacher), student, teacher)

    return make


def _rows(features: Features) -> Tensor:
    if features.embedding is not None:
        return features.embedding
    maps = features.intermediate[0]
    if maps.dim() == 3:
        return torch.stack([sum(token for token in item) / len(item) for item in maps])
    return torch.stack([torch.stack([plane.mean() for plane in item]) for item in maps])


def afkd_terms(example: Example) -> dict[str, Tensor]:
    return reference.afkd(
        example.criterion.adapter.net,
        example.criterion.discriminator,
        _rows(example.student),
        _rows(example.teacher),
        adversarial_weight=0.6,
    )


def _afkd_oracle(example: Example) -> Tensor:
    return sum(afkd_terms(example).values())


CASES = [
    Case("alkd", alkd, ("logits",), lambda e: sum(alkd_terms(e).values()), gradcheck=False),
    Case("afkd-embedding", afkd(), ("embedding",), _afkd_oracle, gradcheck=False),
    Case("afkd-map", afkd("intermediate"), ("intermediate",), _afkd_oracle, gradcheck=False),
    Case(
        "afkd-tokens",
        afkd("intermediate", tokens=True),
        ("intermediate",),
        _afkd_oracle,
        gradcheck=False,
    ),
]
