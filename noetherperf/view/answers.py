"""Answers to the page's questions: the numbers of each picture, as JSON data.

A question is a name and a query, as in an address: "series?run=0&symmetry=3&name=charge". With "&first=100&last=200" it
is about the rows of these steps alone, at smaller distances. Arrays are float32 in base64, a row for each layer or unit
and a column for each step. What is compared is compared here, in float64.
"""

import inspect
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from noetherperf.common.paths import local_path
from noetherperf.common.printing import printable
from noetherperf.measure.printed import COLUMNS, cells
from noetherperf.measure.table import Row
from noetherperf.measure.table import row as table_row
from noetherperf.view.balances import NOT_RECORDED, Matrices, balances_of, row_of
from noetherperf.view.described import packed, run_state
from noetherperf.view.quantities import QUANTITIES, SPLIT, TERMS_OF_CHANGE, Quantity, budget
from noetherperf.view.sampled import MOST_ROWS, Sampled

MOST_UNITS = 512  # in one heat map; others are found by their number
PAUSE = 0.01  # seconds in which a request that waits for the lock goes first
Json = dict[str, Any]

TABLE = ("charge", "discrete_free", "discrete_forced", "discrete_defect", "discrete_budget")
TABLE_TOO = ("relative_defect", "angular_update", "effective_lr", "sq_g")  # where they are recorded


