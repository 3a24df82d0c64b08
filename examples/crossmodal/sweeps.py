"""How DSLoss's defaults were chosen: the candidates of ``sweep.py``, by group."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SEM_ONLY: Mapping[str, Any] = {"dcm_1": False, "dcm_2": False}
DCM_ONLY: Mapping[str, Any] = {"sem_1": False, "sem_2": False}
LINEAR: Mapping[str, Any] = {"projector": "linear", "center": True}
MLP: Mapping[str, Any] = {"projector": "mlp", "projector_dim": 512, "center": True}


def _sem(weight: float, **options: Any) -> dict[str, Any]:
    return {**SEM_ONLY, "gamma": (weight, 0.0), **options}


def _dcm(weight: float, **options: Any) -> dict[str, Any]:
    return {**DCM_ONLY, "gamma": (0.0, weight), **options}


# gamma is given for SEM / d and for DCM; every other option is DSLoss's.
GROUPS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "baselines": {"alone": ("alone", {}), "kd": ("kd", {})},
    "projector": {
        "SEM 5, MLP": ("ds", _sem(5, projector="mlp", projector_dim=512, center=False)),
        "SEM 5, MLP, centred": ("ds", _sem(5, projector="mlp", projector_dim=512, center=True)),
        "SEM 5, MLP, centred, teacher's trained": (
            "ds",
            _sem(5, projector="mlp", projector_dim=512, center=True, train_teacher_projector=True),
        ),
        "SEM 5, linear": ("ds", _sem(5, projector="linear", center=False)),
        "SEM 5, linear, centred": ("ds", _sem(5, **LINEAR)),
        "SEM 5, no projector, centred": ("ds", _sem(5, projector="none", center=True)),
    },
    "gamma": {
        f"SEM {weight:g}, {name}, centred": ("ds", _sem(weight, **kind))
        for weight in (5, 2, 20, 50)
        for name, kind in {"MLP": MLP, "linear": LINEAR}.items()
    },
    "weight": {
        f"default, gamma ({weight:g}, 0.02)": ("ds", {"gamma": (weight, 0.02)})
        for weight in (5.0, 2.0, 1.0, 0.5)
    },
    "lambd": {
        f"SEM 5, MLP, centred, lambd {lambd:g}": ("ds", _sem(5, **MLP, lambd=lambd))
        for lambd in (0.0, 5e-2, 0.5)
    },
    "dcm": {
        **{
            f"DCM {weight:g}, {sign}": ("ds", _dcm(weight, cross_sign=sign))
            for sign, weights in {"separate": (0.02, 0.2), "align": (0.02, 0.2, 1.0)}.items()
            for weight in weights
        },
        "DCM 0.2, align, median, raw": (
            "ds",
            _dcm(0.2, cross_sign="align", sigma="median", normalize=False),
        ),
        "DCM 0.2, align, flattened": ("ds", _dcm(0.2, cross_sign="align", pool="flatten")),
    },
    "both": {
        f"SEM 5, {name}, centred + DCM {weight:g}, {sign}": (
            "ds",
            {**kind, "gamma": (5.0, weight), "cross_sign": sign},
        )
        for name, kind in {"linear": LINEAR, "MLP": MLP}.items()
        for sign, weights in {"align": (0.02, 0.1, 0.5), "separate": (0.02,)}.items()
        for weight in weights
    },
    "printed": {
        f"as printed, gamma {gamma:g}": ("ds", {"variant": "printed", "gamma": gamma})
        for gamma in (1e-3, 1e-2)
    },
}
