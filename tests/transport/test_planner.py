"""The planner against its definition, POT's solvers and linear programming."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from structkd.transport import LagrangianPlanner
from tests.reference import transport as reference

CONSTRAINTS = ("rows", "both", "capacity")
every_constraint = pytest.mark.parametrize("constraint", CONSTRAINTS)
sizes = st.integers(1, 6)
seeds = st.integers(0, 2**16)


def _random(seed: int, *shape: int) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=rng, dtype=torch.float64)


def _masses(seed: int, *shape: int) -> Tensor:
    mass = _random(seed, *shape) + 0.2
    return mass / mass.sum(dim=-1, keepdim=True)


def _limits(constraint: str, seed: int, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Row masses of total 1, and what the constraint asks of the columns."""
    given = {"row_mass": _masses(seed, *shape[:-1])}
    if constraint == "both":
        given["column_mass"] = _masses(seed + 1, *shape[:-2], shape[-1])
    if constraint == "capacity":
        given["capacity"] = 1.3 * _masses(seed + 1, *shape[:-2], shape[-1])
    return given


def _planner(constraint: str, epsilon: float = 0.2, **options) -> LagrangianPlanner:
    defaults = {"max_iterations": 20_000, "tolerance": 1e-11}
    return LagrangianPlanner(epsilon, constraint, **{**defaults, **options})


@settings(max_examples=25, deadline=None)
@given(seed=seeds, rows=sizes, columns=sizes, epsilon=st.sampled_from([0.05, 0.5, 5.0]))
def test_rows_is_the_softmax_plan(seed: int, rows: int, columns: int, epsilon: float) -> None:
    cost, mass = 3 * _random(seed, rows, columns), _masses(seed, rows)
    plan = LagrangianPlanner(epsilon)(cost, mass)
    wanted = reference.softmax_plan(cost, epsilon, mass)
    torch.testing.assert_close(plan.plan, wanted, rtol=1e-12, atol=1e-15)
    assert plan.converged
    assert plan.iterations == 0


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rows=sizes, columns=sizes)
def test_both_is_pots_sinkhorn(seed: int, rows: int, columns: int) -> None:
    cost = _random(seed, rows, columns)
    given = _limits("both", seed, (rows, columns))
    found = _planner("both")(cost, **given)
    wanted = ot.sinkhorn(
        given["row_mass"],
        given["column_mass"],
        cost,
        0.2,
        method="sinkhorn_log",
        stopThr=1e-13,
        numItermax=20_000,
    )
    assert found.converged
    torch.testing.assert_close(found.plan, wanted, rtol=1e-8, atol=1e-10)


@settings(max_examples=15, deadline=None)
@given(seed=seeds, rows=st.integers(1, 4), columns=st.integers(2, 4))
def test_capacity_is_dykstras_projection(seed: int, rows: int, columns: int) -> None:
    cost = _random(seed, rows, columns)
    given = _limits("capacity", seed, (rows, columns))
    found = _planner("capacity")(cost, **given)
    wanted = reference.capacity_plan(cost, 0.2, **given)
    assert found.converged
    torch.testing.assert_close(found.plan, wanted, rtol=1e-6, atol=1e-8)


@every_constraint
@settings(max_examples=25, deadline=None)
@given(seed=seeds, rows=sizes, columns=sizes, total=st.sampled_from([1e-3, 1.0, 1e3]))
def test_rows_and_columns_keep_their_limits(
    constraint: str, seed: int, rows: int, columns: int, total: float
) -> None:
    given = _limits(constraint, seed, (3, rows, columns))
    given = {name: total * mass for name, mass in given.items()}
    found = LagrangianPlanner(0.2, constraint)(_random(seed, 3, rows, columns), **given)
    assert found.converged.all()
    assert (found.plan >= 0).all()
    torch.testing.assert_close(found.plan.sum(dim=-1), given["row_mass"], rtol=1e-12, atol=0)
    received = found.plan.sum(dim=-2)
    if constraint == "both":
        miss = (received - given["column_mass"]).abs()
        assert (miss.sum(dim=-1) <= 1e-6 * total).all()
    if constraint == "capacity":
        assert ((received - given["capacity"]).clamp_min(0).sum(dim=-1) <= 1e-6 * total).all()


