"""The cases of a GPU run, cut into parts of less than four minutes; parts and cases in order of worth, for time may run
out.
"""

from fnmatch import fnmatchcase

from bench.cases import LARGE_MODELS, MODELS, TRAINED, Case
from bench.training import STEPS, TRAIN

MAX_COMPILED = 20  # tensors: compiling takes seconds for each, and a part has minutes

NONE_ROWS_BOTH = ("none", "rows", "both")
MATRIX = ("none", "rows", "columns", "both")

#: Per part of the report its cases: model, dtype, views, rule.
PLAN: dict[str, list[tuple[str, str, tuple[str, ...], str]]] = {
    "bench-adamw": [
        ("gpt2", "float32", NONE_ROWS_BOTH, "adamw"),
        ("gpt2", "bfloat16", NONE_ROWS_BOTH, "adamw"),
        ("resnet50", "float32", NONE_ROWS_BOTH, "adamw"),
        ("gpt2", "bfloat16", NONE_ROWS_BOTH, "b0.9"),
        ("billion", "float32", NONE_ROWS_BOTH, "adamw"),
        ("matrix", "float32", MATRIX, "adamw"),
    ],
    "bench-small": [
        ("small2000", "float32", NONE_ROWS_BOTH, "adamw"),
        ("small2000", "float32", NONE_ROWS_BOTH, "b0.9"),
        ("host161", "float32", ("none", "rows"), "adamw"),
        ("host161", "float32", ("none", "rows"), "b0.9"),
        ("host2000", "float32", ("none", "rows"), "b0.9"),
        ("vgg16", "float32", NONE_ROWS_BOTH, "b0.9"),
        ("embedding", "float32", ("rows",), "b0.9"),
        ("mlp", "float32", ("none", "both"), "b0.9"),
    ],
    "bench-16-bits": [
        ("gpt2-xl", "bfloat16", ("none", "both"), "adamw"),
        ("resnet50", "bfloat16", NONE_ROWS_BOTH, "adamw"),
        ("resnet50", "bfloat16", NONE_ROWS_BOTH, "b0.9"),
        ("matrix", "bfloat16", ("none", "both"), "adamw"),
        ("matrix", "bfloat16", NONE_ROWS_BOTH, "b0.9"),
        ("matrix", "float16", ("none", "both"), "b0.9"),
        ("gpt2-xl", "bfloat16", ("none", "both"), "b0.9"),
        ("billion", "bfloat16", ("none", "both"), "b0.9"),
    ],
    "bench-train": [(model, "float32", ("both",), rule) for model in TRAINED for rule in ("adamw", "b0.9")],
    "bench-large": [
        ("gpt2-xl", "float32", NONE_ROWS_BOTH, "adamw"),
        ("gpt2-xl", "float32", NONE_ROWS_BOTH, "b0.9"),
        ("matrix", "float32", ("none", "both"), "b0"),
        ("matrix", "float64", ("none", "both"), "b0.9"),
    ],
    "bench-sgd": [
        ("resnet50", "float32", (*NONE_ROWS_BOTH, "columns", "whole"), "b0.9"),
        ("gpt2", "float32", NONE_ROWS_BOTH, "b0.9"),
        ("billion", "float32", NONE_ROWS_BOTH, "b0.9"),
        ("matrix", "float32", MATRIX, "b0.9"),
    ],
}
SHAPES = {**MODELS, **LARGE_MODELS, **TRAINED, "host161": ((8, 8),) * 161, "host2000": ((1, 1),) * 2000}


def _suite(model: str) -> str:
    return TRAIN if model in TRAINED else "host" if model.startswith("host") else STEPS


#: Per part its cases, the most important ones first.
CASES_OF = {
    part: tuple(
        Case(_suite(model), model, SHAPES[model], dtype, view, rule)
        for model, dtype, views, rule in plan
        for view in views
    )
    for part, plan in PLAN.items()
}
CASES = tuple(case for cases in CASES_OF.values() for case in cases)


def expected_seconds(case: Case) -> float:
    """About how long a case takes: what is timed, its inputs and its gate, and kernels that torch.compile makes."""
    if case.suite == TRAIN:
        return 15.0
    compiling = 2.0 if len(case.shapes) <= MAX_COMPILED else 0.0
    return 3.0 + compiling + 2.0 * case.n_parameters * case.torch_dtype.itemsize / 4e9


def chosen(patterns: str, part: str = "") -> list[Case]:
    """The cases of a part, "": of all, whose names match one of the patterns, separated by commas; "": all.

    Raises:
        ValueError: There is no such part, or a pattern matches no case of any part.
    """
    if part and part not in CASES_OF:
        raise ValueError(f"--part: there is no part {part!r}; choose one of {', '.join(CASES_OF)}")
    cases = CASES_OF[part] if part else CASES
    if not patterns:
        return list(cases)
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(case.name, pattern) for case in CASES):
            raise ValueError(f"--cases: no case is called {pattern!r}; there are {', '.join(c.name for c in CASES)}")
    return [case for case in cases if any(fnmatchcase(case.name, pattern) for pattern in wanted)]
