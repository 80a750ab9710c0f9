"""Megatron-Instruct: Instruction Pre-Training (arXiv:2406.14491), from raw text to an evaluated model.

Importing this package loads neither torch nor vLLM nor transformers; the stages import what they need.
"""

__version__ = "0.1.0"
