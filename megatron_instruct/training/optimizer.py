"""megatron-core's data-parallel wrapper, optimizer and learning-rate schedule from the settings."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_instruct.platform.device import Machine
from megatron_instruct.training.fully_sharded import wrap_fully_sharded
from megatron_instruct.training.settings.batch import BatchOptions
from megatron_instruct.training.settings.optimizer import OptimizerOptions
from megatron_instruct.training.settings.parallel import ParallelOptions
from megatron_instruct.training.settings.precision import PrecisionOptions


def wrap_data_parallel(chunks: Sequence[GPTModel], options: ParallelOptions) -> list[Any]:
    """Wrap a rank's model chunks for gradient reduction over the data-parallel ranks, or shard them over these."""
    config = chunks[0].config
    modules = [Float16Module(config, chunk) for chunk in chunks] if config.bf16 or config.fp16 else list(chunks)
    config.finalize_model_grads_func = finalize_model_grads
    if options.use_megatron_fsdp:
        sharded = wrap_fully_sharded(modules, options)
        if sharded[0].ddp_config.overlap_grad_reduce:  # otherwise gradients are reduced once, after the last microbatch
            config.no_sync_func = sharded[0].no_sync
        return sharded
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=options.use_distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        overlap_param_gather=options.overlap_param_gather,
        grad_reduce_in_fp32=True,
        check_for_nan_in_grad=False,  # the step looks at the loss, the optimizer at the norm
    )
    wrapped = [
        DistributedDataParallel(config=config, ddp_config=ddp_config, module=module, disable_bucketing=number > 0)
        for number, module in enumerate(modules)
    ]
    if options.overlap_grad_reduce:
        config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(wrapped) > 1 else wrapped[0].no_sync
    return wrapped


def make_optimizer(
    chunks: Sequence[DistributedDataParallel],
    options: ParallelOptions,
    batch: BatchOptions,
    machine: Machine,
    precision: PrecisionOptions | None = None,
    kind: OptimizerOptions | None = None,
) -> Any:
    """Return the optimizer as megatron-core builds it: sharded over data-parallel ranks where asked, fp32 master weights under bf16.

    AdamW is the fused one of Transformer Engine or apex on CUDA, torch's one-pass kernel on CPU. Muon is that of emerging-optimizers.
    """
    config, scaling = chunks[0].config, precision or PrecisionOptions()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            **(kind or OptimizerOptions()).megatron_fields,
            lr=batch.lr,
            min_lr=batch.min_lr,
            weight_decay=batch.weight_decay,
            adam_beta1=batch.adam_beta1,
            adam_beta2=batch.adam_beta2,
            adam_eps=batch.adam_eps,
            clip_grad=batch.clip_grad,
            bf16=config.bf16,
            fp16=config.fp16,
            params_dtype=config.params_dtype,
            loss_scale=scaling.loss_scale,
            initial_loss_scale=scaling.initial_loss_scale,
            min_loss_scale=scaling.min_loss_scale,
            loss_scale_window=scaling.loss_scale_window,
            hysteresis=scaling.hysteresis,
            use_distributed_optimizer=options.use_distributed_optimizer or options.use_megatron_fsdp,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
        ),
        list(chunks),
        config_overrides=_weight_decay(batch) if batch.no_weight_decay_on_embeddings else None,
    )
    config.grad_scale_func = optimizer.scale_loss
    if config.fp16:
        _allocate(optimizer, machine)
    if not machine.is_cuda and not options.use_megatron_fsdp:
        for inner in _adams(optimizer):
            for group in inner.param_groups:
                group["fused"], group["foreach"] = True, False  # torch's one-pass CPU kernel; megatron-core builds the plain one
    return optimizer


def _weight_decay(batch: BatchOptions) -> dict[ParamKey, ParamGroupOverride]:
    """megatron-core's own exemptions of biases and of what has one dimension, and embedding and output layer."""
    exempt = ParamGroupOverride(wd_mult=0.0)
    standard = get_standard_config_overrides(OptimizerConfig(optimizer="adam", lr=batch.lr))
    return {**standard, ParamKey(attr="is_embedding_or_output_parameter"): exempt}


def _allocate(optimizer: Any, machine: Machine) -> None:
    """Allocate the moments, which a checkpoint needs even where every step before it overflowed."""
    for part in optimizer_parts(optimizer):
        if machine.is_cuda:
            part.init_state_fn(part.optimizer, part.config)
        elif isinstance(part.optimizer, torch.optim.Adam):
            _fill_with_zeros(part.optimizer)


