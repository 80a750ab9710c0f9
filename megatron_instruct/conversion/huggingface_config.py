"""config.json of a Hugging Face folder, as conversion reads and writes it; what it says of a model is read in models."""

from megatron_instruct.models.huggingface_config import read_architecture, token_ids_of, write_config

__all__ = ["read_architecture", "token_ids_of", "write_config"]
