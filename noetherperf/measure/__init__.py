"""What is summed over a model's tensors, and how it is read: plans, shards, openness of laws, readouts."""
