"""What there is on the page: runs with their symmetries and settings, as JSON data."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from noetherperf.common.printing import printable
from noetherperf.view.balances import NOT_RECORDED, Matrices, balances_of
from noetherperf.view.sampled import Sampled

__all__ = ["packed", "run_state"]

Json = dict[str, Any]


def packed(values: NDArray[np.float64]) -> Json:
    """An array as JSON data: its shape, and its numbers as little-endian float32 in base64."""
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(values, dtype="<f4")
    return {"shape": list(values.shape), "float32": base64.b64encode(numbers.tobytes()).decode("ascii")}


def run_state(run: Sampled, *, live: bool) -> Json:
    record = run.record
    laws = zip(record.symmetries, *(record.attrs[key] for key in ("n_groups", "closed", "reason")), strict=True)
    return {
        "label": printable(run.label),
        "version": run.version,
        "rows": len(record.steps),
        "steps": run.steps.tolist(),
        "symmetries": [
            {
                "key": s.name,
                "name": printable(s.name),
                "kind": s.kind,
                "units": n,
                "closed": closed,
                "reason": printable(reason),
            }
            for s, n, closed, reason in laws
        ]
        + [_balance(matrices, live=live) for matrices in balances_of(run)],
        "settings": _settings(run),
        "probes": {printable(name): packed(values[None]) for name, values in run.probes.items()},
        "faults": [printable(fault) for fault in run.faults],
    }


def _balance(matrices: Matrices, *, live: bool) -> Json:
    """As a symmetry of `_run`; with its number of blocks, and the rows in which there are matrices (None: all)."""
    rows = None if live and matrices.has_matrices else matrices.rows_in_a_file()
    why = "this file has no room for these matrices" if matrices.has_matrices else NOT_RECORDED
    law = {"key": matrices.name, "name": printable(matrices.name), "kind": "balance"}
    size = {"units": matrices.blocks * matrices.n, "blocks": matrices.blocks}
    state = {"closed": matrices.closed, "reason": printable(matrices.reason)}
    return law | size | state | {"matrices": rows, "why": why}


def _settings(run: Sampled) -> dict[str, str]:
    """What a run was made with, by name. An option that changed on the way has its first and its last value."""
    record, found = run.record, dict[str, str]()
    found["update rule"] = record.rule
    for name, ends in run.options.items():
        texts = [", ".join(f"{x:g}" for x in np.unique(end[np.isfinite(end)])) for end in ends]
        found[name] = " → ".join(dict.fromkeys(texts))
    found["last step"] = f"{record.steps[-1]:,}" if len(record.steps) else ""
    for key in ("every", "backend", "dtypes", "versions"):
        value = record.attrs.get(key, "")
        if isinstance(value, Mapping):
            found |= {f"version of {name}": str(version) for name, version in value.items()}
        else:
            found[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return {printable(name): printable(value) for name, value in found.items()}
