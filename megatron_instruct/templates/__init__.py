"""Templates that render M-shot examples into instruction-augmented texts."""
