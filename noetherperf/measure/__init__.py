"""What is summed over a model's tensors, and how the sums are read: plans, shards, openness of laws, readouts."""
