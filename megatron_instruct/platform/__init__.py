"""The seam between megatron-core and the machine it runs on."""
