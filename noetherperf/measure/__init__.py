"""Sums over a model's tensors, and how to read them: plans, shards, openness of laws, readouts."""
