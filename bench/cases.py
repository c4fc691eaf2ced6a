"""Cases: shapes of known models, dtypes, views and hyperparameters, as data; and which cases a run takes."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from math import prod
from typing import Any

import torch

from bench.recipes import RECIPES, Recipe
from bench.training import TRAIN
from noetherperf import Norm, Part, Symmetry

Shape = tuple[int, ...]
Shapes = tuple[Shape, ...]

#: Axes along which every tensor's units are measured; None: the whole tensor is one group.
VIEWS: dict[str, tuple[int | None, ...]] = {
    "none": (),
    "rows": (0,),
    "columns": (1,),
    "both": (0, 1),
    "whole": (None,),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class Case:
    """Tensors to step and measure, and by which recipe. `point` is the number that varies in a suite of costs against
    something."""

    suite: str
    model: str
    shapes: Shapes
    dtype: str = "float32"
    view: str = "none"
    rule: str = "b0.9"  # a key of RECIPES
    threads: int | None = None
    point: int = 0

    @property
    def name(self) -> str:
        threads = "" if self.threads is None else f"-t{self.threads}"
        return f"{self.model}-{self.dtype}-{self.view}-{self.rule}{threads}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.rule]

    @property
    def names(self) -> list[str]:
        return [f"w{i}" for i in range(len(self.shapes))]

    @property
    def n_parameters(self) -> int:
        return sum(map(prod, self.shapes))

    @property
    def bytes_held(self) -> int:
        """Of parameters, gradients and buffers."""
        return self.recipe.passes[0] * self.torch_dtype.itemsize * self.n_parameters

    @property
    def bytes_moved(self) -> int:
        """That a step must read and write."""
        return sum(self.recipe.passes) * self.torch_dtype.itemsize * self.n_parameters

    def described(self) -> dict[str, Any]:
        """The case as results name it, beside its figures."""
        return {
            "case": self.name,
            "suite": self.suite,
            "model": self.model,
            "dtype": self.dtype,
            "view": self.view,
            "rule": self.rule,
            "parameters": self.n_parameters,
            "tensors": len(self.shapes),
            "bytes moved": self.bytes_moved,
        }

    def symmetries(self) -> list[Symmetry]:
        return norms(dict(zip(self.names, self.shapes, strict=True)), self.view)


def norms(shapes: Mapping[str, Shape], view: str) -> list[Symmetry]:
    """A norm and its budget for every unit along the view's axes; tensors without such an axis are not measured."""
    return [
        Norm(f"{name}[{axis}]", [Part(name, axis)])
        for axis in VIEWS[view]
        for name, shape in shapes.items()
        if axis is None or axis < len(shape)
    ]


# ---- models ---------------------------------------------------------------------------------------------------------


