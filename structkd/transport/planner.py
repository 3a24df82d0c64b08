"""The Lagrangian planner: entropic transport plans under row, both-marginal or capacity limits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from structkd._checks import choice, number, whole
from structkd.transport._duals import column_dual, overflow
from structkd.transport._masses import (
    check_cost,
    check_ways,
    column_limit,
    masses_of_rows,
    open_pairs,
)

CONSTRAINTS = ("rows", "both", "capacity")
GRADIENTS = ("envelope", "unrolled", "none")


@dataclass(frozen=True, eq=False)
class TransportPlan:
    """What a planner found, for every problem of the batch.

    Attributes:
        plan: Mass moved from row to column, ``(..., N, M)``.
        cost: ``<plan, cost>``, ``(...)``, without the entropy.
        value: ``<plan, cost> + epsilon * sum plan log plan``, ``(...)``, what the plan minimises.
        potentials: ``(f, g)`` of ``(..., N)`` and ``(..., M)`` in units of the cost, detached:
            ``plan_ij = exp((f_i + g_j - cost_ij) / epsilon)`` where the mask is open.
        converged: Bool ``(...)``: the columns keep their constraint to the planner's tolerance.
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
    """A checked problem: ``scores`` are ``-cost / epsilon`` with what the mask closes closed."""

    cost: Tensor
    scores: Tensor
    row_mass: Tensor
    limit: Tensor | None


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

    Rows always hold to rounding, columns to ``tolerance``.

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

    def plan(
        self,
        cost: Tensor,
        row_mass: Tensor | None = None,
        column_mass: Tensor | None = None,
        capacity: Tensor | float | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Returns :meth:`forward`'s plan alone, ``(..., N, M)``, with the same gradient.

        Half the work, for loops that move mass at every step and look at nothing else.
        """
        with _full_precision(cost):
            share, mass = self._shares(cost, _Limits(row_mass, column_mass, capacity, mask))
            return share * mass[..., None]

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
            share, mass = self._shares(cost, _Limits(row_mass, column_mass, capacity, mask))
            return (mass[..., None, :] @ share)[..., 0, :]

    def _shares(self, cost: Tensor, limits: _Limits) -> tuple[Tensor, Tensor]:
        """Returns the plan's rows as shares of their mass, and that mass."""
        given = self._given(cost, limits)
        scores = given.scores
        if given.limit is not None:
            scores = scores + self._dual(given)[0][..., None, :]
        return scores.softmax(-1), given.row_mass

    def _given(self, cost: Tensor, limits: _Limits) -> _Given:
        """Returns the problem after checking that it has a solution."""
        dtype = cost.dtype if cost.dtype == torch.float64 else torch.float32
        cost = (cost.detach() if self.gradient == "none" else cost).to(dtype)
        mask = open_pairs(limits.mask, cost)
        row_mass = masses_of_rows(limits.row_mass, mask, cost)
        reach = None if mask is None else (mask & (row_mass > 0)[..., None]).any(dim=-2)
        limit = column_limit(
            self.constraint, limits.column_mass, limits.capacity, row_mass, reach, cost
        )
        default = limits.row_mass is None and limit is None
        if mask is not None and reach is not None and not default:
            limit = check_ways(self.constraint, mask, row_mass, limit, reach)
        source = cost if self.gradient == "unrolled" else cost.detach()
        scores = _scores(source / -self.epsilon, row_mass, limit, mask)
        return _Given(cost, scores, row_mass, limit)

    def _dual(self, given: _Given) -> tuple[Tensor, int]:
        """Returns ``g / epsilon`` and the iterations it took."""
        if given.limit is None:
            return given.scores.new_zeros(given.scores.shape[:-2] + given.scores.shape[-1:]), 0
        return column_dual(
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
        cost, scores, row_mass, limit = given
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
                miss = overflow(received, limit, dual).sum(dim=-1)
        return TransportPlan(
            plan=plan,
            cost=linear,
            value=linear + self.epsilon * entropy,
            potentials=(self.epsilon * row_dual, self.epsilon * dual),
            converged=miss <= self.tolerance * row_mass.sum(dim=-1),
            iterations=iterations,
        )

    def extra_repr(self) -> str:
        return (
            f"epsilon={self.epsilon:.4g}, constraint={self.constraint!r}, "
            f"gradient={self.gradient!r}"
        )


def _full_precision(cost: Tensor) -> torch.autocast:
    """Turns autocast off: a plan is computed in float32 at least, whatever the network runs in."""
    check_cost(cost)
    return torch.autocast(cost.device.type, enabled=False)


def _scores(scores: Tensor, row_mass: Tensor, limit: Tensor | None, mask: Tensor | None) -> Tensor:
    """Closes what the mask closes: pairs by -inf, whole rows and columns (no mass there) by 0."""
    if mask is None:
        return scores
    inside = (row_mass > 0)[..., None]
    if limit is not None:
        inside = inside & (limit > 0)[..., None, :]
    # A row of -inf throughout would turn into NaN.
    return scores.masked_fill(~inside, 0).masked_fill(inside & ~mask, float("-inf"))
