"""The predicted cost of a measured step: the bytes it moves, and the bytes and the memory that measuring adds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from noetherperf.engines.tiling import make_tables
from noetherperf.measure.cells import GramPlan, make_gram_plan
from noetherperf.measure.grams import DEFECT, driving
from noetherperf.measure.plan import Measurement, make_plan
from noetherperf.rules.law import N_START, Law, Shape
from noetherperf.rules.moments import Operand
from noetherperf.rules.sgd import SGD, Hyper
from noetherperf.symmetry import Symmetry, balances_in, validate

#: Moments that a step with plain momentum takes; Nesterov adds two.
N_TAKEN = SGD.n_taken(Hyper(lr=1.0, momentum=0.9), has_buffers=True)
FLOAT32, FLOAT64 = 4, 8  # bytes


def n_advanced(laws: Mapping[Law, Shape]) -> dict[Law, int]:
    """Rows of each law's state that a step reads and writes: all but the initial x₀ and y₀."""
    return {law: shape.n_rows - N_START for law, shape in laws.items()}


N_ADVANCED = n_advanced(SGD.laws)


@dataclass(frozen=True)
class Cost:
    """Bytes of one step of the CPU engine, and bytes that it keeps. All are integers but the overhead.

    Attributes:
        n_parameters: Σ numel.
        n_segments: How many sums of each moment are taken.
        step: Bytes that the step itself moves. With momentum these are 3 reads and 2 writes of every parameter's size
            (parameter, gradient, buffer); without, 2 reads and 1 write.
        measuring: Bytes that measuring moves, too: it writes and reads partial sums and moments, and reads and writes
            law states. For Balances it reads parameters, gradients and buffers once more.
        state: Bytes that the measurement keeps: moments, law states, propagators.
        workspace: Bytes kept for partial sums of segments that several tiles share. For Balances also those kept for
            products, and for laws while they advance.
        products: Floating-point operations of the matrix products of Balances, in the parameters' dtype but at least
            float32. A multiplication counts as two. Adam, AdamW and a Probe take one product more than SGD with
            momentum, three in the place of two.
    """

    n_parameters: int
    n_segments: int
    step: int
    measuring: int
    state: int
    workspace: int
    products: int = 0

    @property
    def overhead(self) -> float:
        """measuring / step: the predicted overhead of measuring where memory is the limit; a fraction."""
        return self.measuring / self.step if self.step else 0.0

    def __str__(self) -> str:
        return (
            f"{self.n_parameters:,} parameters, {self.n_segments:,} segments: a step moves {_bytes(self.step)}, "
            f"measuring adds {_bytes(self.measuring)} ({100 * self.overhead:.2f} %) and keeps "
            f"{_bytes(self.state)} of state and {_bytes(self.workspace)} of workspace"
            + (f"; products of units take {self.products / 1e9:.3g} GFLOP" if self.products else "")
        )


def _bytes(n: int) -> str:
    """A number of bytes, readably: powers of 1000."""
    value, unit = float(n), "B"
    for larger in ("kB", "MB", "GB", "TB", "PB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.3g} {unit}"


def cost(
    model_or_shapes: nn.Module | Mapping[str, Sequence[int]],
    symmetries: Sequence[Symmetry] = (),
    dtype: torch.dtype = torch.float32,
    *,
    momentum: bool = True,
) -> Cost:
    """Predict what a measured step costs, without making one; a model may be on the meta device.

    Args:
        model_or_shapes: A model (its parameters' own dtypes count), or shapes by parameter name. For a sharded model
            give the shapes that one rank holds.
        symmetries: What is measured.
        dtype: Dtype of the parameters, if you give only shapes: float32, float64, bfloat16 or float16.
        momentum: Whether the step has momentum.

    Returns:
        Numbers and bytes of one step; `print` puts them into a sentence.

    Raises:
        ValueError: Symmetries do not fit the parameters.

    Example:
        >>> print(nperf.cost({"w": (4096, 11008)}, [nperf.Norm("rows", [nperf.Part("w", 0)])]))  # doctest: +SKIP
    """
    if isinstance(model_or_shapes, nn.Module):
        params = {name: p.detach() for name, p in model_or_shapes.named_parameters()}
    else:
        params = {name: torch.empty(tuple(s), dtype=dtype, device="meta") for name, s in model_or_shapes.items()}
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    tensors: list[Tensor] = list(params.values())
    plan = make_plan(validate(symmetries, shapes), list(params), list(shapes.values()))
    tables = make_tables(plan, tensors, [0] * len(tensors))
    gram_plan = make_gram_plan(balances_in(symmetries), list(params), list(shapes.values()), [0] * len(tensors), SGD)
    advanced = n_advanced(plan.rule.laws)
    products, values = _of_products(gram_plan, tensors, momentum=momentum), 0  # values: float64 numbers moved
    for view in tables.views:
        shared = 2 * int(view["n_slices"]) if view["n_slices"] > 1 else 0  # each slice is written, then read
        laws = sum(advanced[law] for law, at in zip(Law, (view["translation"], view["norm"]), strict=True) if at >= 0)
        values += int(view["n_segments"]) * (N_TAKEN * (shared + 2) + 2 * laws)
    return Cost(
        sum(p.numel() for p in tensors),
        plan.n_segments,
        sum((5 if momentum else 3) * p.numel() * p.element_size() for p in tensors),
        FLOAT64 * values + products.moved,
        sum(t.numel() * t.element_size() for t in Measurement.empty(plan, "meta").tensors())
        + FLOAT64 * sum(map(prod, gram_plan.shapes.values())),
        FLOAT64 * tables.workspace + products.workspace,
        products.operations,
    )


class _Products(NamedTuple):
    """What the products of a step take: bytes moved, floating-point operations, bytes of workspace."""

    moved: int = 0
    operations: int = 0
    workspace: int = 0


def _of_products(plan: GramPlan, tensors: Sequence[Tensor], *, momentum: bool) -> _Products:
    """Operands are read once; what is computed of them stays in a cache. Laws are read in one place and written in
    another, for which there is workspace. So there is for the products of the largest cell: of a step in the
    parameters' dtype, and of charges in float64."""
    if not plan.cells:
        return _Products()
    hyper = Hyper(lr=1.0, momentum=0.9 if momentum else 0.0)
    names = {DEFECT} | driving(SGD.laws[Law.NORM], SGD.steps(hyper, 1, (Law.NORM,))[Law.NORM])
    p, g, v = torch.zeros(3, 1, device="cpu")  # which of them u is, is all that counts
    _, u = SGD.direction(p, g, (v,), hyper.coefficients())
    of = {Operand.P: p, Operand.G: g, Operand.U: u}
    taken = SGD.moments[: SGD.n_taken(hyper, has_buffers=False)]
    n_taken = len({(id(of[a]), id(of[b])) for name, a, b in taken if name in names})
    laws = FLOAT64 * sum(map(prod, plan.shapes.values()))
    moved, operations, rows = 2 * laws, 0, {FLOAT64: 1}  # rows of products, by the bytes of a number
    for cell in plan.cells:
        size = FLOAT32
        for tensor, part in cell.members:
            elements, own = part.grouped(tensors[tensor]).numel(), tensors[tensor].element_size()
            moved += (3 if momentum else 2) * elements * own
            operations += 2 * n_taken * cell.n * elements
            size = max(size, own)
        rows[size] = n_taken
    entries = max(cell.n_blocks * cell.n**2 for cell in plan.cells)
    return _Products(moved, operations, laws + entries * sum(own * n for own, n in rows.items()))