def test_default_masses_are_even() -> None:
    cost = _random(0, 2, 4, 5)
    for constraint, limits in (("rows", {}), ("both", {}), ("capacity", {"capacity": 0.25})):
        found = _planner(constraint)(cost, **limits).plan
        torch.testing.assert_close(found.sum(dim=-1), torch.full((2, 4), 0.25).double())
    torch.testing.assert_close(
        _planner("both")(cost).plan.sum(dim=-2), torch.full((2, 5), 0.2).double()
    )


def test_capacity_that_is_never_reached_changes_nothing() -> None:
    cost = _random(0, 4, 5)
    free = _planner("rows")(cost).plan
    for capacity in (1.0, np.int64(1), np.float32(1), torch.full((5,), float("inf"))):
        found = _planner("capacity")(cost, capacity=capacity)
        torch.testing.assert_close(found.plan, free, rtol=0, atol=0)


def test_capacity_of_exactly_the_mass_is_both() -> None:
    cost, columns = _random(0, 3, 30, 20), _masses(1, 3, 20)
    found, wanted = (
        _planner("capacity", 0.1)(cost, capacity=columns),
        _planner("both", 0.1)(cost, column_mass=columns),
    )
    assert found.converged.all()
    torch.testing.assert_close(found.plan, wanted.plan)
    # The clipped step would take tens of times as many.
    assert found.iterations <= 2 * wanted.iterations


@pytest.mark.parametrize("rounding", [1 - 5e-6, 1 + 5e-6])
def test_totals_that_differ_by_rounding_are_equal(rounding: float) -> None:
    cost, columns = _random(0, 6, 4), _masses(1, 4) * rounding
    assert LagrangianPlanner(0.2, "both")(cost, column_mass=columns).converged
    assert LagrangianPlanner(0.2, "capacity")(cost, capacity=columns).converged


@settings(max_examples=10, deadline=None)
@given(seed=seeds, rows=st.integers(2, 5), columns=st.integers(2, 5))
def test_cost_of_both_falls_to_the_exact_one(seed: int, rows: int, columns: int) -> None:
    cost = _random(seed, rows, columns)
    given = _limits("both", seed, (rows, columns))
    exact = float(ot.emd2(given["row_mass"], given["column_mass"], cost))
    costs = []
    for epsilon in (1.0, 0.3, 0.1, 0.03):
        planner = _planner("both", epsilon, tolerance=1e-9)
        costs.append(float(planner(cost, **given).cost))
    assert all(later <= earlier + 1e-7 for earlier, later in pairwise(costs))
    assert exact - 1e-7 <= costs[-1]
    # The entropy of a plan is at most log(N M), so that is the most it can buy.
    assert costs[-1] - exact <= 0.03 * torch.tensor(float(rows * columns)).log() + 1e-7


@settings(max_examples=10, deadline=None)
@given(seed=seeds, rows=st.integers(2, 5), columns=st.integers(2, 5))
def test_cost_under_capacity_falls_to_the_exact_one(seed: int, rows: int, columns: int) -> None:
    cost = _random(seed, rows, columns)
    given = _limits("capacity", seed, (rows, columns))
    exact = reference.capacity_optimum(cost, **given)
    found = _planner("capacity", 0.02, tolerance=1e-8)(cost, **given)
    assert exact - 1e-6 <= float(found.cost)
    assert float(found.cost) - exact <= 0.02 * torch.tensor(float(rows * columns)).log() + 1e-6


@every_constraint
@settings(max_examples=10, deadline=None)
@given(seed=seeds)
def test_order_of_rows_and_columns_carries_over(constraint: str, seed: int) -> None:
    cost, given = _random(seed, 5, 4), _limits(constraint, seed, (5, 4))
    rng = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(5, generator=rng), torch.randperm(4, generator=rng)
    moved = {name: mass[rows if name == "row_mass" else columns] for name, mass in given.items()}
    plan, again = (
        _planner(constraint)(cost, **given),
        _planner(constraint)(cost[rows][:, columns], **moved),
    )
    torch.testing.assert_close(again.plan, plan.plan[rows][:, columns])
    torch.testing.assert_close(again.value, plan.value)


