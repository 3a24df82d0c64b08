"""Entropic transport plans under row, both-marginal or capacity limits."""

from structkd.transport.planner import LagrangianPlanner, TransportPlan

__all__ = ["LagrangianPlanner", "TransportPlan"]
