"""Instruction sets of the CPU engine: which the processor has, whether each computes correctly, and which is used.

The first use of a set in a process checks its kernels against plain loops (csrc/self_check.cpp), in about six
milliseconds: a wrong sum would look like any other number. A set that fails is left out with a warning.
"""

import os
import warnings
from functools import cache

from noetherperf import _cpu

__all__ = ["VARIABLE", "choose", "fault", "unusable"]

#: The environment variable that names the instruction set to use.
VARIABLE = "NOETHERPERF_ISA"


@cache
def fault(isa: str) -> str:
    """What is wrong with an instruction set's kernels on this processor; empty if all is right.

    Args:
        isa: One of `_cpu.isas()`.
    """
    return _cpu.self_check(isa)


def choose() -> str:
    """The instruction set to use: the one that NOETHERPERF_ISA names, else the best one that computes correctly.

    Raises:
        ValueError: NOETHERPERF_ISA names a set that this processor or build does not have.
        RuntimeError: The named set, or every set, computes wrong numbers here.
    """
    isas = _cpu.isas()
    named = os.environ.get(VARIABLE, "")
    if named:
        if named not in isas:
            raise ValueError(
                f"{VARIABLE}={named!r} is not available here; choose one of {', '.join(isas)}, or unset it for the best"
            )
        if wrong := fault(named):
            raise RuntimeError(
                f"{VARIABLE}={named!r} computes wrong numbers on this processor ({wrong}); choose another of "
                f"{', '.join(isas)}, or unset it"
            )
        return named
    if reason := unusable():
        raise RuntimeError(reason)
    return next(isa for isa in isas if not fault(isa))


def unusable() -> str | None:
    """Why no instruction set is usable; None if one is. Warns of each better one that is not."""
    isas = _cpu.isas()
    if not all(map(_warn, isas)):  # stops at the first that can
        return None
    return (
        f"the compiled kernels compute wrong numbers on this processor ({isas[0]}: {fault(isas[0])}); build them anew "
        '(pip install -e .), or use backend="reference"'
    )


@cache
def _warn(isa: str) -> bool:
    """Warn once if an instruction set fails its self-check; returns whether it fails."""
    if wrong := fault(isa):
        warnings.warn(
            f"instruction set {isa} is not used: its kernels compute wrong numbers on this processor ({wrong}). Please "
            "report it, with what `noetherperf info` prints",
            RuntimeWarning,
            stacklevel=2,
        )
    return bool(wrong)