@every_constraint
def test_a_batch_equals_one_by_one(constraint: str) -> None:
    cost, given = _random(0, 2, 3, 5, 4), _limits(constraint, 0, (2, 3, 5, 4))
    whole = _planner(constraint)(cost, **given)
    assert whole.converged.shape == whole.cost.shape == whole.value.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = _planner(constraint)(cost[i, j], **{n: v[i, j] for n, v in given.items()})
            torch.testing.assert_close(whole.plan[i, j], one.plan, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(whole.cost[i, j], one.cost, rtol=1e-8, atol=1e-10)


@every_constraint
def test_a_batch_of_no_problems_has_no_plans(constraint: str) -> None:
    cost, given = torch.zeros(0, 3, 4, requires_grad=True), _limits(constraint, 0, (0, 3, 4))
    plan = _planner(constraint, gradient="unrolled")(cost, **given)
    assert (plan.plan.shape, plan.cost.shape) == ((0, 3, 4), (0,))
    plan.value.sum().backward()
    assert _planner(constraint).received(cost, **given).shape == (0, 4)


@every_constraint
@pytest.mark.parametrize("junk", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("default", [True, False], ids=["even", "given"])
def test_padding_changes_nothing(constraint: str, junk: float, default: bool) -> None:
    inner = _random(0, 3, 4).requires_grad_()
    given = _limits(constraint, 0, (3, 4))
    if default:
        given = {name: mass for name, mass in given.items() if name == "capacity"}
    planner = _planner(constraint, gradient="unrolled")
    wanted = planner(inner, **given)
    rows, columns = torch.zeros(5).bool(), torch.zeros(6).bool()
    rows[[0, 2, 4]], columns[[1, 2, 3, 5]] = True, True
    padded = torch.full((2, 5, 6), junk).double()
    where = (torch.tensor([0, 2, 4])[:, None], torch.tensor([1, 2, 3, 5]))
    padded[0][where] = inner.detach()
    padded.requires_grad_()
    mask = torch.stack([rows[:, None] & columns, torch.zeros(5, 6).bool()])
    limits = {}
    for name, mass in given.items():
        open_places = rows if name == "row_mass" else columns
        limits[name] = torch.zeros(2, len(open_places)).double()
        limits[name][0, open_places] = mass
    found = planner(padded, **limits, mask=mask)
    torch.testing.assert_close(found.plan[0][where], wanted.plan)
    torch.testing.assert_close(found.plan[0].sum(), wanted.plan.sum())
    torch.testing.assert_close(found.cost[0], wanted.cost)
    torch.testing.assert_close(found.value[0], wanted.value)
    # The second problem is padding throughout.
    assert (found.plan[1] == 0).all()
    assert found.value[1] == 0
    assert found.converged.all()
    probe = _random(9, 3, 4)
    (grad,) = torch.autograd.grad((found.plan[0][where] * probe).sum() + found.value[0], padded)
    (expected,) = torch.autograd.grad((wanted.plan * probe).sum() + wanted.value, inner)
    torch.testing.assert_close(grad[0][where], expected)
    assert grad.isfinite().all()
    assert (grad[0] != 0).sum() <= 12


@every_constraint
def test_a_problem_without_mass_has_converged(constraint: str) -> None:
    cost, given = _random(0, 2, 3, 4), _limits(constraint, 0, (2, 3, 4))
    given["row_mass"][1] = 0
    if constraint == "both":
        given["column_mass"][1] = 0
    wanted = _planner(constraint)(cost[:1], **{name: mass[:1] for name, mass in given.items()})
    found = _planner(constraint)(cost, **given)
    assert (found.plan[1] == 0).all()
    assert found.converged.all()
    torch.testing.assert_close(found.plan[:1], wanted.plan)


@every_constraint
def test_closed_pairs_stay_empty(constraint: str) -> None:
    cost, given = _random(0, 4, 4), _limits(constraint, 0, (4, 4))
    mask = torch.ones(4, 4).bool()
    mask[0, 1] = mask[2, 2] = mask[3, 0] = False
    found = _planner(constraint)(cost, **given, mask=mask)
    assert found.converged
    assert (found.plan[~mask] == 0).all()
    # A price that is high enough closes a pair too.
    priced = _planner(constraint)(cost.masked_fill(~mask, 1e4), **given)
    torch.testing.assert_close(found.plan, priced.plan, rtol=1e-7, atol=1e-9)


@every_constraint
def test_a_column_without_capacity_or_mass_gets_none(constraint: str) -> None:
    if constraint == "rows":
        mask = torch.tensor([True, False, True]).expand(4, 3)
        found = _planner("rows")(_random(0, 4, 3), mask=mask)
    else:
        limit = torch.tensor([0.5, 0.0, 0.5]).double()
        name = "capacity" if constraint == "capacity" else "column_mass"
        found = _planner(constraint)(_random(0, 4, 3), **{name: limit})
    assert found.converged
    assert (found.plan[:, 1] == 0).all()
    assert found.plan.sum() == pytest.approx(1)


@every_constraint
def test_potentials_give_the_plan(constraint: str) -> None:
    cost, given = _random(0, 2, 4, 3), _limits(constraint, 0, (2, 4, 3))
    given = {name: 5 * mass for name, mass in given.items()}
    found = _planner(constraint)(cost, **given)
    f, g = found.potentials
    torch.testing.assert_close(found.plan, ((f[..., None] + g[..., None, :] - cost) / 0.2).exp())
    if constraint == "capacity":
        full = found.plan.sum(dim=-2) >= given["capacity"] * (1 - 1e-9)
        assert (g <= 0).all()
        assert (g[~full] == 0).all()


@every_constraint
def test_value_is_the_regularised_objective(constraint: str) -> None:
    cost, given = _random(0, 4, 3), _limits(constraint, 0, (4, 3))
    found = _planner(constraint)(cost, **given)
    assert float(found.value) == pytest.approx(reference.value(found.plan, cost, 0.2), abs=1e-12)
    assert float(found.cost) == pytest.approx(reference.value(found.plan, cost, 0.0), abs=1e-12)


@every_constraint
@pytest.mark.parametrize("gradient", ["envelope", "unrolled", "none"])
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_what_the_columns_receive_is_the_plans_sum(
    constraint: str, gradient: str, masked: bool
) -> None:
    cost, given = _random(0, 2, 3, 4).requires_grad_(), _limits(constraint, 0, (2, 3, 4))
    if masked:
        given["mask"] = torch.ones(3, 4).bool()
        given["mask"][0, 1] = False
    planner = _planner(constraint, gradient=gradient)
    wanted = planner(cost, **given).plan.sum(dim=-2)
    received = planner.received(cost, **given)
    torch.testing.assert_close(received, wanted)
    assert received.requires_grad == wanted.requires_grad
    if gradient == "unrolled":
        probe = _random(1, 4)
        found, expected = (
            torch.autograd.grad((sums * probe).sum(), cost)[0] for sums in (received, wanted)
        )
        torch.testing.assert_close(found, expected)


@every_constraint
def test_envelope_gradient_is_the_plan(constraint: str) -> None:
    cost, given = _random(0, 3, 4).requires_grad_(), _limits(constraint, 0, (3, 4))
    planner = _planner(constraint, gradient="envelope")
    found = planner(cost, **given)
    assert not found.plan.requires_grad
    (grad,) = torch.autograd.grad(found.value, cost)
    torch.testing.assert_close(grad, found.plan, rtol=0, atol=0)
    with torch.no_grad():
        for i in range(3):
            for j in range(4):
                step = torch.zeros(3, 4).double()
                step[i, j] = 1e-5
                rise = planner(cost + step, **given).value - planner(cost - step, **given).value
                assert float(grad[i, j]) == pytest.approx(float(rise) / 2e-5, abs=1e-7)


@every_constraint
@pytest.mark.parametrize("masked", [False, True], ids=["open", "masked"])
def test_unrolled_gradient_is_the_iterations(constraint: str, masked: bool) -> None:
    cost, given = _random(0, 2, 3, 4).requires_grad_(), _limits(constraint, 0, (2, 3, 4))
    planner = _planner(constraint, gradient="unrolled", tolerance=0.0, max_iterations=15)
    mask = torch.ones(3, 4).bool()
    mask[0, 1] = not masked

    def run(cost: Tensor) -> tuple[Tensor, ...]:
        found = planner(cost, **given, mask=mask if masked else None)
        return found.plan, found.cost, found.value

    assert torch.autograd.gradcheck(run, cost)


@every_constraint
def test_unrolled_gradient_of_the_value_meets_the_envelope(constraint: str) -> None:
    cost, given = _random(0, 3, 4).requires_grad_(), _limits(constraint, 0, (3, 4))
    grads = [
        torch.autograd.grad(_planner(constraint, gradient=kind)(cost, **given).value, cost)[0]
        for kind in ("unrolled", "envelope")
    ]
    torch.testing.assert_close(*grads, rtol=1e-7, atol=1e-9)


@every_constraint
def test_none_detaches_all(constraint: str) -> None:
    cost, given = _random(0, 3, 4).requires_grad_(), _limits(constraint, 0, (3, 4))
    found = _planner(constraint, gradient="none")(cost, **given)
    parts = (found.plan, found.cost, found.value, *found.potentials)
    assert not any(part.requires_grad for part in parts)


@every_constraint
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_half_precision_is_computed_in_float32(constraint: str, dtype: torch.dtype) -> None:
    cost = _random(0, 2, 16, 16).to(dtype).requires_grad_()
    limits = {"capacity": 0.1} if constraint == "capacity" else {}
    found = LagrangianPlanner(0.1, constraint)(cost, **limits)
    assert found.plan.dtype == torch.float32
    assert found.converged.all()
    found.value.sum().backward()
    assert cost.grad.dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        again = LagrangianPlanner(0.1, constraint)(cost, **limits)
    torch.testing.assert_close(again.plan, found.plan, rtol=0, atol=0)


@every_constraint
@pytest.mark.parametrize("method", ["forward", "received"])
def test_autocast_changes_no_digit(constraint: str, method: str) -> None:
    cost = _random(0, 2, 16, 16).float()
    limits = {"capacity": 0.1} if constraint == "capacity" else {}
    call = getattr(LagrangianPlanner(0.1, constraint), method)
    wanted = call(cost, **limits)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(cost, **limits)
    if method == "forward":
        wanted, found = wanted.plan, found.plan
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


_OFFSETS = (0.0, 5.0, 50.0, 1e4, -50.0, -1e4)


# What is added to a column changes the problem, but where columns are equalities.
_ADDED = [
    *((c, added, masked) for c in CONSTRAINTS for added in ("all", "row") for masked in (0, 1)),
    ("both", "column", 0),
]


@pytest.mark.parametrize(("constraint", "added", "masked"), _ADDED)
def test_what_is_added_to_the_cost_changes_no_plan(
    constraint: str, added: str, masked: int
) -> None:
    limits = {name: mass.float() for name, mass in _limits(constraint, 3, (6, 6)).items()}
    if masked:
        # What the mask closes holds numbers that no open pair is near to.
        limits["mask"] = ~torch.eye(6).bool()
    planner, cost = LagrangianPlanner(0.05, constraint), _random(3, 6, 6).float()
    shape = {"all": (), "row": (6, 1), "column": (6,)}[added]
    for offset in _OFFSETS:
        size = offset * (1 if shape == () else torch.linspace(-1, 1, 6).reshape(shape))
        moved = cost + size
        if masked:
            moved = moved.masked_fill(~limits["mask"], -1e6)
        # In float64 every rounding but that of the input is far away.
        wanted = _planner(constraint, 0.05)(moved.double(), **limits)
        found = planner(moved, **limits)
        assert found.converged, offset
        # Costs of a column that are far from the others' in a row leave a rounding of their size.
        atol = 3e-6 + (1e-7 * abs(offset) if added == "column" else 0)
        torch.testing.assert_close(found.plan.double(), wanted.plan, rtol=0, atol=atol)
        received = planner.received(moved, **limits).double()
        torch.testing.assert_close(received, found.plan.sum(dim=-2).double(), rtol=0, atol=1e-6)
        (f, g), (f_wanted, g_wanted) = found.potentials, wanted.potentials
        both, both_wanted = f[:, None] + g, f_wanted[:, None] + g_wanted
        torch.testing.assert_close(both.double(), both_wanted, rtol=2e-7, atol=1e-3)


def test_huge_costs_keep_their_rows() -> None:
    cost = (1e8 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))).requires_grad_()
    found = LagrangianPlanner(1.0, gradient="unrolled")(cost)
    torch.testing.assert_close(found.plan.sum(dim=-1), torch.full((5,), 0.2))
    (grad,) = torch.autograd.grad(found.value, cost)
    assert grad.isfinite().all()


