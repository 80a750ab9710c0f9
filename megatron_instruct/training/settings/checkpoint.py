"""Settings of saving, loading, evaluating and logging."""

from dataclasses import dataclass
from pathlib import Path

from megatron_instruct.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Saving, loading, evaluating and logging."""

    save: Path
    """Folder of checkpoints and metrics. A run that finds its own checkpoint here resumes from it."""
    load: Path | None = None
    """Checkpoint folder to start from (weights only), as convert_checkpoint.py or pretrain.py wrote it."""
    save_interval: int | None = None
    """Steps between checkpoints; the last step is always saved."""
    async_save: bool = False
    """Write checkpoints by a process beside each rank while the next steps run."""
    keep_last: int | None = None
    """Newest checkpoints that are kept; by default all are."""
    save_retain_interval: int | None = None
    """Checkpoints of iterations that are a multiple of this are kept; of the others the newest (keep_last of them)."""
    verify_integrity: bool = True
    """Read every file of a checkpoint against its checksum before starting from it; a resume passes over a damaged one."""
    log_interval: int = 1
    """Steps between lines of progress."""
    eval_interval: int | None = None
    """Steps between validations; with it also before the first step and after the last."""
    eval_iters: int = 10
    """Global batches of one validation, the same ones each time, and of the test after the last step."""
    tensorboard_dir: Path | None = None
    """Folder of TensorBoard event files."""

    def __post_init__(self) -> None:
        for name in ("save_interval", "keep_last", "save_retain_interval", "log_interval", "eval_interval", "eval_iters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; leave it out to switch it off.")
        if self.save_retain_interval is not None and (self.save_interval is None or self.save_retain_interval % self.save_interval):
            raise ConfigError(
                f"save_retain_interval={self.save_retain_interval} must be a multiple of save_interval={self.save_interval}: "
                "only what is saved can be kept."
            )