def _vgg16(n_classes: int) -> Iterator[Shape]:
    """For 64×64 images: five poolings leave 2×2 positions of 512 channels."""
    channels = (3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
    for n_in, n_out in pairwise(channels):
        yield from ((n_out, n_in, 3, 3), (n_out,))
    for n_in, n_out in pairwise((512 * 2 * 2, 4096, 4096, n_classes)):
        yield from ((n_out, n_in), (n_out,))


def _resnet50() -> Iterator[Shape]:
    """Bottleneck blocks, each convolution followed by the weight and bias of its BatchNorm."""

    def convolution(n_in: int, n_out: int, kernel: int) -> Iterator[Shape]:
        yield from ((n_out, n_in, kernel, kernel), (n_out,), (n_out,))

    yield from convolution(3, 64, 7)
    n_in = 64
    for width, n_blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(n_blocks):
            yield from convolution(n_in, width, 1)
            yield from convolution(width, width, 3)
            yield from convolution(width, 4 * width, 1)
            if block == 0:
                yield from convolution(n_in, 4 * width, 1)
            n_in = 4 * width
    yield from ((1000, 2048), (1000,))


def _gpt2(d: int, n_blocks: int) -> Iterator[Shape]:
    """GPT-2 of width d; the output head shares the embedding."""
    yield from ((50257, d), (1024, d))
    for _ in range(n_blocks):
        yield from ((d,), (d,), (3 * d, d), (3 * d,), (d, d), (d,))
        yield from ((d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,))
    yield from ((d,), (d,))


def _mlp(*widths: int) -> Iterator[Shape]:
    for n_in, n_out in pairwise(widths):
        yield from ((n_out, n_in), (n_out,))


MODELS: dict[str, Shapes] = {
    "matrix": ((4096, 11008),),
    "resnet50": tuple(_resnet50()),
    "vgg16": tuple(_vgg16(200)),
    "small2000": ((64, 64),) * 2000,
    "gpt2": tuple(_gpt2(768, 12)),
    "embedding": ((50257, 768),),
    "mlp": tuple(_mlp(3079, 4099, 2053, 1021, 509, 97, 11)),
}

#: Too large for the bandwidth of a CPU's memory.
LARGE_MODELS: dict[str, Shapes] = {
    "gpt2-xl": tuple(_gpt2(1600, 48)),
    "billion": ((25_000, 40_000),),
}

#: Networks of bench.networks, trained as a whole.
TRAINED: dict[str, Shapes] = {
    "train-resnet50": MODELS["resnet50"],
    "train-gpt2": MODELS["gpt2"],
    "train-mlp": tuple(_mlp(64, 84, 50, 10)),
}

# ---- cases ----------------------------------------------------------------------------------------------------------


def _matrices(n: int, at_most: int = 1 << 24) -> Shapes:
    """n parameters as square-like matrices of at most so many elements, the last one shorter."""
    width = int(min(n, at_most) ** 0.5)
    full, rest = divmod(n // width, max(1, at_most // width))
    return ((max(1, at_most // width), width),) * full + (((rest, width),) if rest else ())


def _everything() -> Iterator[Case]:
    for model, shapes in MODELS.items():
        for dtype in DTYPES:
            for rule in RECIPES:
                for view in VIEWS:
                    yield Case("step", model, shapes, dtype, view, rule)
    for count, shape in ((1, (8, 8)), (161, (8, 8)), (2000, (1, 1))):
        for rule in ("b0.9", "adamw"):
            for view in ("none", "rows"):
                yield Case("host", f"host{count}", (shape,) * count, view=view, rule=rule, point=count)
    for n in (10_000, 100_000, 1_000_000, 10_000_000, 100_000_000, 200_000_000):
        yield Case("parameters", f"parameters{n}", _matrices(n), view="both", point=n)
    for n in (1, 100, 10_000, 100_000, 1_000_000):
        yield Case("groups", f"groups{n}", ((n, 16_000_000 // n),), view="rows", point=n)
        yield Case("groups", f"groups{n}", ((16_000_000 // n, n),), view="columns", point=n)
    for n in (1, 10, 100, 1000, 10_000):
        yield Case("tensors", f"tensors{n}", ((4000, 4000 // n) if n < 1000 else (128, 128_000 // n),) * n, point=n)
    n_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for n in sorted({n_cores, *(1 << i for i in range(n_cores.bit_length()) if 1 << i <= n_cores)}):
        yield Case("threads", f"threads{n}", ((4096, 4096),), view="both", threads=n, point=n)
    for model, shapes in TRAINED.items():
        for rule in ("b0.9", "adamw"):
            yield Case(TRAIN, model, shapes, view="both", rule=rule)


EVERYTHING = tuple(_everything())


def _in_full(case: Case) -> bool:
    """Every view of every model in float32; the other dtypes and β = 0 on none and both.

    Whole tensors are measured as fast as any rows, and once is enough to see it.
    """
    if case.suite != "step":
        return True
    if case.view == "whole" and case.model != "resnet50":
        return False
    if case.rule == "b0":
        return case.dtype == "float32" and case.view in ("none", "both") and case.model in ("matrix", "resnet50")
    if case.dtype == "float64" and case.model not in ("matrix", "mlp"):
        return False
    return case.dtype == "float32" or case.view in ("none", "both")


QUICK_STEPS = (
    *(
        f"{model}-float32-{view}-b0.9"
        for model in ("matrix", "resnet50", "vgg16", "small2000")
        for view in ("none", "rows", "columns", "both")
    ),
    "resnet50-float32-whole-b0.9",
    "matrix-bfloat16-both-b0.9",
    "resnet50-bfloat16-both-b0.9",
    "resnet50-float32-both-b0",
    "embedding-float32-rows-b0.9",
    "mlp-float32-both-b0.9",
    *(
        f"{model}-float32-{view}-adamw"
        for model in ("matrix", "resnet50", "small2000")
        for view in ("none", "rows", "columns", "both")
    ),
    *(f"gpt2-float32-{view}-adamw" for view in ("rows", "both")),
)


def _in_quick(case: Case) -> bool:
    match case.suite:
        case "step":
            return case.name in QUICK_STEPS
        case "parameters":
            return case.point <= 10_000_000
        case "groups":
            return case.point in (1, 10_000, 1_000_000)
        case "train":
            return case.name != "train-gpt2-float32-both-b0.9"
        case _:
            return True


def selected(which: str, patterns: str = "") -> list[Case]:
    """The cases of a run.

    Args:
        which: "quick" or "full".
        patterns: Names or shell patterns of names, separated by commas; they choose from every case, those in neither
            set included.

    Raises:
        ValueError: An unknown set, or a pattern that matches nothing.
    """
    sets = {"quick": _in_quick, "full": _in_full}
    if which not in sets:
        raise ValueError(f"BENCH={which!r} is unknown; choose one of {', '.join(sets)}")
    if not patterns:
        return [case for case in EVERYTHING if sets[which](case)]
    chosen: list[Case] = []
    for pattern in patterns.split(","):
        found = [case for case in EVERYTHING if fnmatchcase(case.name, pattern.strip())]
        if not found:
            raise ValueError(
                f"BENCH_CASES: no case is called {pattern!r}; names read model-dtype-view-rule, such as "
                f"{EVERYTHING[0].name}, and may hold * and ?"
            )
        chosen += [case for case in found if case not in chosen]
    return chosen