def test_rows_compiles_whole() -> None:
    torch._dynamo.reset()
    planner, cost = LagrangianPlanner(0.2, gradient="unrolled"), _random(0, 2, 3, 4)
    compiled = torch.compile(lambda x: planner(x).plan, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(cost), planner(cost).plan)


@pytest.mark.parametrize("constraint", ["both", "capacity"])
def test_too_few_iterations_are_reported(constraint: str) -> None:
    given = _limits(constraint, 0, (6, 6))
    cost = 1 - torch.eye(6).double()
    found = _planner(constraint, 0.01, max_iterations=2)(cost, **given)
    assert found.iterations == 2
    assert not found.converged


@every_constraint
def test_nan_stays_in_its_problem(constraint: str) -> None:
    cost, given = _random(0, 2, 3, 4), _limits(constraint, 0, (2, 3, 4))
    wanted = _planner(constraint, max_iterations=200)(cost, **given)
    cost[1] = float("nan")
    found = _planner(constraint, max_iterations=200)(cost, **given)
    assert found.plan[1].isnan().all()
    assert found.cost[1].isnan()
    assert found.converged.tolist() == [True, False]
    torch.testing.assert_close(found.plan[0], wanted.plan[0])


@pytest.mark.parametrize("constraint", ["both", "capacity"])
@pytest.mark.parametrize("broken", ["nan", "minus infinity", "a row of infinity"])
@pytest.mark.parametrize("gradient", ["envelope", "unrolled"])
def test_a_broken_problem_costs_the_others_nothing(
    constraint: str, broken: str, gradient: str
) -> None:
    cost, given = _random(0, 3, 5, 4), _limits(constraint, 0, (3, 5, 4))
    planner = _planner(constraint, max_iterations=5000, gradient=gradient)
    wanted = planner(cost, **given)
    bad = cost.clone()
    if broken == "nan":
        bad[1, 2, 3] = float("nan")
    elif broken == "minus infinity":
        bad[1, 2, 3] = -float("inf")
    else:
        bad[1, 2] = float("inf")
    bad.requires_grad_()
    found = planner(bad, **given)
    assert wanted.converged.all()
    assert found.iterations <= wanted.iterations
    assert found.converged.tolist() == [True, False, True]
    assert found.plan[1].isnan().all()
    assert planner.received(bad, **given)[1].isnan().all()
    torch.testing.assert_close(found.plan[[0, 2]], wanted.plan[[0, 2]], rtol=1e-8, atol=1e-10)
    (grad,) = torch.autograd.grad(found.value[[0, 2]].sum(), bad)
    assert grad[[0, 2]].isfinite().all()


