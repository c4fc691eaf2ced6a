"""Benchmarks: how fast the measured step is and what memory it takes, beside its peers and the machine's floor.

`make bench` runs them (docs/performance.md says how to choose and read). Files: cases (what is stepped), inputs (the
tensors), variants (who steps), correctness (the gate before every timing), timing (interleaved rounds), memory,
environment, report; bench_*.py are the tests that pytest-benchmark runs.
"""
