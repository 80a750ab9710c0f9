"""Settings of tools/pretrain.py: the groups put together, and what must hold between them."""

from dataclasses import dataclass, field

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Dtype
from megatron_instruct.training.phases import PlacedPhase, parse_phases, place_phases
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.checkpoint import CheckpointOptions
from megatron_instruct.training.settings.data import DataOptions
from megatron_instruct.training.settings.dry_run import DryRunOptions
from megatron_instruct.training.settings.experts import ExpertOptions
from megatron_instruct.training.settings.faults import FaultOptions
from megatron_instruct.training.settings.model import ModelOptions
from megatron_instruct.training.settings.optimizer import OptimizerOptions
from megatron_instruct.training.settings.parallel import ParallelOptions
from megatron_instruct.training.settings.precision import Fp8Options, PrecisionOptions
from megatron_instruct.training.settings.watching import WatchOptions


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Pre-train a model on megatron-core, from scratch or (with --load) going on from a checkpoint. Start it with torchrun."""

    model: ModelOptions = field(default_factory=ModelOptions)
    parallel: ParallelOptions = field(default_factory=ParallelOptions)
    experts: ExpertOptions = field(default_factory=ExpertOptions)
    precision: PrecisionOptions = field(default_factory=PrecisionOptions)
    fp8: Fp8Options = field(default_factory=Fp8Options)
    batch: BatchOptions
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    data: DataOptions
    checkpoint: CheckpointOptions
    watch: WatchOptions = field(default_factory=WatchOptions)
    faults: FaultOptions = field(default_factory=FaultOptions)
    dry: DryRunOptions = field(default_factory=DryRunOptions)

    @property
    def dtype(self) -> Dtype:
        """Of parameters and activations."""
        return "bf16" if self.parallel.bf16 else "fp16" if self.precision.fp16 else "fp32"

    def __post_init__(self) -> None:
        if self.parallel.bf16 and self.precision.fp16:
            raise ConfigError("bf16=True and fp16=True exclude each other; drop one.")
        if self.fp8.fp8_format is not None and not self.parallel.bf16 and not self.fp8.fp8_emulation:
            raise ConfigError(f"fp8_format={self.fp8.fp8_format} needs bf16=True, for all that is not computed in 8 bits; set it.")
        if self.optimizer.is_muon and self.precision.fp16:
            raise ConfigError("optimizer=muon does not go with fp16=True: megatron-core has no scaling of the loss for it; use bf16.")
        if self.optimizer.is_muon and self.parallel.use_distributed_optimizer:
            raise ConfigError(
                "optimizer=muon does not go with use_distributed_optimizer=True, which cuts matrices into pieces, and Muon needs them "
                "whole; drop use_distributed_optimizer, or divide the model by tensor or pipeline parallelism to save memory."
            )
        if self.parallel.use_megatron_fsdp:
            self._check_fully_sharded()
        assert self.phases or not self.data.phases, "phases are checked before anything else starts"

    def _check_fully_sharded(self) -> None:
        refused = {
            "optimizer=muon": (self.optimizer.is_muon, "Muon needs matrices whole; use adam"),
            "fp16=True": (self.precision.fp16, "its scale of the loss is not tried with shards; use bf16"),
            "fp8_emulation=True": (self.fp8.fp8_emulation, "what it remembers of weights is not tried with shards; drop either"),
        }
        for setting, (given, remedy) in refused.items():
            if given:
                raise ConfigError(f"use_megatron_fsdp=True does not go with {setting}: {remedy}.")

    @property
    def phases(self) -> tuple[PlacedPhase, ...]:
        """The phases of the run, in steps; none where its data are the same from beginning to end."""
        batch = self.batch
        falls = batch.lr_wsd_decay_iters
        decay_start = None if falls is None else (batch.lr_decay_iters or batch.train_iters) - falls
        return place_phases(parse_phases(self.data.phases), train_iters=batch.train_iters, decay_start=decay_start)
