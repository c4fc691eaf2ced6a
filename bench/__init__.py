"""Benchmarks: time and memory of the measured step, beside its peers and the memory's floor.

`make bench` runs them; docs/performance-method.md says how to choose cases and how figures are made.

A case: cases (shapes, dtypes, views), inputs (its tensors), variants (the steps that it compares), correctness (the
gate before every timing; bounds: the errors that it allows), timing (interleaved rounds). bench_step and bench_memory
are tests that pytest-benchmark runs, with settings and conftest. report turns their JSON into tables (cells,
markdown) and a picture, page writes those into docs/performance.md and README.md, environment and checkout say where
figures come from.

Whole training iterations: networks (what is trained), iterations (variants and rounds), training (their table);
bench_iterations is their test.

Commands of their own: kernel (arithmetic alone), phases (of a step), paper (counted, not timed), memory, search (for
symmetries).

`make gpu-report` starts gpu_report, which builds, tests and measures on a GPU by the parts in gpu/.
"""
