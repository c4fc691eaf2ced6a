"""Checks of symmetries: their geometric constraints on a model's gradients and Hessian, and their laws in training."""

from noetherperf.checks.constraints import Constraints, check_constraints

__all__ = ["Constraints", "check_constraints"]
