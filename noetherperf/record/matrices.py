"""What is recorded of a Balance: its spectrum, and its matrices where they are asked for; as vectors, like probes."""

from collections.abc import Callable

from torch import Tensor

from noetherperf.measure.readout import Readout

__all__ = ["of_balances"]


def of_balances(readout: Readout, matrices: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> vector of each Balance in a readout.

    Args:
        readout: With them.
        matrices: Whether to record the matrices, too.

    Returns:
        "attn: eigenvalues" and "attn: predicted eigenvalues", [blocks · n]; "attn: charge" and "attn: predicted
        charge", [blocks · n · n], if `matrices`.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for name, law in readout.balances.items():
        found[f"{name}: eigenvalues"] = law.eigenvalues.flatten
        found[f"{name}: predicted eigenvalues"] = law.predicted_eigenvalues.flatten
        if matrices:
            found[f"{name}: charge"] = law.charge.flatten
            found[f"{name}: predicted charge"] = law.discrete.total.flatten
    return found
