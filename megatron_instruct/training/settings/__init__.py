"""Settings of tools/pretrain.py, one file a group. Names and meanings are Megatron's where Megatron has the setting."""
