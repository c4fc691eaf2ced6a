"""The result of find_symmetries: a sequence that an optimizer takes, with a table and JSON."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

from rich.console import Console, ConsoleOptions, RenderResult
from rich.filesize import decimal
from rich.text import Text

from noetherperf.common.printing import printable
from noetherperf.common.table import ReportTable
from noetherperf.symmetry import Symmetry, from_json, to_json
from noetherperf.symmetry.explain import charge_formula
from noetherperf.symmetry.names import find

__all__ = ["Symmetries"]


class Symmetries(Sequence[Symmetry]):
    """The symmetries of a model, for an optimizer to measure, and the reasons for what is missing.

    Indexed by number, slice or name. Two are equal if all their content is. `print` shows a table.

    Attributes:
        meanings: Symmetry name -> its meaning in a few words.
        defects: Symmetry name -> the largest relative defect |⟨g, ψ⟩| / (|g_A| |ψ_A|) on batches that were not used to
            find it; empty without verification.
        unmatched: Parameter name -> why it is in no symmetry.
        rejected: Symmetry name -> why the relation is not claimed.
        outputs: Name of each tensor in the model's output -> whether these laws count on a loss that reads it; empty
            where the loss was given as a function.
        undecided: What was not searched to the end -> why.
        costs: What the matrices cost (`nperf.cost`): floating-point operations of a step with momentum, "products", and
            bytes that are kept, "state"; empty without matrices.
    """

    def __init__(
        self,
        symmetries: Sequence[Symmetry] = (),
        *,
        meanings: Mapping[str, str] | None = None,
        defects: Mapping[str, float] | None = None,
        unmatched: Mapping[str, str] | None = None,
        rejected: Mapping[str, str] | None = None,
        outputs: Mapping[str, str] | None = None,
        undecided: Mapping[str, str] | None = None,
        costs: Mapping[str, int] | None = None,
    ) -> None:
        self._symmetries = tuple(symmetries)
        self.meanings = dict(meanings or {})
        self.defects = dict(defects or {})
        self.unmatched = dict(unmatched or {})
        self.rejected = dict(rejected or {})
        self.outputs = dict(outputs or {})
        self.undecided = dict(undecided or {})
        self.costs = dict(costs or {})

    @overload
    def __getitem__(self, key: int | str) -> Symmetry: ...
    @overload
    def __getitem__(self, key: slice) -> tuple[Symmetry, ...]: ...
    def __getitem__(self, key: int | str | slice) -> Symmetry | tuple[Symmetry, ...]:
        if isinstance(key, str):
            named = {symmetry.name: symmetry for symmetry in self._symmetries}
            return named[key if key in named else find(key, self._symmetries, f"no symmetry is named {key!r}")]
        return self._symmetries[key]

    def __len__(self) -> int:
        return len(self._symmetries)

    def __iter__(self) -> Iterator[Symmetry]:
        return iter(self._symmetries)

    def _data(self) -> dict[str, Any]:
        names = ("meanings", "defects", "unmatched", "rejected", "outputs", "undecided", "costs")
        return {name: getattr(self, name) for name in names}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Symmetries):
            return NotImplemented
        return self._symmetries == other._symmetries and self._data() == other._data()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> str:
        """Everything as JSON text, which `from_json` reads back equal."""
        return json.dumps(json.loads(to_json(self._symmetries)) | self._data(), indent=2, ensure_ascii=False)

    @staticmethod
    def from_json(text: str) -> "Symmetries":
        """Symmetries from the text of `to_json`; nothing in it is executed.

        Raises:
            ValueError: The text is not JSON, has another version, or an unknown kind or field.
        """
        data = json.loads(text)
        if not isinstance(data, dict):
            raise ValueError(f"symmetries file: must be an object, got {type(data).__name__}")
        extra = {name: data.pop(name) for name in Symmetries()._data() if name in data}
        for name, value in extra.items():
            if not isinstance(value, dict):
                raise ValueError(f"symmetries file: {name} must be an object, got {value!r}")
        return Symmetries(from_json(json.dumps(data)), **extra)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = ReportTable(box=None, header_style="bold", pad_edge=False, padding=(0, 1))
        for title in ("symmetry", "kind", "conserved, for each group", "meaning"):
            table.add_column(title, folds=title != "kind")
        for symmetry in self._symmetries:
            formula = charge_formula(symmetry.kind, symmetry.parts)
            cells = (symmetry.name, symmetry.kind, formula, self.meanings.get(symmetry.name, ""))
            table.add_row(*cells)
        yield table
        if self.costs:
            products = decimal(self.costs["products"]).removesuffix("bytes").removesuffix("B")
            yield Text(
                f"\nmatrices: their products take {products}FLOP a step, and their laws keep "
                f"{decimal(self.costs['state'])}; matrix=False claims the diagonals alone"
            )
        outputs = self.outputs if set(self.outputs.values()) != {"read"} else {}
        for title, reasons in (
            ("in no symmetry", self.unmatched),
            ("not claimed", self.rejected),
            ("not decided", self.undecided),
            ("outputs", outputs),
        ):
            if reasons:
                yield Text(f"\n{title}:")
                for name, reason in reasons.items():
                    yield Text(printable(f"  {name}: {reason}"), overflow="fold")

    def __str__(self) -> str:
        out = io.StringIO()
        Console(file=out, width=160, color_system=None, force_jupyter=False).print(self, soft_wrap=True)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def __repr__(self) -> str:
        kinds = [symmetry.kind for symmetry in self._symmetries]
        counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(sorted(kinds, reverse=True)))
        return f"<{len(self)} symmetries: {counts or 'none'}; {len(self.unmatched)} parameters in none>\n{self}"
