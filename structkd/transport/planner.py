"""The Lagrangian planner: entropic transport plans under row, both-marginal or capacity limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from structkd._checks import choice, describe, number, whole

CONSTRAINTS = ("rows", "both", "capacity")
GRADIENTS = ("envelope", "unrolled", "none")
# Two totals of mass count as equal up to the rounding of a long float32 sum.
MASS_RTOL = 1e-5
# Marginals are compared every so many iterations, as POT does: each look waits for the device.
CHECK_EVERY = 10


@dataclass(frozen=True, eq=False)
class TransportPlan:
    """What a planner found, for every problem of the batch.

    Attributes:
        plan: Mass moved from row to column, ``(..., N, M)``.
        cost: ``<plan, cost>``, ``(...)``, without the entropy.
        value: ``<plan, cost> + epsilon * sum plan log plan``, ``(...)``, what the plan minimises.
        potentials: ``(f, g)`` of ``(..., N)`` and ``(..., M)`` in units of the cost, detached:
            ``plan_ij = exp((f_i + g_j - cost_ij) / epsilon)`` where the mask is open.
        converged: Bool ``(...)``: the columns keep their constraint to the planner's tolerance and
            rounding.
        iterations: Iterations run on the whole batch, 0 for the closed form.
    """

    plan: Tensor
    cost: Tensor
    value: Tensor
    potentials: tuple[Tensor, Tensor]
    converged: Tensor
    iterations: int


class _Limits(NamedTuple):
    """What may be given beside the cost, as :meth:`LagrangianPlanner.forward` says."""

    row_mass: Tensor | None
    column_mass: Tensor | None
    capacity: Tensor | float | None
    mask: Tensor | None


class _Given(NamedTuple):
    """A checked problem.

    ``scores`` are ``-cost / epsilon`` less what changes no plan, with what the mask closes closed.
    ``shifts`` are what was taken from the cost, a number a row and one a column.
    """

    cost: Tensor
    scores: Tensor
    row_mass: Tensor
    limit: Tensor | None
    shifts: tuple[Tensor, Tensor]


class LagrangianPlanner(nn.Module):
    r"""Entropic transport plans for a batch of cost matrices.

    .. math::
        \min_{\pi \ge 0} \; \langle \pi, C \rangle + \varepsilon \sum_{ij} \pi_{ij} \log \pi_{ij}
        \quad \text{with} \quad \pi 1 = a

    and, by ``constraint``, no other limit (``rows``), :math:`\pi^T 1 = b` (``both``) or
    :math:`\pi^T 1 \le c` (``capacity``). The Lagrangian's stationary point is
    :math:`\pi_{ij} = a_i \, \mathrm{softmax}_j ((g_j - C_{ij}) / \varepsilon)` in all three:

    - ``rows``: g = 0. The closed form, one softmax: no solver, no loop and no wait for the device.
    - ``both``: Sinkhorn in the log domain, by POT's ``ot.batch.bregman_log_projection_batch``. It
      knows no masks: closed rows and columns reach it as zero mass, closed pairs as -inf scores.
      Not by ``ot.batch.solve_batch``, which takes no scores, reports no convergence and keeps the
      graph of every iteration for its ``envelope`` gradient.
    - ``capacity``: POT has no batched solver with inequalities, so this is Dykstra's algorithm in
      the dual: the same two steps with the column step clipped, :math:`g \leftarrow
      \min(0, \varepsilon \log c - \mathrm{lse})`. Rows need no correction, being equalities.

    Rows always hold to rounding, columns to ``tolerance``. What is added to a whole row of the cost
    (``both``: to a column too) changes no plan; it is taken away first, so that large costs are
    solved as exactly as their differences are given.

    Args:
        epsilon: Weight > 0 of the entropy, in units of the cost. The plan falls to an exact
            optimal one with it, while the iterations needed grow; little spare capacity costs
            iterations too. Look at ``converged``.
        constraint: ``rows``, ``both`` or ``capacity``.
        gradient: How gradients reach ``cost``; masses and capacities are constants.
            ``envelope``: the plan is detached, so the gradient of ``value`` is the plan itself:
            exact at convergence, at no memory. ``cost`` gets the same gradient, which holds the
            plan fixed. ``unrolled``: through the softmax (``rows``, exact) or through every
            iteration, for the gradient of the plan; memory grows with the iterations. ``none``:
            all is detached.
        max_iterations: Most iterations of ``both`` and ``capacity``.
        tolerance: Share >= 0 of the total mass that may miss its column limit, in sum over the
            columns. It is looked at every 10 iterations; 0 runs all ``max_iterations``. Float32
            reaches about 1e-6.

    Raises:
        TypeError, ValueError: If an option is unknown or out of range.

    References:
        Wei et al., *Asymmetric Cross-Modal Knowledge Distillation*, AAAI 2026 (the planner);
        Cuturi, *Sinkhorn Distances*, 2013; Benamou et al., *Iterative Bregman Projections for
        Regularized Transportation Problems*, 2015, Sec. 5.1 (capacities).

    Example:
        >>> cost = torch.tensor([[0.0, 1.0], [0.2, 2.0]])  # both rows like the first column
        >>> LagrangianPlanner(0.1)(cost).plan.round(decimals=1)
        tensor([[0.5000, 0.0000],
                [0.5000, 0.0000]])
        >>> plan = LagrangianPlanner(0.1, "capacity")(cost, capacity=0.5)
        >>> plan.plan.round(decimals=1), bool(plan.converged)
        (tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]]), True)
    """

    def __init__(
        self,
        epsilon: float,
        constraint: str = "rows",
        *,
        gradient: str = "envelope",
        max_iterations: int = 1000,
        tolerance: float = 1e-6,
    ) -> None:
        super().__init__()
        self.epsilon = number("epsilon", epsilon, above=0)
        self.constraint = choice("constraint", constraint, CONSTRAINTS)
        self.gradient = choice("gradient", gradient, GRADIENTS)
        self.max_iterations = whole("max_iterations", max_iterations)
        self.tolerance = number("tolerance", tolerance, at_least=0)

    def forward(
        self,
        cost: Tensor,
        row_mass: Tensor | None = None,
        column_mass: Tensor | None = None,
        capacity: Tensor | float | None = None,
        mask: Tensor | None = None,
    ) -> TransportPlan:
        """Plans every problem of the batch.

        Args:
            cost: ``(..., N, M)``, any float dtype; half precision is computed in float32.
            row_mass: ``(..., N)`` or ``(N,)``, >= 0. By default every open row has the same share
                of a total of 1, so that the sum of a column is the mean of the rows' softmax.
            column_mass: ``(..., M)`` or ``(M,)`` for ``both``: >= 0, of the rows' total. By
                default the total is spread evenly over the open columns.
            capacity: For ``capacity``, and required there: ``(..., M)``, ``(M,)`` or one number
                for all columns, >= 0, inf for no limit.
            mask: Bool, broadcastable to ``cost``: True where mass may go. A row or column that is
                False throughout is padding: it gets no mass, and what its cost holds is not read.
                For padding, ``rows[..., :, None] & columns[..., None, :]``.

        Returns:
            The plan. A NaN cost makes its problem's plan NaN, or its row's alone under ``rows``; a
            problem that has no mass (all of it is padding) gets zeros. Masses that are given are
            checked, which on an accelerator waits for them; ``rows`` without them waits for
            nothing.

        Raises:
            TypeError: If ``cost`` is not floating point or ``mask`` not bool.
            ValueError: If shapes or devices do not fit, a mass is negative or NaN, totals differ,
                the capacity is short of the rows' mass, or mass stands where the mask lets it go
                nowhere.
        """
        with _full_precision(cost):
            given = self._given(cost, _Limits(row_mass, column_mass, capacity, mask))
            dual, iterations = self._dual(given)
            log_plan = (given.scores + dual[..., None, :]).log_softmax(-1)
            log_plan = log_plan + given.row_mass.log()[..., None]
            return self._result(given, dual.detach(), log_plan, iterations)

    def received(
        self,
        cost: Tensor,
        row_mass: Tensor | None = None,
        column_mass: Tensor | None = None,
        capacity: Tensor | float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns what every column receives, ``(..., M)``: the plan's sum over its rows."""
        with _full_precision(cost):
            given = self._given(cost, _Limits(row_mass, column_mass, capacity, mask))
            scores = given.scores
            if given.limit is not None:
                scores = scores + self._dual(given)[0][..., None, :]
            return (given.row_mass[..., None, :] @ scores.softmax(-1))[..., 0, :]

    def _given(self, cost: Tensor, limits: _Limits) -> _Given:
        """Returns the problem after checking that it has a solution."""
        dtype = cost.dtype if cost.dtype == torch.float64 else torch.float32
        cost = (cost.detach() if self.gradient == "none" else cost).to(dtype)
        mask = _open_pairs(limits.mask, cost)
        row_mass = _masses_of_rows(limits.row_mass, mask, cost)
        reach = None if mask is None else (mask & (row_mass > 0)[..., None]).any(dim=-2)
        limit = _column_limit(
            self.constraint, limits.column_mass, limits.capacity, row_mass, reach, cost
        )
        default = limits.row_mass is None and limit is None
        if mask is not None and reach is not None and not default:
            limit = _check_ways(self.constraint, mask, row_mass, limit, reach)
        source = cost if self.gradient == "unrolled" else cost.detach()
        reduced, shifts = _reduced(source, mask, columns_too=self.constraint == "both")
        scores = _scores(reduced / -self.epsilon, row_mass, limit, mask)
        return _Given(cost, scores, row_mass, limit, shifts)

    def _dual(self, given: _Given) -> tuple[Tensor, int]:
        """Returns ``g / epsilon`` and the iterations it took."""
        if given.limit is None or given.cost.shape[:-2].numel() == 0:  # POT takes no empty batch
            return given.scores.new_zeros(given.scores.shape[:-2] + given.scores.shape[-1:]), 0
        return _column_dual(
            self.constraint,
            given.scores,
            given.row_mass,
            given.limit,
            self.max_iterations,
            self.tolerance,
        )

    def _result(
        self, given: _Given, dual: Tensor, log_plan: Tensor, iterations: int
    ) -> TransportPlan:
        cost, scores, row_mass, limit, (row_shift, column_shift) = given
        scores = scores.detach()
        plan = log_plan.exp()
        empty = plan.detach() == 0
        # Nothing moves there: neither -inf nor what a padded cost holds may enter a sum.
        linear = (plan * cost.masked_fill(empty, 0)).sum(dim=(-2, -1))
        entropy = (plan * log_plan.masked_fill(empty, 0)).sum(dim=(-2, -1))
        row_dual = row_mass.log() - (scores + dual[..., None, :]).logsumexp(-1)
        miss = plan.detach().isnan().sum(dim=(-2, -1))
        if limit is not None:
            received = plan.detach().sum(dim=-2)
            if self.constraint == "both":
                miss = (received - limit).abs().sum(dim=-1)
            else:
                miss = _overflow(received, limit, dual).sum(dim=-1)
        # The iterations stop at sums of their own, which are rounded otherwise than the plan's.
        bound = self.tolerance + 2 * torch.finfo(plan.dtype).eps
        return TransportPlan(
            plan=plan,
            cost=linear,
            value=linear + self.epsilon * entropy,
            potentials=(
                self.epsilon * row_dual + row_shift.detach(),
                self.epsilon * dual + column_shift.detach(),
            ),
            converged=miss <= bound * row_mass.sum(dim=-1),
            iterations=iterations,
        )

    def extra_repr(self) -> str:
        return (
            f"epsilon={self.epsilon:.4g}, constraint={self.constraint!r}, "
            f"gradient={self.gradient!r}"
        )


