"""Benchmarks: how fast the measured step is and what memory it takes, beside its peers and the machine's floor.

`make bench` runs them (docs/performance.md says how to choose and read). Files: cases (what is stepped), inputs (the
tensors), variants (who steps), correctness (the gate before every timing), timing (interleaved rounds), memory,
environment, report; bench_*.py are the tests that pytest-benchmark runs.

`make gpu-report` does the same on a GPU, after building and testing there: gpu_report (its parts), gpu (the cases,
timed by the device's events), gpu_tables (targets and tables).
"""
