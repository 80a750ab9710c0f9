"""Templates that render M-shot examples into instruction-augmented texts: a bank of texts as data, sampling, rendering."""
