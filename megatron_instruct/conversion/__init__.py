"""Checkpoints between Hugging Face and Megatron, with a proof."""