def test_both_without_pot_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ot.batch", None)
    with pytest.raises(ImportError, match="constraint='both' needs POT: pip install POT"):
        LagrangianPlanner(0.1, "both")(torch.ones(2, 2))
    assert LagrangianPlanner(0.1, "capacity")(torch.ones(2, 2), capacity=0.5).converged


def test_masses_of_the_batch_may_be_shared() -> None:
    cost, mass = _random(0, 2, 3, 4), _masses(0, 3)
    shared = _planner("both")(cost, mass, torch.tensor([1, 1, 1, 1]) / 4)
    apart = _planner("both")(cost, mass.expand(2, 3))
    torch.testing.assert_close(shared.plan, apart.plan)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": 0}, ValueError, r"epsilon must be finite > 0, got 0"),
        ({"epsilon": -1.0}, ValueError, r"epsilon must be finite > 0"),
        ({"epsilon": float("nan")}, ValueError, r"epsilon must be finite"),
        ({"epsilon": "small"}, TypeError, r"epsilon must be a number, got str"),
        ({"constraint": "columns"}, ValueError, r"constraint must be one of rows, both, capacity"),
        ({"gradient": "exact"}, ValueError, r"gradient must be one of envelope, unrolled, none"),
        ({"max_iterations": 0}, ValueError, r"max_iterations must be at least 1"),
        ({"tolerance": -1e-3}, ValueError, r"tolerance must be finite >= 0"),
    ],
)
def test_bad_options_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        LagrangianPlanner(**{"epsilon": 0.1, **options})


