"""What a run would be, from its settings alone: model, layout of ranks, batches, memory, time. Does not know: torch, data."""

from megatron_instruct.errors import ConfigError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.batches import BatchPlan
from megatron_instruct.models.checkpoint_folder import iterations, latest_iteration
from megatron_instruct.models.fp8_sizes import CAPABILITIES
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.planning.constants import load_constants
from megatron_instruct.planning.estimate import Estimate
from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.gpus import Precision, check_precision, find_gpu
from megatron_instruct.planning.report import GIB, parts, sentence
from megatron_instruct.planning.shape import shape_of
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.fp8 import check_fp8
from megatron_instruct.training.plan import check_model_settings, plan_batches, plan_layout
from megatron_instruct.training.sources import check_blends
from megatron_instruct.training.start import architecture_from, find_start


def describe(config: PretrainConfig) -> str:
    """Return the description, for a person to read. Raises what the run itself would raise for these settings."""
    check_blends(config)
    architecture, origin = _architecture(config)
    check_model_settings(config, architecture)
    layout = plan_layout(config.parallel, architecture, processes=config.dry.world_size)
    plan = plan_batches(config, layout)
    if config.model.transformer_config:
        from megatron_instruct.platform import noise

        noise.silence()
        from megatron_instruct.training.machine_checks import check_transformer_config  # torch and megatron-core take seconds to import

        check_transformer_config(config, architecture, layout)
    lines = [
        *_model_lines(architecture, origin, seq_length=config.batch.seq_length),
        *_batch_lines(config, plan),
        *_layout_lines(architecture, layout),
        *_estimate_lines(config, architecture, layout),
        "A dry run: no data, checkpoint or device was touched.",
    ]
    return "\n".join(lines)


def _architecture(config: PretrainConfig) -> tuple[Architecture, str]:
    """Return the model, from a checkpoint where there is one, and where it is from."""
    options, tokenizer = config.checkpoint, config.data.tokenizer_model
    if iterations(options.save) or (options.load is not None and latest_iteration(options.load) is not None):
        start = find_start(config)
        return start.architecture, f"as in {start.path}"
    if tokenizer is not None and tokenizer.exists():
        vocab_size = load_tokenizer(tokenizer).vocab_size
    elif config.dry.vocab_size is not None:
        vocab_size = config.dry.vocab_size
    else:
        raise ConfigError(f"the size of the vocabulary is not known: tokenizer_model={tokenizer} is not there; give vocab_size.")
    origin = "from scratch" if options.load is None else f"weights from {options.load}, which is not there yet"
    return architecture_from(config.model, vocab_size=vocab_size, seq_length=config.batch.seq_length), origin


def _model_lines(architecture: Architecture, origin: str, *, seq_length: int) -> list[str]:
    return [
        f"Model: {architecture.num_parameters / 1e9:,.3f} billion parameters ({architecture.family}), {origin}",
        f"  {architecture.num_layers} layers, hidden size {architecture.hidden_size:,}, feed-forward {architecture.ffn_hidden_size:,}, "
        f"{architecture.num_attention_heads} heads of {architecture.kv_channels} over {architecture.num_query_groups} key/value heads, "
        f"vocabulary {architecture.vocab_size:,}",
        f"  {architecture.flops_per_token(seq_length) / 1e9:,.2f} GFLOP a token, forward and backward",
    ]


def _batch_lines(config: PretrainConfig, plan: BatchPlan) -> list[str]:
    tokens = plan.global_batch_size * config.batch.seq_length
    return [
        f"Batch: {plan.global_batch_size:,} sequences of {config.batch.seq_length:,} = {tokens:,} tokens a step, "
        f"{plan.num_microbatches:,} microbatches of {plan.micro_batch_size} on each replica",
        f"  {plan.train_iters:,} steps = {plan.samples_before(plan.train_iters) * config.batch.seq_length / 1e9:,.2f} billion tokens"
        + ("" if plan.ramp is None else f"; the batch grows from {plan.ramp.start:,} sequences over the first {plan.ramp.samples:,}"),
    ]


def _layout_lines(architecture: Architecture, layout: ParallelLayout) -> list[str]:
    sizes = f"tensor {layout.tensor} x context {layout.context} x pipeline {layout.pipeline} x data {layout.data}"
    lines = [f"Layout: {layout.world_size:,} processes = {sizes}"]
    if architecture.num_experts is not None:
        each = architecture.num_experts // layout.expert
        lines.append(
            f"  experts: {each} of {architecture.num_experts} on a rank, over {layout.expert} ranks x tensor {layout.tensor_of_experts} "
            f"x pipeline {layout.pipeline} x data {layout.data_of_experts}"
        )
    ranks_of_stage = layout.world_size // layout.pipeline
    first_layer = 0
    for stage in range(layout.pipeline):
        layers = layout.layers_of_stage(architecture.num_layers, stage)
        if layout.virtual_pipeline is None:
            held = f"layers {first_layer} to {first_layer + layers - 1}"
        else:
            held = f"{layers} layers in {layout.virtual_pipeline} chunks"
        first_layer += layers
        first, last = stage * ranks_of_stage, (stage + 1) * ranks_of_stage - 1
        parts = [held, *(["embedding"] if stage == 0 else []), *(["output layer"] if stage == layout.pipeline - 1 else [])]
        groups = f"tensor groups {first}-{first + layout.tensor - 1}, …" if layout.tensor > 1 else "one replica each"
        parts.append(f"{layout.parameters_of_rank(architecture, stage) / 1e6:,.1f} million parameters a rank")
        lines.append(f"  stage {stage}: {', '.join(parts)}; ranks {first} to {last}, {groups}")
    return lines


def _estimate_lines(config: PretrainConfig, architecture: Architecture, layout: ParallelLayout) -> list[str]:
    """The estimate of tools/plan.py for these very settings."""
    gpu = find_gpu(config.dry.gpu)
    computes_in_8_bits = config.fp8.fp8_format is not None and not config.fp8.fp8_emulation
    precision: Precision = "fp8" if computes_in_8_bits else "fp32" if config.dtype == "fp32" else "bf16"
    check_precision(gpu, precision)
    tokens_of_rank = layout.tokens_of_rank(config.batch.micro_batch_size, config.batch.seq_length)
    check_fp8(config.fp8, architecture, layout, tokens=tokens_of_rank, capability=CAPABILITIES[gpu.generation])
    execution = Execution(
        layout=layout,
        seq_length=config.batch.seq_length,
        global_batch_size=config.batch.global_batch_size,
        micro_batch_size=config.batch.micro_batch_size,
        precision=precision,
        recompute=config.parallel.recompute_granularity,
        distributed_optimizer=config.parallel.shards_optimizer,
        shards_gradients=config.parallel.shards_gradients,
        shards_weights=config.parallel.shards_weights,
        overlap=config.parallel.overlap_grad_reduce or config.parallel.shards_gradients,
        vocab_divisor=config.model.make_vocab_size_divisible_by,
    )
    estimate = Estimate(shape_of(architecture), execution, gpu, load_constants())
    tokens = config.batch.samples_before(config.batch.train_iters) * config.batch.seq_length
    missing = [] if estimate.fits else [f"It does not fit: {estimate.missing_bytes / GIB:,.1f} GiB are missing on the fullest GPU."]
    muon = ["Muon keeps one moment of the matrices inside layers; the estimate counts AdamW's two."] if config.optimizer.is_muon else []
    return [f"Estimate on {gpu.kind} (gpu names another kind): {sentence(estimate, tokens)}", *parts(estimate), *muon, *missing]
