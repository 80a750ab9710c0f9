"""Settings of a dry run."""

from dataclasses import dataclass

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DryRunOptions:
    """Looking before starting."""

    dry_run: bool = False
    """Check the settings, print the model, its layout and what it would need and take, and exit. Needs neither data nor processes."""
    world_size: int | None = None
    """Processes that a dry run is for (default: those that torchrun started)."""
    gpu: str = "h100"
    """Kind of GPU that a dry run estimates memory and time for: a100-80, h200, b200 and others of megatron_instruct/planning/gpus.yaml."""
    vocab_size: int | None = None
    """Ids of the tokenizer, for a dry run where neither tokenizer nor checkpoint is at hand."""

    def __post_init__(self) -> None:
        for name in ("world_size", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")
