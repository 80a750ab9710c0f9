"""Readers of raw corpora. `formats.py` has the table of suffixes; a new format is one line there."""
