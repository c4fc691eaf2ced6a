"""The cases of a GPU run, the most important ones first, for time may run out."""

from fnmatch import fnmatchcase

from bench.cases import LARGE_MODELS, MODELS, Case

SUITE = "gpu"

#: Model, dtype, views, rule.
PLAN: list[tuple[str, str, tuple[str, ...], str]] = [
    ("resnet50", "float32", ("none", "rows", "both"), "b0.9"),
    ("billion", "float32", ("none", "rows", "both"), "b0.9"),
    ("gpt2", "float32", ("none", "rows", "both"), "b0.9"),
    ("gpt2", "float32", ("none", "rows", "both"), "adamw"),
    ("matrix", "float32", ("none", "rows", "columns", "both"), "b0.9"),
    ("small2000", "float32", ("none", "rows", "both"), "b0.9"),
    ("gpt2", "bfloat16", ("none", "rows", "both"), "b0.9"),
    ("gpt2", "bfloat16", ("none", "rows", "both"), "adamw"),
    ("resnet50", "float32", ("none", "rows", "both"), "adamw"),
    ("billion", "float32", ("none", "rows", "both"), "adamw"),
    ("host161", "float32", ("none", "rows"), "b0.9"),
    ("gpt2-xl", "float32", ("none", "rows", "both"), "b0.9"),
    ("resnet50", "bfloat16", ("none", "rows", "both"), "b0.9"),
    ("vgg16", "float32", ("none", "rows", "both"), "b0.9"),
    ("embedding", "float32", ("rows",), "b0.9"),
    ("mlp", "float32", ("none", "both"), "b0.9"),
    ("matrix", "bfloat16", ("none", "rows", "both"), "b0.9"),
    ("gpt2-xl", "bfloat16", ("none", "both"), "b0.9"),
    ("billion", "bfloat16", ("none", "both"), "b0.9"),
    ("matrix", "float32", ("none", "both"), "b0"),
    ("matrix", "float32", ("none", "rows", "columns", "both"), "adamw"),
    ("small2000", "float32", ("none", "rows", "both"), "adamw"),
    ("matrix", "float16", ("none", "both"), "b0.9"),
    ("matrix", "float64", ("none", "both"), "b0.9"),
    ("resnet50", "float32", ("columns", "whole"), "b0.9"),
    ("host2000", "float32", ("none", "rows"), "b0.9"),
]
SHAPES = {**MODELS, **LARGE_MODELS, "host161": ((8, 8),) * 161, "host2000": ((1, 1),) * 2000}
CASES = tuple(
    Case("host" if model.startswith("host") else SUITE, model, SHAPES[model], dtype, view, rule)
    for model, dtype, views, rule in PLAN
    for view in views
)


def chosen(patterns: str) -> list[Case]:
    """The cases whose names match one of the patterns, separated by commas; "": all.

    Raises:
        ValueError: A pattern matches nothing.
    """
    if not patterns:
        return list(CASES)
    wanted = [pattern.strip() for pattern in patterns.split(",")]
    for pattern in wanted:
        if not any(fnmatchcase(case.name, pattern) for case in CASES):
            raise ValueError(f"--cases: no case is called {pattern!r}; there are {', '.join(c.name for c in CASES)}")
    return [case for case in CASES if any(fnmatchcase(case.name, pattern) for pattern in wanted)]
