"""Documents in, Megatron indexed data sets out."""
