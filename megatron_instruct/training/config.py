"""Settings of tools/pretrain.py: the groups put together, and what must hold between them."""

from dataclasses import dataclass, field

from megatron_instruct.errors import ConfigError
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.checkpoint import CheckpointOptions
from megatron_instruct.training.settings.data import DataOptions
from megatron_instruct.training.settings.dry_run import DryRunOptions
from megatron_instruct.training.settings.model import ModelOptions
from megatron_instruct.training.settings.parallel import ParallelOptions
from megatron_instruct.training.settings.precision import Fp8Options


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-train a model on megatron-core, from scratch or (with --load) going on from a checkpoint. Start it with torchrun."""

    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    fp8: Fp8Options = field(default_factory=Fp8Options)
    batch: BatchOptions
    data: DataOptions
    checkpoint: CheckpointOptions
    dry: DryRunOptions = field(default_factory=DryRunOptions)

    def __post_init__(self) -> None:
        if self.fp8.fp8_format is not None and not self.parallel.bf16:
            raise ConfigError(f"fp8_format={self.fp8.fp8_format} needs bf16=True, for all that is not computed in 8 bits; set it.")
