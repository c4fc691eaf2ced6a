"""Benchmarks: how fast the measured step is and what memory it takes, beside its peers and the machine's floor."""
