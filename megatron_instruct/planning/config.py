"""Settings of tools/plan.py."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Family
from megatron_instruct.models.presets import DIMENSIONS
from megatron_instruct.planning.gpus import Precision


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model: a named size, a Hugging Face folder, or single dimensions, as pretrain.py takes them."""

    preset: str | None = None
    """Named size, such as 500M, 7B, 8B or 70B; single dimensions below override it."""
    hf_folder: Path | None = None
    """Hugging Face folder; only its config.json is read."""
    family: Family | None = None
    """Model family (default llama)."""
    num_layers: int | None = None
    """Transformer layers."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    ffn_hidden_size: int | None = None
    """Width of the feed-forward layers."""
    num_attention_heads: int | None = None
    """Query heads."""
    num_query_groups: int | None = None
    """Key/value heads (default: as many as query heads)."""
    kv_channels: int | None = None
    """Size of one head (default: hidden_size / num_attention_heads)."""
    tie_embeddings: bool | None = None
    """Use the word embedding as output layer."""
    vocab_size: int = 128256
    """Ids of the tokenizer (default: Llama 3's); a Hugging Face folder says its own."""
    make_vocab_size_divisible_by: int = 128
    """Pad the embedding to a multiple of this times the tensor ranks, in rows."""


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """The GPUs."""

    gpu: str | None = None
    """Kind: h100, h200, a100-80, a100-40, b200, gb200, gb300 or l40s (megatron_instruct/planning/gpus.yaml)."""
    num_gpus: int | None = None
    """How many there are."""
    gpus_per_node: int | None = None
    """GPUs of one machine (default: what is usual for the kind)."""
    gpu_memory_gib: float | None = None
    """Memory of one GPU in GiB (default: the data sheet's)."""
    network_gb_per_second: float | None = None
    """What one GPU sends to other machines at most, in GB/s (default: what is usual for the kind)."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """The training."""

    seq_length: int = 4096
    """Tokens of one sequence."""
    global_batch_size: int | None = None
    """Sequences of one optimizer step, over all GPUs."""
    precision: Precision = "bf16"
    """Of matrix products: fp32 (TF32), bf16 with fp32 master weights, or fp8 on top of that."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How numbers are scaled with precision=fp8."""
    train_tokens: float = 100e9
    """Tokens to train on, for days and GPU-hours."""
    lr: float = 3e-4
    """Highest learning rate; only written into the settings of --write."""


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is printed and written."""

    top: int = 10
    """Layouts to show: the fastest of each combination of TP and PP."""
    choose: int = 1
    """Which of them --write is about, by its number in the table."""
    json: bool = False
    """Print JSON instead of the table."""
    write: Path | None = None
    """New folder for the settings and the command line of the chosen layout, the plan as JSON, and a chart."""
    validate: bool = False
    """Print the estimates beside published figures, and their mean error, and exit."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """Find the best layouts of a model on a cluster before a run: memory, time and cost of each. Needs no GPU and no data."""

    model: ModelOptions = field(default_factory=ModelOptions)
    cluster: ClusterOptions = field(default_factory=ClusterOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    output: OutputOptions = field(default_factory=OutputOptions)

    def __post_init__(self) -> None:
        if self.output.validate:
            return
        needed = {
            "gpu": self.cluster.gpu,
            "num_gpus": self.cluster.num_gpus,
            "global_batch_size": self.training.global_batch_size,
        }
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise ConfigError(f"{', '.join(missing)}: not given; a plan needs the kind and number of GPUs and the global batch.")
        positive = {
            "num_gpus": self.cluster.num_gpus,
            "gpus_per_node": self.cluster.gpus_per_node,
            "gpu_memory_gib": self.cluster.gpu_memory_gib,
            "network_gb_per_second": self.cluster.network_gb_per_second,
            "seq_length": self.training.seq_length,
            "global_batch_size": self.training.global_batch_size,
            "train_tokens": self.training.train_tokens,
            "lr": self.training.lr,
            "top": self.output.top,
            "vocab_size": self.model.vocab_size,
            "make_vocab_size_divisible_by": self.model.make_vocab_size_divisible_by,
        }
        for name, value in positive.items():
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} must be above 0.")
        if not 1 <= self.output.choose <= self.output.top:
            raise ConfigError(f"choose={self.output.choose} must be one of the top={self.output.top} layouts; give 1 to {self.output.top}.")
        if self.model.hf_folder is not None and self.model.preset is not None:
            raise ConfigError(f"preset={self.model.preset} and hf_folder={self.model.hf_folder}: two models; give one of them.")
        given = [name for name in DIMENSIONS if getattr(self.model, name, None) is not None]
        if self.model.hf_folder is not None and given:
            raise ConfigError(
                f"{given[0]}={getattr(self.model, given[0])} does not go with hf_folder={self.model.hf_folder}, whose config.json says the "
                "model's size; drop either."
            )