class Answers:
    """Answers about some records, which may be growing.

    Args:
        paths: Their directories.
        live: Whether the page is to ask again and again.
        most_rows: How many rows of each to show.

    Raises:
        FileNotFoundError, ValueError: As `open_record`.
    """

    def __init__(self, paths: Sequence[Path], *, live: bool = True, most_rows: int = MOST_ROWS) -> None:
        folders = [local_path(path).resolve() for path in paths]
        self.live = live
        self.runs = [Sampled(path, label, most_rows) for path, label in zip(folders, labels(folders), strict=True)]
        self._window: tuple[int, int] | None = None  # of steps, that the present question is about
        self._lock = threading.Lock()  # records are read, and warnings caught, one request at a time
        self._ask: dict[str, Callable[..., Json]] = {
            "versions": self.versions,
            "state": self.state,
            "layers": self.layers,
            "series": self.series,
            "budget": self.budget,
            "spectrum": self.spectrum,
            "matrix": self.matrix,
            "table": self.table,
        }

    def answer(self, question: str) -> Json:
        """The answer to a question, from any thread.

        Raises:
            LookupError: There is no such question, run, symmetry, unit or quantity, or it cannot be read now.
        """
        name, _, query = question.partition("?")
        try:
            options: dict[str, Any] = dict(parse_qsl(query, strict_parsing=bool(query)))
            options = {key: value if key in ("name", "quantity") else int(value) for key, value in options.items()}
            window = (options.pop("first"), options.pop("last")) if {"first", "last"} & {*options} else None
            inspect.signature(self._ask[name]).bind(**options)
        except (KeyError, TypeError, ValueError) as error:
            raise LookupError(f"no such question: {question!r}") from error
        try:
            with self._lock, np.errstate(all="ignore"):  # a diverged training is shown without warnings
                self._window = window
                return self._ask[name](**options)
        except (OSError, ValueError) as error:  # the record is being replaced by another one
            raise LookupError(str(error)) from error

    def questions(self) -> Iterator[str]:
        """Every question but those of single units, whose answers are rows of their symmetry's."""
        yield "state"
        for run, sampled in enumerate(self.runs):
            yield f"table?run={run}"
            yield from (f"layers?run={run}&quantity={name}" for name, x in QUANTITIES.items() if x.mapped)
            for symmetry in range(len(sampled.record)):
                yield f"budget?run={run}&symmetry={symmetry}"
                yield from (f"series?run={run}&symmetry={symmetry}&name={name}" for name in QUANTITIES)
            for matrices in balances_of(sampled):
                at = f"run={run}&symmetry={len(sampled.record) + matrices.index}"
                yield from (f"series?{at}&name={name}" for name, x in QUANTITIES.items() if x.mapped)
                for block in range(matrices.blocks):
                    yield f"spectrum?{at}&block={block}"
                    yield from (f"matrix?{at}&block={block}&row={row}" for row in matrices.rows_in_a_file())

    def read_ahead(self) -> None:
        """Read what the page may ask for next, so that clicks need not wait for the disk."""
        needs = [name for quantity in QUANTITIES.values() for name in quantity.needs]
        with suppress(LookupError, OSError, ValueError):  # a record is being replaced; whoever asks for it is told
            for sampled in self.runs:
                for name in sampled.recorded([*needs, *TERMS_OF_CHANGE, *SPLIT]):
                    with self._lock:
                        sampled.series(name)
                    time.sleep(PAUSE)
            for question in self.questions():
                if question.startswith("layers"):
                    self.answer(question)
                    time.sleep(PAUSE)

    def versions(self) -> Json:
        """For each run a number that increases when there is something new to see."""
        for run in self.runs:
            run.follow()
        return {"versions": [run.version for run in self.runs]}

    def state(self) -> Json:
        """What there is: runs with their symmetries and settings, and the quantities."""
        quantities = [
            {"name": name, "title": x.title, "meaning": x.meaning, "mapped": x.mapped} for name, x in QUANTITIES.items()
        ]
        runs = [run_state(run, live=self.live) for run in self.runs]
        return {"live": self.live, "runs": runs, "quantities": quantities, "most_units": MOST_UNITS}

    def layers(self, run: int, quantity: str) -> Json:
        """A quantity of every layer: of each symmetry, one number a step."""
        sampled, wanted = self._run(run), QUANTITIES[quantity]
        if not sampled.has(wanted.needs):
            return {"missing": _missing(sampled, wanted.title, wanted.needs)}
        values = sampled.once(f"layers/{quantity}", lambda new: _reduced(sampled, wanted, new)).T
        if wanted.predicts:
            values = np.where(np.reshape(sampled.record.attrs["closed"], (-1, 1)), values, np.nan)
        values = np.concatenate([values, *(balance.of_layer(quantity)[None] for balance in balances_of(sampled))])
        return {"steps": sampled.steps.tolist(), "values": packed(values)}

    def series(self, run: int, symmetry: int, name: str, unit: int | None = None) -> Json:
        """A quantity of a symmetry's units, or of one of them."""
        sampled, wanted = self._run(run), QUANTITIES[name]
        if (at := symmetry - len(sampled.record)) in range(len(sampled.record.balances)):
            return self._series_of(Matrices(sampled, at), sampled, name)
        groups = self._groups(sampled, symmetry)
        n_units = groups.stop - groups.start
        if unit is not None and not 0 <= unit < n_units:
            raise LookupError(f"no unit {unit}: there are {n_units}")
        if not sampled.has(wanted.needs):
            return {"missing": _missing(sampled, wanted.title, wanted.needs)}
        if wanted.predicts and not sampled.record.attrs["closed"][symmetry]:
            return {"missing": f"{wanted.title}: the law is open, and predicts nothing"}
        units = np.array([unit]) if unit is not None else spread_units(n_units)
        values = _values(sampled, wanted, groups)[:, units]
        return {"steps": sampled.steps.tolist(), "units": units.tolist(), "values": packed(values.T)}

    def _series_of(self, matrices: Matrices, sampled: Sampled, name: str) -> Json:
        """A quantity of a Balance's eigenvalues, or of its blocks."""
        found = matrices.map(name, QUANTITIES[name])
        if isinstance(found, str):
            return {"missing": found}
        values, blocks = found
        lines = spread_units(len(blocks))
        texts = [f"{blocks[i]}: {i % matrices.n}" if len(blocks) > matrices.blocks else f"{i}" for i in lines.tolist()]
        answer = {"units": lines.tolist(), "blocks": [blocks[i] for i in lines.tolist()], "texts": texts}
        return {"steps": sampled.steps.tolist(), "values": packed(values[:, lines].T), **answer}

    def spectrum(self, run: int, symmetry: int, block: int) -> Json:
        """Eigenvalues of one block of a Balance, measured and predicted, and how far its law is off."""
        sampled, matrices = self._matrices(run, symmetry, block)
        found = {name: packed(values) for name, values in matrices.spectrum(block).items()}
        return {"steps": sampled.steps.tolist(), "lines": found, "of": matrices.n}

    def matrix(self, run: int, symmetry: int, block: int, row: int) -> Json:
        """The matrices of one block of a Balance in one row: charge, law and residual."""
        sampled, matrices = self._matrices(run, symmetry, block)
        if not matrices.has_matrices:
            return {"missing": NOT_RECORDED}
        if not 0 <= row < len(sampled.rows):
            raise LookupError(f"no row {row}: there are {len(sampled.rows)}")
        found = {name: packed(values) for name, values in matrices.matrix(block, row).items()}
        return {"step": int(sampled.steps[row]), "matrices": found, "of": matrices.n}

    def budget(self, run: int, symmetry: int) -> Json:
        """Why a symmetry's charge has changed since the start: decay, growth, defect, rounding; means over units."""
        sampled = self._run(run)
        groups = self._groups(sampled, symmetry)
        if not sampled.has(TERMS_OF_CHANGE):
            return {"missing": _missing(sampled, "the budget", TERMS_OF_CHANGE)}
        needs = (*TERMS_OF_CHANGE, *SPLIT) if sampled.has(SPLIT) else TERMS_OF_CHANGE
        terms = budget(sampled.data(needs, groups), closed=sampled.record.attrs["closed"][symmetry])
        means = {name: packed(term.mean(axis=1)[None]) for name, term in terms.items() if term.size}
        return {"steps": sampled.steps.tolist(), "terms": means}

    def table(self, run: int) -> Json:
        """A row for each symmetry, of the last recorded step, worst first: the table of a readout."""
        sampled = self._run(run)
        rows = []
        if len(sampled.rows):
            rows = _rows(sampled) if sampled.has(TABLE) else []
            rows = sorted([*rows, *map(row_of, balances_of(sampled))], key=lambda row: row.rank)
        if not sampled.has(TABLE) and not rows:
            return {"missing": _missing(sampled, "the table", TABLE)}
        listed = [{"key": row.name, "cells": [printable(cell) for cell in cells(row)]} for row in rows]
        return {
            "headings": list(COLUMNS),
            "texts": [name for name, is_text in COLUMNS.items() if is_text],
            "rows": listed,
        }

    def _run(self, run: int) -> Sampled:
        if not 0 <= run < len(self.runs):
            raise LookupError(f"no run {run}: there are {len(self.runs)}")
        return self.runs[run].within(*self._window) if self._window else self.runs[run]

    def _matrices(self, run: int, symmetry: int, block: int) -> tuple[Sampled, Matrices]:
        sampled = self._run(run)
        index = symmetry - len(sampled.record)
        if not 0 <= index < len(sampled.record.balances):
            raise LookupError(f"symmetry {symmetry} is no Balance")
        matrices = Matrices(sampled, index)
        if not 0 <= block < matrices.blocks:
            raise LookupError(f"no block {block}: there are {matrices.blocks}")
        return sampled, matrices

    def _groups(self, sampled: Sampled, symmetry: int) -> slice:
        if not 0 <= symmetry < len(sampled.record):
            raise LookupError(f"no symmetry {symmetry}: there are {len(sampled.record)}")
        return sampled.groups(symmetry)


