"""Settings of tools/pretrain.py. Names and meanings are Megatron's where Megatron has the setting."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from megatron_instruct.errors import ConfigError, did_you_mean
from megatron_instruct.models.architecture import Family
from megatron_instruct.records import ROLE_CODES


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model. With --load these come from the checkpoint, and what is given must agree with it."""

    preset: str | None = None
    """Named size, such as 500M, 1.3B, 7B, 8B or 70B; single dimensions below override it."""
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
    group_query_attention: bool = False
    """Share key/value heads among query heads; needs num_query_groups."""
    num_query_groups: int | None = None
    """Key/value heads (default: as many as query heads)."""
    kv_channels: int | None = None
    """Size of one head (default: hidden_size / num_attention_heads)."""
    max_position_embeddings: int | None = None
    """Longest sequence the model is meant for, in tokens (default: seq_length)."""
    rotary_base: float | None = None
    """Base of the rotary frequencies (default 10000)."""
    tie_embeddings: bool | None = None
    """Use the word embedding as output layer."""
    init_method_std: float | None = None
    """Standard deviation of initial weights (default 0.02)."""
    make_vocab_size_divisible_by: int = 128
    """Pad the embedding to a multiple of this times the tensor ranks, in rows."""
    transformer_config: dict[str, str] = field(default_factory=dict)
    """Any other field of megatron-core's TransformerConfig: NAME VALUE pairs; values are read as YAML."""

    def __post_init__(self) -> None:
        if self.group_query_attention and self.num_query_groups is None:
            raise ConfigError("group_query_attention=True needs num_query_groups; set it to the number of key/value heads.")

    @property
    def extra_settings(self) -> dict[str, Any]:
        """The values of transformer_config with their types."""
        return {name: yaml.safe_load(value) for name, value in self.transformer_config.items()}


@dataclass(frozen=True, kw_only=True)
class ParallelOptions:
    """How the model is laid out over the processes that torchrun starts."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer's matrices (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that share the layers (PP)."""
    context_parallel_size: int = 1
    """Processes that share each sequence (CP)."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Layers of one model chunk, for the interleaved pipeline schedule."""
    decoder_last_pipeline_num_layers: int | None = None
    """Layers of the last stage, which also computes the output layer; None for an even split."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence over the tensor ranks."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs use_distributed_optimizer."""
    recompute_granularity: Literal["none", "selective", "full"] = "none"
    """Activations that the backward pass computes again instead of keeping them."""
    bf16: bool = False
    """Parameters and activations in bfloat16 with fp32 master weights; fp32 otherwise."""
    num_threads: int | None = None
    """CPU threads of each process (default: OMP_NUM_THREADS, else the machine's cores divided by its processes)."""
    distributed_timeout_minutes: float = 10.0
    """Longest wait for another process (minutes)."""

    def __post_init__(self) -> None:
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads={self.num_threads} must be at least 1; leave it out for the default.")
        if self.overlap_param_gather and not self.use_distributed_optimizer:
            raise ConfigError("overlap_param_gather=True needs use_distributed_optimizer=True; set it or drop overlap_param_gather.")
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            raise ConfigError("overlap_param_gather=True needs overlap_grad_reduce=True; set it or drop overlap_param_gather.")


