"""Which teacher image a student image gets, and what is minimised: an unpaired table's rows.

A row over the bridge mixes in the teacher's images made poor. They are free pairs, with labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from crossmodal.methods import ALONE, METHODS, Options, Plan, resolve
from crossmodal.near import looked_up


@dataclass(frozen=True)
class Variant:
    """One row.

    ``first`` is the first matching: ``none`` trains without a teacher, ``each epoch`` draws in the
    class anew for every epoch, ``random`` once, ``semantic`` is the matcher's (SSM), and ``itself``
    the student's own image in the rich modality, which without pairs only a reference has.
    """

    title: str  # its name in the table; {} is the criterion
    first: str = "semantic"
    dynamic: bool = False  # the student chooses again while it learns (DynM)
    aligned: bool = False  # SKA is added
    planned: bool = False  # matches come from a plan that limits a teacher image's share

    @property
    def matched(self) -> bool:
        """Whether a teacher image stands beside every student image."""
        return self.first != "none"

    @property
    def settings(self) -> dict[str, Any]:
        """What a result depends on."""
        return {k: v for k, v in asdict(self).items() if k != "title"}


# "full without SKA" is the row ssm+dynm.
VARIANTS: Mapping[str, Variant] = {
    "alone": Variant(ALONE, "none"),
    "random": Variant("{} random", "each epoch"),
    "ssm": Variant("{} matching (SSM)"),
    "ssm+dynm": Variant("{} matching + DynM (full without SKA)", dynamic=True),
    "full": Variant("{} full SemBridge", dynamic=True, aligned=True),
    "full-ssm": Variant("{} full without SSM", "random", dynamic=True, aligned=True),
    "full-dynm": Variant("{} full without DynM", aligned=True),
    "planned": Variant("{} full, planned matching", dynamic=True, aligned=True, planned=True),
    "paired": Variant("{} paired (reference)", "itself"),
}
FREE_PAIRS = "dense:weight=5"  # what won over them on validation images, see docs/unpaired.md
BRIDGE = "bridge"  # labels only on the free pairs; bridge+METHOD distils over them
BRIDGES = (BRIDGE, f"{BRIDGE}+{FREE_PAIRS}")  # the rows over it that a table has by default
PAIRS = Variant("{}", "itself")  # what every method of a paired job is


@dataclass(frozen=True)
class Weights:
    """Of cross-entropy, criterion and alignment; the published ones by default."""

    task: float = 0.3
    kd: float = 0.4
    ska: float = 0.3 * 0.01

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value >= 0:
                raise ValueError(f"weight {name} must be at least 0, got {value}; fix: --weights")


def plan(
    variant: Variant, criterion: str, weights: Weights, options: Options | None = None
) -> Plan:
    """What a variant minimises: task * CE + kd * criterion + ska * (L_ot1 + L_ot2).

    The criterion keeps its own weight from the registry inside ``kd``. Where that and the weight
    of the cross-entropy there sum to 1 (``kd``: 0.9 and 0.1), it is a share, which ``weights``
    take the place of. An alignment of weight 0 is left out.
    """
    if variant.first == "none":
        return replace(resolve(ALONE), name=variant.title)
    chosen = resolve(criterion, options)
    if not chosen.parts:
        raise ValueError(f"--criterion must name a criterion, got {criterion!r}")
    if any("supervision" in own for own in chosen.options.values()):
        raise ValueError(f"--criterion {criterion}: supervision is the first of --weights here")
    found = {}
    for name, method in chosen.parts:
        is_share = method.supervision < 1 and abs(method.weight + method.supervision - 1) < 1e-9
        found[name] = weights.kd * (1.0 if is_share else method.weight)
    parts = chosen.parts
    if variant.aligned and weights.ska:
        parts += (("ska", METHODS["ska"]),)
        found["ska"] = weights.ska
    title = variant.title.format(chosen.name)
    return Plan(title, parts, weights.task, chosen.options, found)


def row(name: str, criterion: str, weights: Weights) -> tuple[Variant, Plan]:
    """A row of the table by its name: a variant, ``bridge``, or ``bridge+METHOD``.

    METHOD, which may be a sum, is for the free pairs.

    Raises:
        ValueError: a part of the name is not known.
    """
    bridge, plus, method = name.partition("+")
    if bridge.strip().lower() != BRIDGE:
        variant = looked_up("variant", name, VARIANTS, f", {BRIDGE} and {BRIDGE}+METHOD")
        return variant, plan(variant, criterion, weights)
    made = resolve(method if plus else ALONE)
    if any("supervision" in own for own in made.options.values()):
        raise ValueError(f"row {name!r}: the labels weigh 1 over a bridge; leave supervision out")
    shown = " + ".join([BRIDGE, *([made.name] if plus else [])])
    return VARIANTS[ALONE], replace(made, name=shown, supervision=1.0, bridged=True)
