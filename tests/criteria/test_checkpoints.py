"""State dicts of a criterion: of this release, of the one before, and of none in particular."""

from __future__ import annotations

import pytest
import torch

from structkd import Features
from structkd.criteria.base import CriterionSum
from structkd.criteria.calibration import SemanticCalibrationLoss
from structkd.criteria.flow import FlowMatrixLoss
from structkd.criteria.regression import FitNetLoss


def _networks() -> tuple[Features, Features]:
    return tuple(
        Features(intermediate=[torch.randn(4, c, 4, 4), torch.randn(4, 2 * c, 2, 2)])
        for c in (3, 5)
    )


def _old(state: dict, version: int | None, **renamed: str) -> dict:
    """Renames keys, and says another version; None is a file of tensors alone."""
    metadata = getattr(state, "_metadata", {})
    for key, other in renamed.items():
        for name in [name for name in state if name.startswith(key)]:
            state[name.replace(key, other, 1)] = state.pop(name)
    if version is None:
        return dict(state)
    for said in metadata.values():
        said["version"] = version
    return state


@pytest.mark.parametrize("ran", [True, False])
@pytest.mark.parametrize(("version", "says"), [(1, "is of"), (None, "may be of")])
@pytest.mark.parametrize(
    ("kind", "renamed"),
    [
        (FlowMatrixLoss, {"convs.": "adapters.0.conv."}),
        (SemanticCalibrationLoss, {"queries.hidden.": "queries.0.0."}),
    ],
)
def test_other_keys_are_of_the_release_before(kind, renamed, version, says, ran) -> None:
    saved, fresh = kind(), kind()
    saved(*_networks())
    if ran:
        fresh(*_networks())
    state = _old(saved.state_dict(), version, **renamed)
    # Without strictness, too: what it trained would be lost in silence.
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=f"{says} structkd 0.1.0, whose {kind.__name__}"):
            fresh.load_state_dict(state, strict=strict)


def test_only_the_member_that_differs_is_named() -> None:
    make = lambda: CriterionSum({"fitnet": FitNetLoss(), "flow": FlowMatrixLoss()})  # noqa: E731
    saved = make()
    saved(*_networks())
    state = _old(saved.state_dict(), 1, **{"criteria.flow.convs.": "criteria.flow.adapters.0."})
    with pytest.raises(RuntimeError) as caught:
        make().load_state_dict(state)
    assert str(caught.value).count("0.1.0, whose") == 1
    assert "whose FlowMatrixLoss" in str(caught.value)


def test_a_state_dict_without_the_criterion_loads_where_that_is_asked_for() -> None:
    both = torch.nn.ModuleDict({"student": torch.nn.Linear(2, 2), "criterion": FitNetLoss()})
    both["criterion"](*_networks())
    left_out = both.load_state_dict(torch.nn.ModuleDict().state_dict(), strict=False)
    assert {"student.weight", "criterion.regressor.conv.weight"} <= set(left_out.missing_keys)


@pytest.mark.parametrize("version", [1, None, 2])
def test_equal_keys_load_whatever_the_version(version: int | None) -> None:
    saved, resumed = FitNetLoss(), FitNetLoss()
    feats = _networks()
    value = saved(*feats)
    resumed.load_state_dict(_old(saved.state_dict(), version))
    torch.testing.assert_close(resumed(*feats), value)
