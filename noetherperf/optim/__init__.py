"""Optimizers: torch's interface to the engines, with checkpoints, distributed training and controls."""
