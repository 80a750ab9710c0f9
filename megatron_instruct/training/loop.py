"""The loop: data, step, schedule, metrics, validation, checkpoint, as plain calls."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron.core import parallel_state

from megatron_instruct.errors import InputError
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.batches import BatchPlan
from megatron_instruct.models.build import build_model, join_model_parallel_groups
from megatron_instruct.models.checkpoint import load_weights
from megatron_instruct.models.layout import ParallelLayout
from megatron_instruct.models.vocabulary_padding import leave_out_padding
from megatron_instruct.models.z_loss import add_z_loss
from megatron_instruct.platform.device import Machine
from megatron_instruct.tokenizer import Tokenizer
from megatron_instruct.training.bad_steps import Steps, Trained
from megatron_instruct.training.checkpoint import Checkpoints, resume
from megatron_instruct.training.checkpoint_choice import newest_whole
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.data import DataSets, HeldOut, batches, build_datasets
from megatron_instruct.training.documents import Batch
from megatron_instruct.training.expert_losses import mean_expert_losses
from megatron_instruct.training.ledger import Ledger
from megatron_instruct.training.machine_checks import build_options
from megatron_instruct.training.metrics import Metrics
from megatron_instruct.training.optimizer import loss_scale, make_optimizer, make_scheduler, updates_done, wrap_data_parallel
from megatron_instruct.training.phases import own_rate, set_rate
from megatron_instruct.training.samples import Prompts, generate, read_prompts
from megatron_instruct.training.sources import DataSources
from megatron_instruct.training.start import Start
from megatron_instruct.training.step import StepShape, check_overflows, validate
from megatron_instruct.training.stopping import ExitRequests, StoppedEarly, reason_of
from megatron_instruct.training.streams import Replayable


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything that one process of a run has in its hands."""

    config: PretrainConfig
    plan: BatchPlan
    architecture: Architecture
    identity: dict[str, Any]
    start_iteration: int
    models: list[Any]
    """megatron-core's GPT model chunks, as checkpoints see them."""
    chunks: list[Any]
    """The same, wrapped for mixed precision and data parallelism, as the schedules see them."""
    optimizer: Any
    scheduler: Any
    data: DataSets
    machine: Machine
    document_end: int
    """Id of the end-of-document token."""
    prompts: Prompts | None
    """What the model goes on with at intervals."""
    tokenizer: Tokenizer


def build_run(
    config: PretrainConfig,
    start: Start,
    layout: ParallelLayout,
    plan: BatchPlan,
    sources: DataSources,
    machine: Machine,
    identity: dict[str, Any],
) -> Run:
    """Build model, optimizer and data on this rank, and read the checkpoint to start from."""
    join_model_parallel_groups(layout, seed=config.batch.seed, timeout_minutes=config.parallel.distributed_timeout_minutes)
    models = build_model(start.architecture, layout, machine, build_options(config))
    if start.path is not None and not start.resumes:
        load_weights(start.path, models)
    for model in models:
        if config.batch.z_loss_coeff:
            add_z_loss(model, config.batch.z_loss_coeff)
        leave_out_padding(model, start.architecture.vocab_size)
    chunks = wrap_data_parallel(models, config.parallel)
    optimizer = make_optimizer(chunks, config.parallel, config.batch, machine, config.precision, config.optimizer)
    if start.path is not None and start.resumes:
        resume(start.path, models, optimizer, iteration=start.iteration, machine=machine)
    scheduler = make_scheduler(optimizer, config.batch)
    scheduler.step(increment=start.iteration * plan.global_batch_size)
    return Run(
        config=config,
        plan=plan,
        architecture=start.architecture,
        identity=identity,
        start_iteration=start.iteration,
        models=models,
        chunks=chunks,
        optimizer=optimizer,
        scheduler=scheduler,
        data=build_datasets(config, sources, plan),
        machine=machine,
        document_end=sources.vocabulary.eod,
        prompts=_prompts(config, start),
        tokenizer=start.tokenizer,
    )


def _prompts(config: PretrainConfig, start: Start) -> Prompts | None:
    path, positions = config.watch.sample_prompts, start.architecture.max_position_embeddings
    return None if path is None else read_prompts(path, start.tokenizer, new_tokens=config.watch.sample_tokens, positions=positions)


def loop(run: Run, metrics: Metrics) -> dict[str, Any]:
    """Run every step from start_iteration to train_iters, then the test; return its figures."""
    checkpoints = Checkpoints(run.config.checkpoint, run.models, run.optimizer, architecture=run.architecture, identity=run.identity)
    with checkpoints, ExitRequests(run.config.faults) as requests:
        _steps(run, metrics, checkpoints, requests)
    return {} if run.data.test is None else _evaluate(run, metrics, run.data.test, run.plan.train_iters, "test")


