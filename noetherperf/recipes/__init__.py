"""The main job, to read as an example: data (digits), networks (models), settings and the training loop (train)."""
