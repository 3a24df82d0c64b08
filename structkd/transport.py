"""The Lagrangian planner: entropic transport plans under row, both-marginal or capacity limits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from ot.batch import bregman_log_projection_batch
from torch import Tensor, nn

from structkd._checks import choice, number, whole
from structkd._masses import (
    MASS_RTOL,
    balanced,
    check_cost,
    check_ways,
    checked_mass,
    enough,
    even,
    open_pairs,
)

CONSTRAINTS = ("rows", "both", "capacity")
GRADIENTS = ("envelope", "unrolled", "none")
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
        converged: Bool ``(...)``: the columns keep their constraint to the planner's tolerance.
        iterations: Iterations run on the whole batch, 0 for the closed form.
    """

    plan: Tensor
    cost: Tensor
    value: Tensor
    potentials: tuple[Tensor, Tensor]
    converged: Tensor
    iterations: int


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
        check_cost(cost)
        dtype = cost.dtype if cost.dtype == torch.float64 else torch.float32
        cost = (cost.detach() if self.gradient == "none" else cost).to(dtype)
        mask = open_pairs(mask, cost)
        default = row_mass is None
        row_mass = self._row_mass(row_mass, mask, cost)
        reach = None if mask is None else (mask & (row_mass > 0)[..., None]).any(dim=-2)
        limit = self._limit(column_mass, capacity, row_mass, reach, cost)
        if mask is not None and reach is not None and not (default and limit is None):
            limit = check_ways(self.constraint, mask, row_mass, limit, reach)
        source = cost if self.gradient == "unrolled" else cost.detach()
        scores = _scores(source / -self.epsilon, row_mass, limit, mask)
        dual, iterations = self._column_dual(scores, row_mass, limit)
        log_plan = (scores + dual[..., None, :]).log_softmax(-1) + row_mass.log()[..., None]
        return self._result(cost, scores.detach(), dual, log_plan, row_mass, limit, iterations)

    def _result(
        self,
        cost: Tensor,
        scores: Tensor,
        dual: Tensor,
        log_plan: Tensor,
        row_mass: Tensor,
        limit: Tensor | None,
        iterations: int,
    ) -> TransportPlan:
        plan = log_plan.exp()
        empty = plan.detach() == 0
        # Nothing moves there: neither -inf nor what a padded cost holds may enter a sum.
        linear = (plan * cost.masked_fill(empty, 0)).sum(dim=(-2, -1))
        entropy = (plan * log_plan.masked_fill(empty, 0)).sum(dim=(-2, -1))
        dual = dual.detach()
        row_dual = row_mass.log() - (scores + dual[..., None, :]).logsumexp(-1)
        miss = plan.detach().isnan().sum(dim=(-2, -1))
        if limit is not None:
            received = plan.detach().sum(dim=-2)
            if self.constraint == "both":
                miss = (received - limit).abs().sum(dim=-1)
            else:
                miss = _overflow(received, limit, dual).sum(dim=-1)
        return TransportPlan(
            plan=plan,
            cost=linear,
            value=linear + self.epsilon * entropy,
            potentials=(self.epsilon * row_dual, self.epsilon * dual),
            converged=miss <= self.tolerance * row_mass.sum(dim=-1),
            iterations=iterations,
        )

    def _column_dual(
        self, scores: Tensor, row_mass: Tensor, limit: Tensor | None
    ) -> tuple[Tensor, int]:
        """Returns ``g / epsilon`` and the iterations it took."""
        if limit is None:
            return scores.new_zeros(scores.shape[:-2] + scores.shape[-1:]), 0
        # Solved on totals of 1; a problem without mass gets a stand-in, its plan is 0 anyway.
        total = row_mass.sum(dim=-1, keepdim=True)
        has_mass, safe = total > 0, total.where(total > 0, 1)
        rows = (row_mass / safe).where(has_mass, 1 / row_mass.shape[-1])
        columns = (limit / safe).where(has_mass, 1 / limit.shape[-1])
        if self.constraint == "capacity":
            return self._capped_dual(scores, rows, columns)
        count, width = scores.shape[-2:]
        found = bregman_log_projection_batch(
            scores.reshape(-1, count, width),
            rows.reshape(-1, count),
            columns.reshape(-1, width),
            max_iter=self.max_iterations,
            # POT bounds the root of the squares: sqrt(N) times that bounds the sum.
            tol=self.tolerance / count**0.5,
            grad="autodiff",  # what is detached comes in detached
        )
        dual: Tensor = found["potentials"][1]
        return dual.reshape(columns.shape), found["n_iters"] + 1

    def _capped_dual(self, scores: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, int]:
        log_rows, log_columns = rows.log(), columns.log()
        dual = torch.zeros_like(columns)
        # Where all room is needed the limit is an equality: Sinkhorn's step is the faster one, and
        # duals that differ by a constant give one plan.
        full = columns.sum(dim=-1, keepdim=True) <= 1 + MASS_RTOL
        for iteration in range(1, self.max_iterations + 1):
            row_dual = log_rows - (scores + dual[..., None, :]).logsumexp(-1)
            offered = (scores + row_dual[..., None]).logsumexp(-2)
            if self.tolerance and iteration % CHECK_EVERY == 1:
                miss = _overflow((offered + dual).exp(), columns, dual).sum(dim=-1)
                if bool((miss < self.tolerance).all()):
                    break
            dual = log_columns - offered
            dual = torch.where(full, dual - dual.amax(-1, keepdim=True), dual.clamp_max(0))
        return dual, iteration

    def _row_mass(self, row_mass: Tensor | None, mask: Tensor | None, cost: Tensor) -> Tensor:
        rows = cost.shape[:-1]
        if row_mass is None:
            return even(cost.new_ones(rows) if mask is None else mask.any(dim=-1), cost)
        return checked_mass("row_mass", row_mass, rows, cost)

    def _limit(
        self,
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
            if value is not None and self.constraint != reader:
                raise ValueError(
                    f"{name} is read under constraint={reader!r}, not {self.constraint!r}"
                )
        columns = cost.shape[:-2] + cost.shape[-1:]
        total = row_mass.sum(dim=-1, keepdim=True)
        if self.constraint == "both":
            if column_mass is None:
                return total * even(cost.new_ones(columns) if reach is None else reach, cost)
            return balanced(checked_mass("column_mass", column_mass, columns, cost), total)
        if self.constraint == "capacity":
            if capacity is None:
                raise ValueError(
                    "constraint='capacity' needs capacity, the most that a column may receive: "
                    "a number or a tensor (..., M)"
                )
            return enough(capacity, columns, total, reach, cost)
        return None

    def extra_repr(self) -> str:
        return (
            f"epsilon={self.epsilon:.4g}, constraint={self.constraint!r}, "
            f"gradient={self.gradient!r}"
        )


def _scores(scores: Tensor, row_mass: Tensor, limit: Tensor | None, mask: Tensor | None) -> Tensor:
    """Closes what the mask closes: pairs by -inf, whole rows and columns (no mass there) by 0."""
    if mask is None:
        return scores
    inside = (row_mass > 0)[..., None]
    if limit is not None:
        inside = inside & (limit > 0)[..., None, :]
    # A row of -inf throughout would turn into NaN.
    return scores.masked_fill(~inside, 0).masked_fill(inside & ~mask, float("-inf"))


def _overflow(received: Tensor, capacity: Tensor, dual: Tensor) -> Tensor:
    """Returns by how much columns miss optimality: one with a price must be full, none over."""
    gap = received - capacity
    return torch.where(dual < 0, gap.abs(), gap.clamp_min(0))
