"""Settings of what a run shows while it runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """Watching a run, besides metrics.jsonl."""

    wandb_project: str | None = None
    """Project in Weights & Biases that the metrics go to as well."""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline needs no network: files below SAVE/wandb, for `wandb sync`."""
    wandb_name: str | None = None
    """Name of the run there (default: the name of the folder SAVE)."""
    sample_prompts: Path | None = None
    """File of prompts, one a line, which the model goes on with into samples.jsonl."""
    sample_interval: int | None = None
    """Steps between samples; with sample_prompts also before the first step and after the last."""
    sample_tokens: int = 48
    """Tokens that are written for each prompt, at most: the likeliest one each time."""

    def __post_init__(self) -> None:
        for name in ("sample_interval", "sample_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; leave it out to switch it off.")
        if (self.sample_prompts is None) != (self.sample_interval is None):
            raise ConfigError("sample_prompts and sample_interval go together; give both or neither.")
        if self.wandb_project is None and (self.wandb_mode != "online" or self.wandb_name is not None):
            raise ConfigError("wandb_mode and wandb_name need wandb_project; give it, or leave them out.")