def _full_precision(cost: Tensor) -> torch.autocast:
    """Turns autocast off: a plan is computed in float32 at least, whatever the network runs in."""
    _check_cost(cost)
    return torch.autocast(cost.device.type, enabled=False)


def _reduced(
    cost: Tensor, mask: Tensor | None, *, columns_too: bool
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Returns the cost less the least of every row, and what was taken from rows and columns.

    Before it is divided by epsilon, the difference of near numbers is exact. Rows are equalities,
    so nothing depends on theirs but the potentials; where columns are too, theirs go as well.
    """
    row = _least(cost.detach(), mask, dim=-1)
    cost = cost - row[..., None]
    if not columns_too:
        return cost, (row, torch.zeros_like(cost.detach()[..., 0, :]))
    # Iterations would start elsewhere without it: a gradient through them goes through it too.
    column = _least(cost, mask, dim=-2)
    return cost - column[..., None, :], (row, column)


def _least(cost: Tensor, mask: Tensor | None, *, dim: int) -> Tensor:
    """Returns the least open cost along ``dim``, 0 where none is open."""
    if mask is None:
        return cost.amin(dim=dim)
    least = cost.masked_fill(~mask, torch.inf).amin(dim=dim)
    return least.masked_fill(~mask.any(dim=dim), 0)


def _scores(scores: Tensor, row_mass: Tensor, limit: Tensor | None, mask: Tensor | None) -> Tensor:
    """Closes what the mask closes: pairs by -inf, whole rows and columns (no mass there) by 0."""
    if mask is None:
        return scores
    inside = (row_mass > 0)[..., None]
    if limit is not None:
        inside = inside & (limit > 0)[..., None, :]
    # A row of -inf throughout would turn into NaN.
    return scores.masked_fill(~inside, 0).masked_fill(inside & ~mask, float("-inf"))


def _column_dual(
    constraint: str,
    scores: Tensor,
    row_mass: Tensor,
    limit: Tensor,
    max_iterations: int,
    tolerance: float,
) -> tuple[Tensor, int]:
    """Returns ``g / epsilon`` and the iterations it took.

    Args:
        constraint: ``both`` or ``capacity``.
        scores: ``-cost / epsilon``, ``(..., N, M)``.
        row_mass: ``(..., N)``.
        limit: What the columns must (``both``) or may (``capacity``) receive, ``(..., M)``.
        max_iterations: Most iterations.
        tolerance: Share of the mass that may miss its column.
    """
    # Solved on totals of 1; a problem without mass gets a stand-in, its plan is 0 anyway.
    total = row_mass.sum(dim=-1, keepdim=True)
    has_mass, safe = total > 0, total.where(total > 0, 1)
    rows = (row_mass / safe).where(has_mass, 1 / row_mass.shape[-1])
    if constraint == "capacity":  # no price in the stand-in, for no column of it is full
        columns = (limit / safe).where(has_mass, torch.inf)
        return _capped(scores, rows, columns, max_iterations, tolerance)
    columns = (limit / safe).where(has_mass, 1 / limit.shape[-1])
    return _sinkhorn(scores, rows, columns, max_iterations, tolerance)


def _overflow(received: Tensor, capacity: Tensor, dual: Tensor) -> Tensor:
    """Returns by how much columns miss optimality: one with a price must be full, none over."""
    gap = received - capacity
    return torch.where(dual < 0, gap.abs(), gap.clamp_min(0))


def _sinkhorn(
    scores: Tensor, rows: Tensor, columns: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    count, width = scores.shape[-2:]
    # POT waits for every problem, a broken one too: that gets scores of 0, solved at once.
    broken = _broken(scores.detach(), rows, columns)
    found = _load_pot()(
        scores.masked_fill(broken[..., None, None], 0).reshape(-1, count, width),
        rows.reshape(-1, count),
        columns.reshape(-1, width),
        max_iter=max_iterations,
        # POT bounds the root of the squares: sqrt(N) times that bounds the sum.
        tol=tolerance / count**0.5,
        grad="autodiff",  # what is detached comes in detached
    )
    dual: Tensor = found["potentials"][1].reshape(columns.shape)
    return dual.masked_fill(broken[..., None], torch.nan), found["n_iters"] + 1


def _broken(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Returns which problems have no plan, ``(...)``: one step leaves NaN or infinite duals."""
    row_dual = rows.log() - scores.logsumexp(-1)
    dual = columns.log() - (scores + row_dual[..., None]).logsumexp(-2)
    # -inf is the dual of a place without mass.
    lost = [(part.isnan() | part.isposinf()).any(dim=-1) for part in (row_dual, dual)]
    return lost[0] | lost[1]


def _load_pot() -> Callable[..., dict[str, Any]]:
    """Imports POT where it is needed: it pulls in SciPy and scikit-learn, seconds of work."""
    try:
        from ot.batch import bregman_log_projection_batch
    except ImportError as error:
        raise ImportError(
            "constraint='both' needs POT: pip install POT, the package that has the module ot"
        ) from error
    solver: Callable[..., dict[str, Any]] = bregman_log_projection_batch
    return solver


def _capped(
    scores: Tensor, rows: Tensor, columns: Tensor, max_iterations: int, tolerance: float
) -> tuple[Tensor, int]:
    log_rows, log_columns = rows.log(), columns.log()
    dual = torch.zeros_like(columns)
    # Where all room is needed the limit is an equality: Sinkhorn's step is the faster one, and
    # duals that differ by a constant give one plan.
    full = columns.sum(dim=-1, keepdim=True) <= 1 + MASS_RTOL
    for iteration in range(1, max_iterations + 1):
        row_dual = log_rows - (scores + dual[..., None, :]).logsumexp(-1)
        offered = (scores + row_dual[..., None]).logsumexp(-2)
        if tolerance and iteration % CHECK_EVERY == 1:
            miss = _overflow((offered + dual).exp(), columns, dual).sum(dim=-1)
            # A miss that is NaN stays so: its problem must not keep the others running.
            if bool(((miss < tolerance) | miss.isnan()).all()):
                break
        dual = log_columns - offered
        dual = torch.where(full, dual - dual.amax(-1, keepdim=True), dual.clamp_max(0))
    return dual, iteration


def _even(open_places: Tensor, cost: Tensor) -> Tensor:
    """Spreads a mass of 1 evenly over the open places, of which there may be none."""
    places = open_places.to(cost.dtype)
    return places / places.sum(dim=-1, keepdim=True).clamp_min(1)


def _check_cost(cost: Tensor) -> None:
    if not isinstance(cost, Tensor) or not cost.is_floating_point():
        raise TypeError(f"cost must be a floating-point tensor, got {describe(cost)}")
    if cost.dim() < 2 or 0 in cost.shape[-2:]:
        raise ValueError(f"cost must be (..., N, M) with N, M >= 1, got {describe(cost)}")


def _open_pairs(mask: Tensor | None, cost: Tensor) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise TypeError(f"mask must be a bool tensor, True where open, got {describe(mask)}")
    return _expanded("mask", mask, cost.shape, cost)


def _expanded(name: str, value: Tensor, shape: torch.Size, cost: Tensor) -> Tensor:
    if value.device != cost.device:
        raise ValueError(f"{name} is on {value.device}, the cost on {cost.device}")
    try:
        return value.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} must fit {tuple(shape)} for a cost of {tuple(cost.shape)}, "
            f"got {describe(value)}"
        ) from None