@dataclass(frozen=True, kw_only=True)
class Fp8Options:
    """Matrix products in 8 bits, by Transformer Engine on NVIDIA GPUs; the weights themselves stay in bfloat16 with fp32 master weights."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Format of the numbers: e4m3 throughout, or hybrid (e4m3 forward, e5m2 for gradients). Default: no FP8. Needs bf16."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """How numbers are scaled: by the largest of earlier steps, by each tensor's own, by blocks (Hopper), by blocks of 32 (Blackwell)."""
    fp8_amax_history_len: int = 1024
    """Steps whose largest values the delayed recipe looks at."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "max"
    """Which of them it takes."""
    fp8_margin: int = 0
    """Powers of two that the delayed recipe leaves free above it."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers out of FP8; not with the delayed recipe."""
    num_layers_at_start_in_bf16: int = 1
    """Layers at the start that are kept out."""
    num_layers_at_end_in_bf16: int = 1
    """Layers at the end that are kept out."""

    def __post_init__(self) -> None:
        if self.fp8_amax_history_len < 1:
            raise ConfigError(f"fp8_amax_history_len={self.fp8_amax_history_len} must be at least 1.")
        if self.fp8_format is None and self.first_last_layers_bf16:
            raise ConfigError("first_last_layers_bf16=True needs fp8_format; set it, or drop the flag.")
        if self.first_last_layers_bf16 and self.fp8_recipe == "delayed":
            raise ConfigError(
                "first_last_layers_bf16=True does not go with fp8_recipe=delayed, whose history is one for all layers; "
                "take tensorwise or blockwise."
            )


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """Batches, steps and the optimizer."""

    train_iters: int
    """Optimizer steps."""
    seq_length: int = 2048
    """Tokens of one sequence."""
    micro_batch_size: int = 1
    """Sequences that one process computes at once."""
    global_batch_size: int
    """Sequences of one optimizer step, over all processes."""
    lr: float
    """Highest learning rate."""
    min_lr: float = 0.0
    """Lowest learning rate."""
    lr_decay_style: Literal["cosine", "linear", "constant", "inverse-square-root", "WSD"] = "cosine"
    """How the learning rate falls after warm-up; WSD: it stays, and falls over the last lr_wsd_decay_iters steps."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """How it falls there."""
    lr_wsd_decay_iters: int | None = None
    """Last steps of lr_decay_iters in which it falls, with lr_decay_style=WSD."""
    lr_warmup_iters: int = 0
    """Steps over which the learning rate rises from 0."""
    lr_decay_iters: int | None = None
    """Steps after which the learning rate is min_lr (default: train_iters)."""
    weight_decay: float = 0.1
    """AdamW's weight decay; norms are exempt."""
    clip_grad: float = 1.0
    """Highest norm of the gradient; 0 to leave it as it is."""
    adam_beta1: float = 0.9
    """Decay of AdamW's first moment."""
    adam_beta2: float = 0.95
    """Decay of AdamW's second moment."""
    adam_eps: float = 1e-8
    """AdamW's epsilon."""
    seed: int = 1234
    """Of initial weights and of the order of the data."""

    def __post_init__(self) -> None:
        for name in ("train_iters", "seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0.0 <= self.min_lr <= self.lr or self.lr == 0.0:
            raise ConfigError(f"min_lr={self.min_lr}, lr={self.lr}: 0 <= min_lr <= lr and lr > 0 must hold; change either.")
        decay = self.lr_decay_iters or self.train_iters
        if self.lr_warmup_iters >= decay:
            raise ConfigError(f"lr_warmup_iters={self.lr_warmup_iters} must be below lr_decay_iters={decay} (by default train_iters).")
        falls = self.lr_wsd_decay_iters
        if (self.lr_decay_style == "WSD") != (falls is not None):
            raise ConfigError("lr_decay_style=WSD and lr_wsd_decay_iters go together; give both or neither.")
        if falls is not None and not 0 < falls <= decay - self.lr_warmup_iters:
            raise ConfigError(
                f"lr_wsd_decay_iters={falls} must lie between 1 and lr_decay_iters - lr_warmup_iters = {decay - self.lr_warmup_iters}."
            )


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Megatron indexed data sets."""

    data_path: tuple[str, ...] = ()
    """A prefix, several prefixes, or WEIGHT PREFIX pairs; divided by split."""
    split: str = "969,30,1"
    """Shares of data_path for training, validation and test."""
    train_data_path: tuple[str, ...] = ()
    """As data_path, for training only; instead of data_path."""
    valid_data_path: tuple[str, ...] = ()
    """As data_path, for validation only."""
    data_cache_path: Path | None = None
    """Folder of megatron-core's index caches (default: SAVE/cache)."""
    tokenizer_model: Path | None = None
    """Tokenizer folder or file (default: the loaded checkpoint's); must be the one that made the data."""
    adopt_data: bool = False
    """Accept data sets without a manifest, made by another tool with this very tokenizer."""
    eod_mask_loss: bool = False
    """Take no loss at end-of-document tokens in the input."""
    reset_attention_mask: bool = False
    """Attend within documents only; needs data made with --append-eod."""
    reset_position_ids: bool = False
    """Count positions from each document's start. Rotary positions are relative: with reset_attention_mask they are so anyway."""
    role_weights: dict[str, float] = field(default_factory=dict)
    """Weight of the loss by role of the token: ROLE WEIGHT pairs (context, instruction, response, glue, end_of_document); roles not named
    get 0, padding always. Data sets without roles count whole. Default: every token counts 1."""
    num_workers: int = 0
    """Processes that read batches ahead, per rank."""

    def __post_init__(self) -> None:
        if bool(self.data_path) == bool(self.train_data_path):
            raise ConfigError("give either data_path or train_data_path (with valid_data_path).")
        if self.data_path and self.valid_data_path:
            raise ConfigError("valid_data_path goes with train_data_path; data_path is divided by split.")
        known = [role for role in ROLE_CODES if role != "padding"]
        for role, weight in self.role_weights.items():
            if role not in known:
                raise ConfigError(f"role_weights: no role {role!r}{did_you_mean(role, known)}")
            if not 0.0 <= weight < float("inf"):
                raise ConfigError(f"role_weights: {role}={weight} must be 0 or a positive number.")
        if self.role_weights and not any(self.role_weights.values()):
            raise ConfigError("role_weights: every weight is 0, so that nothing is learnt; give one role a weight above 0.")


@dataclass(frozen=True, kw_only=True)
class CheckpointOptions:
    """Saving, loading, evaluating and logging."""

    save: Path
    """Folder of checkpoints and metrics. A run that finds its own checkpoint here resumes from it."""
    load: Path | None = None
    """Checkpoint folder to start from (weights only), as convert_checkpoint.py or pretrain.py wrote it."""
    save_interval: int | None = None
    """Steps between checkpoints; the last step is always saved."""
    log_interval: int = 1
    """Steps between lines of progress."""
    eval_interval: int | None = None
    """Steps between validations; with it also before the first step and after the last."""
    eval_iters: int = 10
    """Global batches of one validation, the same ones each time."""
    tensorboard_dir: Path | None = None
    """Folder of TensorBoard event files."""

    def __post_init__(self) -> None:
        for name in ("save_interval", "log_interval", "eval_interval", "eval_iters"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; leave it out to switch it off.")


@dataclass(frozen=True, kw_only=True)
class DryRunOptions:
    """Looking before starting."""

    dry_run: bool = False
    """Check the settings, print the model, its layout and the memory of its weights, and exit. Needs neither data nor processes."""
    world_size: int | None = None
    """Processes that a dry run is for (default: those that torchrun started)."""
    vocab_size: int | None = None
    """Ids of the tokenizer, for a dry run where neither tokenizer nor checkpoint is at hand."""

    def __post_init__(self) -> None:
        for name in ("world_size", "vocab_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1.")


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
