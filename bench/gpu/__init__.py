"""Benchmarks on a GPU, and the parts of the report that bench/gpu_report.py makes there.

With noetherperf: cases (what is stepped), device (its memory, clock and launches), comparison (one case: gate, rounds,
figures), run (all cases, while there is time), __main__ (`python -m bench.gpu`).

With nothing but Python: machine (a Python whose torch finds a GPU), process (a part's process), session (what parts
share); build, suite, memcheck and benchmarks, one part each; results (gpu.json), targets and tables (gpu.md).
"""
