"""Readers of raw corpora. `read.py` yields raw texts; a new format is one line in its suffix table."""
