"""Evaluation of Hugging Face folders."""
