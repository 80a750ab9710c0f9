"""Settings of tools/convert_checkpoint.py."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Dtype

Direction = Literal["megatron", "huggingface"]
Way = Literal["import", "export", "re-layout"]
"""What is done: Hugging Face to Megatron, Megatron to Hugging Face, Megatron to Megatron."""


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a model between a Hugging Face folder and a Megatron checkpoint, and prove that both are the same model.

    The direction is recognised from what is loaded. The result appears whole or not at all; a second run finds it and does nothing.
    """

    load: Path
    """Source: a Hugging Face folder (config.json) or a checkpoint folder (latest_checkpointed_iteration.txt)."""
    save: Path
    """Target folder; must not exist yet, or be empty."""
    to: Direction | None = None
    """What to make; must agree with the source (default: the other of the two). megatron of a Megatron checkpoint lays it out anew, each
    tensor whole, with its optimizer."""
    iteration: int | None = None
    """Iteration of a Megatron source (default: the newest)."""
    dtype: Dtype | None = None
    """Of the weights that are written (default: the source's)."""
    tokenizer: Path | None = None
    """Tokenizer folder or file (default: the source's own)."""
    max_position_embeddings: int | None = None
    """Longest sequence of the result, in tokens (default: the source's). At most sliding_window, it makes a sliding window void."""
    max_shard_size: str = "5GB"
    """Largest file of a Hugging Face result, such as 500MB or 5GB."""
    prove: bool = True
    """Compare weights and logits of both sides before the result is committed."""
    prove_text: Path | None = None
    """UTF-8 text whose logits are compared (default: a paragraph of our own); its first 512 tokens at most."""

    def __post_init__(self) -> None:
        if self.iteration is not None and self.iteration < 0:
            raise ConfigError(f"iteration={self.iteration} must be at least 0.")
        if self.max_position_embeddings is not None and self.max_position_embeddings < 1:
            raise ConfigError(f"max_position_embeddings={self.max_position_embeddings} must be at least 1.")
        size = re.fullmatch(r"(\d+(\.\d+)?) ?[KMGT]B", self.max_shard_size.strip().upper())
        if size is None or float(size[1]) == 0:
            raise ConfigError(f"max_shard_size={self.max_shard_size!r} must be a size above 0 in KB, MB, GB or TB, such as 500MB or 5GB.")
        if self.prove_text is not None and not self.prove:
            raise ConfigError("prove_text is given together with --no-prove; drop one of them.")
