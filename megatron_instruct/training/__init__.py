"""Pre-training on megatron-core."""