_CLOSED_ROW = torch.tensor([[True, True], [True, True], [False, False]])
_CLOSED_COLUMN = torch.tensor([[True, False]] * 3)


@pytest.mark.parametrize(
    ("constraint", "change", "error", "message"),
    [
        ("rows", {"cost": torch.ones(3, 2).long()}, TypeError, r"cost must be a floating.*int64"),
        ("rows", {"cost": torch.ones(3)}, ValueError, r"cost must be \(\.\.\., N, M\).*\(3,\)"),
        ("rows", {"cost": torch.ones(3, 0)}, ValueError, r"N, M >= 1"),
        ("rows", {"row_mass": torch.ones(2)}, ValueError, r"row_mass must fit \(3,\).*\(2,\)"),
        ("rows", {"row_mass": [1, 1, 1]}, TypeError, r"row_mass must be a tensor.*list"),
        ("rows", {"row_mass": torch.tensor([1.0, -2.0, 1.0])}, ValueError, r"row_mass .* got -2"),
        ("rows", {"row_mass": torch.full((3,), torch.nan)}, ValueError, r"row_mass .* got nan"),
        ("rows", {"row_mass": torch.full((3,), torch.inf)}, ValueError, r"row_mass .*finite.* inf"),
        ("rows", {"mask": torch.ones(3, 2)}, TypeError, r"mask must be a bool tensor.*float32"),
        ("rows", {"mask": torch.ones(2, 2).bool()}, ValueError, r"mask must fit \(3, 2\)"),
        (
            "rows",
            {"row_mass": torch.ones(3), "mask": _CLOSED_ROW},
            ValueError,
            r"row_mass is positive in a row whose columns",
        ),
        ("rows", {"capacity": 1.0}, ValueError, r"capacity is read under constraint='capacity'"),
        ("rows", {"column_mass": torch.ones(2)}, ValueError, r"column_mass is read under.*'both'"),
        ("both", {"capacity": 1.0}, ValueError, r"capacity is read under .* not 'both'"),
        (
            "both",
            {"column_mass": torch.ones(2)},
            ValueError,
            r"row_mass and column_mass must hold the same total, got 1 and 2",
        ),
        ("both", {"column_mass": torch.tensor([2.0, -1.0])}, ValueError, r"column_mass .* got -1"),
        ("both", {"column_mass": torch.ones(3) / 3}, ValueError, r"column_mass must fit \(2,\)"),
        (
            "both",
            {"column_mass": torch.ones(2) / 2, "mask": _CLOSED_COLUMN},
            ValueError,
            r"column_mass is positive in a column",
        ),
        ("capacity", {}, ValueError, r"constraint='capacity' needs capacity"),
        ("capacity", {"capacity": 0.4}, ValueError, r"capacity is short: .* 0.8 .* 1;"),
        ("capacity", {"capacity": -1}, ValueError, r"capacity must be >= 0, got -1"),
        ("capacity", {"capacity": "much"}, TypeError, r"capacity must be a number or a tensor"),
        (
            "capacity",
            {"capacity": 0.6, "mask": _CLOSED_COLUMN},
            ValueError,
            r"capacity is short: the open columns take 0.6",
        ),
    ],
)
def test_bad_problems_are_named(
    constraint: str, change: dict, error: type[Exception], message: str
) -> None:
    given = {"cost": torch.ones(3, 2), **change}
    with pytest.raises(error, match=message):
        LagrangianPlanner(0.1, constraint)(**given)
