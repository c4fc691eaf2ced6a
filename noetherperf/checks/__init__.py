"""Checks of symmetries: their constraints on the gradient and the Hessian of a loss, at one point."""

from noetherperf.checks.constraints import check_constraints
from noetherperf.checks.report import Constraints

__all__ = ["Constraints", "check_constraints"]
