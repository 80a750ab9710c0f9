"""Tuning the instruction synthesizer: context-based task data -> documents to train on, and its evaluation by files."""