def _steps(run: Run, metrics: Metrics, checkpoints: Checkpoints, requests: ExitRequests) -> None:
    options, plan = run.config.checkpoint, run.plan
    data = [Replayable(stream) for stream in _data(run, run.data.train, plan, run.start_iteration, plan.train_iters - run.start_iteration)]
    ledger = Ledger(options.save, run.identity)
    steps = _guarded_steps(run, ledger, checkpoints)
    valid = run.data.valid
    if valid is not None and run.start_iteration == 0:
        _evaluate(run, metrics, valid, 0, "validation")
    if run.start_iteration == 0:
        _sample(run, metrics, 0)
    metrics.restart_clock(run.start_iteration)
    losses: list[float] = []
    grad_norm, microbatches, overflows_in_a_row = 0.0, 0, 0
    phases = run.config.phases
    for iteration in range(run.start_iteration + 1, plan.train_iters + 1):
        last = iteration == plan.train_iters
        set_rate(run.optimizer.param_groups, own_rate(phases, iteration), highest=run.config.batch.lr)
        lr = run.optimizer.param_groups[0]["lr"]
        shape = _shape(run, plan.num_microbatches_of(iteration))
        outcome = steps.step(iteration, data, shape, requests.code)
        run.scheduler.step(increment=plan.global_batch_size)
        if outcome.checkpoint is not None:
            losses.clear()
            metrics.go_back(outcome.checkpoint)
            metrics.restart_clock(iteration)
        if outcome.result is not None:
            losses.append(outcome.result.loss)
            microbatches += shape.num_microbatches
            overflows_in_a_row = overflows_in_a_row + 1 if outcome.result.overflowed else 0
            check_overflows(overflows_in_a_row, outcome.result)
            grad_norm = grad_norm if outcome.result.grad_norm is None else outcome.result.grad_norm
        checkpoints.poll()
        saves = last or outcome.exit_code > 0 or (options.save_interval is not None and iteration % options.save_interval == 0)
        if losses and (saves or iteration % options.log_interval == 0):  # at a save too: a resumed run then logs the same means
            mean, faults = sum(losses) / len(losses), ledger.counts(iteration)
            more: dict[str, float] = {} if plan.ramp is None else {"batch_size": plan.batch_size(iteration)}
            if run.architecture.num_experts is not None:
                more |= mean_expert_losses(layers=run.architecture.num_layers, microbatches=microbatches)
            if run.config.precision.fp16:
                more |= {"loss_scale": loss_scale(run.optimizer)}
                faults = {**faults, "overflows": iteration - (updates_done(run.optimizer) or 0) - faults["skipped"]}
            metrics.training(iteration, loss=mean, lr=lr, grad_norm=grad_norm, faults=faults, more=more)
            losses.clear()
            microbatches = 0
        if valid is not None and options.eval_interval and (last or iteration % options.eval_interval == 0):
            _evaluate(run, metrics, valid, iteration, "validation")
        if last or (run.config.watch.sample_interval and iteration % run.config.watch.sample_interval == 0):
            _sample(run, metrics, iteration)
        if saves:
            steps.remember(iteration)
            metrics.keep()
            checkpoints.save(iteration)
            metrics.restart_clock(iteration)
        if outcome.exit_code and not last:
            checkpoints.finish()
            reason = reason_of(outcome.exit_code)
            raise StoppedEarly(f"{reason}: saved after step {iteration} of {plan.train_iters}; the same command goes on from there.")


def _guarded_steps(run: Run, ledger: Ledger, checkpoints: Checkpoints) -> Steps:
    trained = Trained(
        models=run.models,
        chunks=run.chunks,
        optimizer=run.optimizer,
        train_set=run.data.train,
        plan=run.plan,
        save=run.config.checkpoint.save,
        device=run.machine.device,
    )

    def go_back() -> int | None:
        checkpoints.finish()
        return _load_newest(run)

    return Steps(run.config.faults, ledger, trained, start_iteration=run.start_iteration, go_back=go_back)


def _load_newest(run: Run) -> int | None:
    """Fill weights and optimizer from the newest checkpoint that is whole; return its iteration, None where there is none."""
    try:
        newest = newest_whole(run.config.checkpoint.save)
    except InputError:
        return None
    iteration = int(newest.manifest.facts["iteration"])
    resume(newest.path, run.models, run.optimizer, iteration=iteration, machine=run.machine)
    return iteration


def _evaluate(run: Run, metrics: Metrics, of: HeldOut, iteration: int, kind: Literal["validation", "test"]) -> dict[str, Any]:
    """Record and return the mean loss over the first eval_iters global batches of the data, and of each data set in them."""
    iterations = run.config.checkpoint.eval_iters
    shape = dataclasses.replace(_shape(run, run.plan.num_microbatches * iterations), components=len(of.components))
    whole = dataclasses.replace(run.plan, ramp=None)  # an evaluation does not grow with the batch
    result = validate(run.chunks, _data(run, of.dataset, whole, 0, iterations), shape)
    figures = metrics.evaluation(kind, iteration, result.loss, {of.components[part]: loss for part, loss in result.by_component.items()})
    metrics.restart_clock(iteration)
    return figures


def _sample(run: Run, metrics: Metrics, iteration: int) -> None:
    """Record what the model writes now."""
    if run.prompts is not None:
        ids = generate(run.chunks, run.prompts, end=run.document_end, vocab_size=run.tokenizer.vocab_size)
        metrics.samples(iteration, run.prompts.texts, [run.tokenizer.decode(row) for row in ids])
        metrics.restart_clock(iteration)


def _shape(run: Run, num_microbatches: int) -> StepShape:
    batch = run.config.batch
    return StepShape(
        num_microbatches=num_microbatches,
        micro_batch_size=batch.micro_batch_size,
        seq_length=batch.seq_length,
        document_end=run.document_end if run.config.data.reset_attention_mask else None,
        packs=run.machine.is_cuda and not run.config.fp8.fp8_emulation,
        leaves_tokens_out=bool(run.config.data.role_weights) or run.config.data.eod_mask_loss,
    )


def _data(run: Run, dataset: Any, plan: BatchPlan, start_iteration: int, iterations: int) -> list[Iterator[Batch]]:
    """Return one stream of microbatches a model chunk; every chunk walks through the same ones."""
    rank = parallel_state.get_data_parallel_rank()
    return [
        batches(
            dataset,
            plan.microbatches(rank, start_iteration=start_iteration, iterations=iterations),
            num_workers=run.config.data.num_workers,
            device=run.machine.device,
        )
        for _ in run.chunks
    ]
