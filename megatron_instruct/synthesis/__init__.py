"""Instruction synthesis: raw texts in, M-shot examples out."""