def _fill_with_zeros(optimizer: torch.optim.Optimizer, *, step: float = 0.0) -> None:
    for parameter in _parameters(optimizer):
        optimizer.state[parameter] = {
            "step": torch.tensor(step),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def loss_scale(optimizer: Any) -> float:
    """Return what the loss is multiplied with before the next backward pass."""
    return float(optimizer.get_loss_scale())


def loss_scaling_state(optimizer: Any) -> dict[str, Any] | None:
    """Return the scale of the loss and what decides its next change, for a checkpoint; None where there is no scale that changes."""
    for part in optimizer_parts(optimizer):
        state = part.grad_scaler.state_dict() if getattr(part, "grad_scaler", None) is not None else {}
        if state:
            return {**state, "scale": float(state["scale"])}
    return None


def restore_loss_scaling(optimizer: Any, state: dict[str, Any] | None, machine: Machine) -> None:
    """Go on with the scale of the loss that a checkpoint names."""
    if state is None:
        return
    for part in optimizer_parts(optimizer):
        part.grad_scaler.load_state_dict({**state, "scale": torch.tensor([state["scale"]], device=machine.device)})


def make_scheduler(optimizer: MegatronOptimizer, batch: BatchOptions) -> OptimizerParamScheduler:
    """Return the schedule of the learning rate, which counts in samples."""
    size = batch.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=batch.lr,
        min_lr=batch.min_lr,
        lr_warmup_steps=batch.lr_warmup_iters * size,
        lr_decay_steps=(batch.lr_decay_iters or batch.train_iters) * size,
        lr_decay_style=batch.lr_decay_style,
        start_wd=batch.weight_decay,
        end_wd=batch.weight_decay,
        wd_incr_steps=batch.train_iters * size,
        wd_incr_style="constant",
        wsd_decay_steps=None if batch.lr_wsd_decay_iters is None else batch.lr_wsd_decay_iters * size,
        lr_wsd_decay_style=batch.lr_wsd_decay_style,
    )


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Return megatron-core's optimizers inside one, which may chain several."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def torch_optimizers(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Yield the torch optimizers inside megatron-core's."""
    for part in optimizer_parts(optimizer):
        if part.optimizer is not None:
            yield part.optimizer


def _adams(optimizer: Any) -> Iterator[torch.optim.Optimizer]:
    """Yield torch's Adams among them, of which AdamW is one."""
    yield from (inner for inner in torch_optimizers(optimizer) if isinstance(inner, torch.optim.Adam))


def prepare_for_loading(optimizer: Any, machine: Machine) -> None:
    """Allocate the state that a checkpoint is read into.

    megatron-core 0.19.2 allocates it for Transformer Engine's and apex's Adam; for torch's AdamW under the distributed optimizer it
    asserts that the state is there already.
    """
    if machine.is_cuda:
        return
    for part in optimizer_parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            _fill_with_zeros(part.optimizer)
        elif part.config.fp16 and isinstance(part.optimizer, torch.optim.Adam):
            _fill_with_zeros(part.optimizer, step=1.0)  # megatron-core 0.19.2 leaves a step of 0 out and then misses it


def updates_done(optimizer: Any) -> int | None:
    """Return how often the optimizer has changed the weights; None where it keeps no count."""
    for inner in torch_optimizers(optimizer):
        counts = [state["step"] for state in inner.state.values() if "step" in state]  # as torch's Adam counts
        counts += [group["step"] for group in inner.param_groups if "step" in group]  # as Transformer Engine's does
        if counts:
            return int(counts[0])
    return None


def restore_step(optimizer: Any, updates: int, machine: Machine) -> None:
    """Set Adam's count of updates after loading: a checkpoint keeps it once, not in the shape of one kind of optimizer."""
    for inner in torch_optimizers(optimizer):
        if "betas" not in inner.defaults:  # Muon, which counts nothing
            continue
        if machine.is_cuda and not isinstance(inner, torch.optim.Adam):  # torch's AdamW is one of its Adams
            for group in inner.param_groups:
                group["step"] = updates
        else:
            for parameter in _parameters(inner):
                inner.state[parameter]["step"] = torch.tensor(float(updates))


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
