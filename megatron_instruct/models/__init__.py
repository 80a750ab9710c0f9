"""Model families, sizes, and the build of megatron-core's GPT model."""