def _checked(name: str, value: Tensor, shape: torch.Size, cost: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype == torch.bool or value.is_complex():
        raise TypeError(f"{name} must be a tensor of numbers, got {describe(value)}")
    mass = _expanded(name, value.detach().to(cost.dtype), shape, cost)
    finite = name != "capacity"
    if not torch.compiler.is_compiling():
        allowed = (mass >= 0) & ~(mass.isinf() & finite)
        if not bool(allowed.all()):
            wrong = float(mass[~allowed][0])
            raise ValueError(f"{name} must be {'finite ' if finite else ''}>= 0, got {wrong:g}")
    return mass


def _balanced(column_mass: Tensor, total: Tensor) -> Tensor:
    """Checks that both sides hold the same total; takes the rounding between them away."""
    given = column_mass.sum(dim=-1, keepdim=True)
    if not torch.compiler.is_compiling():
        apart = (given - total).abs() > MASS_RTOL * total
        if bool(apart.any()):
            raise ValueError(
                "row_mass and column_mass must hold the same total, got "
                f"{float(total[apart][0]):g} and {float(given[apart][0]):g}; "
                "scale one, or use constraint='capacity'"
            )
    return column_mass * (total / given.where(given > 0, 1))


def _enough(
    capacity: Tensor | float,
    columns: torch.Size,
    total: Tensor,
    reach: Tensor | None,
    cost: Tensor,
) -> Tensor:
    """Checks that the open columns can take the rows' mass."""
    if not isinstance(capacity, Tensor):
        if isinstance(capacity, bool) or not isinstance(capacity, Real):
            raise TypeError(f"capacity must be a number or a tensor, got {describe(capacity)}")
        capacity = cost.new_tensor(float(capacity))
    limit = _checked("capacity", capacity, columns, cost)
    room = (limit if reach is None else limit.where(reach, 0)).sum(dim=-1, keepdim=True)
    if not torch.compiler.is_compiling():
        short = room < total * (1 - MASS_RTOL)
        if bool(short.any()):
            raise ValueError(
                f"capacity is short: the open columns take {float(room[short][0]):g} in all, "
                f"row_mass holds {float(total[short][0]):g}; raise capacity or lower row_mass"
            )
    # Room that equals the mass but for rounding is made equal.
    full = (room <= total * (1 + MASS_RTOL)) & (room > 0)
    return limit * torch.where(full, total / room, 1)


def _masses_of_rows(row_mass: Tensor | None, mask: Tensor | None, cost: Tensor) -> Tensor:
    """Returns what every row gives, ``(..., N)``: by default the open rows share 1 evenly."""
    rows = cost.shape[:-1]
    if row_mass is None:
        return _even(cost.new_ones(rows) if mask is None else mask.any(dim=-1), cost)
    return _checked("row_mass", row_mass, rows, cost)


def _column_limit(
    constraint: str,
    column_mass: Tensor | None,
    capacity: Tensor | float | None,
    row_mass: Tensor,
    reach: Tensor | None,
    cost: Tensor,
) -> Tensor | None:
    """Returns what the columns must (``both``) or may (``capacity``) receive, ``(..., M)``."""
    for name, value, reader in (
        ("column_mass", column_mass, "both"),
        ("capacity", capacity, "capacity"),
    ):
        if value is not None and constraint != reader:
            raise ValueError(f"{name} is read under constraint={reader!r}, not {constraint!r}")
    columns = cost.shape[:-2] + cost.shape[-1:]
    total = row_mass.sum(dim=-1, keepdim=True)
    if constraint == "both":
        if column_mass is None:
            return total * _even(cost.new_ones(columns) if reach is None else reach, cost)
        return _balanced(_checked("column_mass", column_mass, columns, cost), total)
    if constraint == "capacity":
        if capacity is None:
            raise ValueError(
                "constraint='capacity' needs capacity, the most that a column may receive: "
                "a number or a tensor (..., M)"
            )
        return _enough(capacity, columns, total, reach, cost)
    return None


def _check_ways(
    constraint: str, mask: Tensor, row_mass: Tensor, limit: Tensor | None, reach: Tensor
) -> Tensor | None:
    """Raises where the mask leaves mass nowhere to go; returns the limit of columns in reach."""
    ways, stuck = mask, torch.zeros_like(reach)
    if limit is not None:
        stuck = (limit > 0) & ~reach & (constraint == "both")
        limit = limit.where(reach, 0)
        ways = mask & (limit > 0)[..., None, :]
    if not torch.compiler.is_compiling():
        if bool(((row_mass > 0) & ~ways.any(dim=-1)).any()):
            raise ValueError("row_mass is positive in a row whose columns the mask or limit closes")
        if bool(stuck.any()):
            raise ValueError("column_mass is positive in a column whose rows the mask closes")
    return limit
