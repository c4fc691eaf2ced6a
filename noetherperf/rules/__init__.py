"""Update rules: the mathematics of one optimizer each: its update, the moments that a step takes, its laws."""