def labels(paths: Sequence[Path]) -> list[str]:
    """Short names for records: their paths without what all of them begin and end with."""
    if len(paths) == 1:
        return ["/".join(paths[0].parts[-2:])]
    parts = [path.parts for path in paths]
    shortest = min(map(len, parts))
    begin = next((i for i in range(shortest) if len({p[i] for p in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - begin) if len({p[-1 - i] for p in parts}) > 1), 0)
    return ["/".join(p[begin : len(p) - end]) or p[-1] for p in parts]


def spread_units(n: int) -> NDArray[np.int64]:
    """Numbers of the units that a heat map shows: all, or MOST_UNITS at even distances."""
    return np.unique(np.linspace(0, n - 1, min(n, MOST_UNITS)).round().astype(np.int64))


def _values(sampled: Sampled, quantity: Quantity, groups: slice) -> NDArray[np.float64]:
    """[rows, groups]"""
    return quantity.of(sampled.data(quantity.needs, groups))


def _reduced(sampled: Sampled, quantity: Quantity, new: NDArray[np.bool_]) -> NDArray[np.float64]:
    """A quantity of every layer, in new rows, [new rows, layers]."""
    values = quantity.of(sampled.data(quantity.needs, slice(None), rows=new))
    layers = [quantity.reduce(values[:, sampled.groups(i)]) for i in range(len(sampled.record))]
    return np.reshape(layers, (len(layers), len(values))).T


def _missing(sampled: Sampled, what: str, needs: Sequence[str]) -> str:
    absent = [name for name in needs if not sampled.has((name,))]
    return f"{what}: the record has no series {', '.join(absent)}"


def _rows(sampled: Sampled) -> list[Row]:
    """The table of the last recorded step."""
    record = sampled.record
    needs = [*TABLE, *(name for name in (*SPLIT, *TABLE_TOO) if sampled.has((name,)))]
    data = dict(sampled.data(needs, slice(None), last=True))
    if any(np.isnan(data.get(name, np.nan)).all() for name in SPLIT):  # the rule does not have them
        data = {name: values for name, values in data.items() if name not in SPLIT}
    dtypes = record.attrs["dtypes"] if len(record.attrs["dtypes"]) == 1 else ()  # of which parameter is not recorded
    rows = []
    for index, symmetry in enumerate(record.symmetries):
        groups = sampled.groups(index)
        values = {name: (x if x.ndim == 1 else x[-1])[groups] for name, x in data.items()}
        reason = record.attrs["reason"][index]
        rows.append(
            table_row(
                symmetry.name,
                symmetry.kind,
                values,
                rule=record.rule,
                step=int(sampled.steps[-1]),
                reason=reason,
                dtypes=dtypes,
            )
        )
    return rows
