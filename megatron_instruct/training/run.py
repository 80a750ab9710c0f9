"""tools/pretrain.py: settings in, checkpoints and metrics out.

The walk: settings -> what to start from -> layout and batches -> data sources (all checked before processes meet)
-> process group -> model -> optimizer -> data -> loop.
"""

import contextlib
import functools
import io
import json
import os
import platform
import shutil
import signal
import sys
import time
from collections.abc import Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.config import as_yaml, flat, run_tool
from megatron_instruct.errors import LostProcessError, TrainingError
from megatron_instruct.files import atomic_folder, atomic_write
from megatron_instruct.manifest import Manifest, finished, write_manifest
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.metrics import check_packages
from megatron_instruct.training.settings.parallel import ParallelOptions
from megatron_instruct.training.stopping import EXIT_TO_GO_ON, StoppedEarly
from megatron_instruct.workspace import held

SETTINGS = "settings.yaml"
"""File in --save with the settings of the run, as --config reads them."""
STARTED_IN = "# relative paths are those of "
"""Begin of the first line of that file; the folder that the run was started in follows, as JSON."""
_MADE = (SETTINGS, "tokenizer", "metrics.jsonl", "samples.jsonl", "faults.jsonl")
"""What a run from the start replaces in --save, where an earlier run left it."""
_PATIENCE = 30.0
"""Seconds that a process with an error waits for the first process of its machine to tell it and torchrun to end them all."""
_ROLL_CALL = 5.0
"""Seconds in which a process that is left answers, when another one is gone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of tools/pretrain.py.

    The processes of one machine see the same settings and files, so that the first of them speaks for all; the others speak up
    only about an error that is theirs alone.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Python would handle Ctrl-C only once gloo or NCCL returns, and they wait for a process that may have ended
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return _exit_status(argv)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            status = _exit_status(argv)
        except SystemExit as stop:  # a command line that does not parse
            status = stop.code if isinstance(stop.code, int) else 1
    if status not in (0, EXIT_TO_GO_ON, LostProcessError.exit_status):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_PATIENCE)
        print(said.getvalue(), file=sys.stderr, end="")
    return status


def _exit_status(argv: Sequence[str] | None) -> int:
    try:
        return run_tool(PretrainConfig, run, argv, prog="pretrain.py")
    except StoppedEarly as stop:
        print(f"pretrain.py: {stop}", flush=True)
        return EXIT_TO_GO_ON


def run(config: PretrainConfig) -> None:
    """Train, or go on training, until train_iters. Raises ConfigError, InputError or TrainingError; StoppedEarly where it was asked to."""
    if config.dry.dry_run:
        from megatron_instruct.training.dry_run import describe

        print(describe(config))
        return
    keep_order_of_kernels(config.parallel, os.environ)
    from megatron_instruct.platform import noise

    config.optimizer.check_installed()
    check_packages(config.checkpoint.tensorboard_dir, config.watch)
    noise.silence()
    # torch and megatron-core take seconds to import: --help and a wrong flag answer without them
    from megatron_instruct.training.plan import check_model_settings, plan_batches, plan_layout
    from megatron_instruct.training.sources import sources_of
    from megatron_instruct.training.start import check_same_run, find_start, run_identity

    start = find_start(config)
    check_model_settings(config, start.architecture)
    layout = plan_layout(config.parallel, start.architecture)
    plan = plan_batches(config, layout)
    sources = sources_of(config, start.tokenizer)
    identity = run_identity(config, start, sources)
    if finished(config.checkpoint.save / "manifest.json", stage="pretrain", settings=identity, inputs=()) is not None:
        print(f"{config.checkpoint.save} holds the finished run already; nothing to do.")
        return
    check_same_run(config, start, identity)
    from megatron_instruct.platform import device
    from megatron_instruct.training.machine_checks import check_machine

    check_machine(config, start.architecture, layout, device.current())
    speaks_for_all = os.environ.get("RANK", "0") == "0"
    made_by_a_run = () if start.resumes else [config.checkpoint.save / name for name in _MADE]
    with held(config.checkpoint.save, made_by_a_run) if speaks_for_all else contextlib.nullcontext(), _lost_processes():
        if speaks_for_all:
            with atomic_write(config.checkpoint.save / SETTINGS) as stream:
                stream.write(f"{STARTED_IN}{json.dumps(str(Path.cwd()))}\n{as_yaml(config)}")
        _train(config, start, layout, plan, sources, identity)


def keep_order_of_kernels(options: ParallelOptions, environment: MutableMapping[str, str]) -> None:
    """Let a GPU start its kernels in the order they are asked for, where tensor or context ranks communicate while they compute.

    Before Blackwell, megatron-core's overlap of the two relies on it, and Megatron-LM refuses to run without (megatron-core 0.19.2,
    tensor_parallel/layers.py). It is read when CUDA is initialised, which importing Transformer Engine may do: so this comes before any
    import. What the user set stays.
    """
    overlaps = options.tensor_model_parallel_size > 1 or options.context_parallel_size > 1
    if overlaps and not options.use_megatron_fsdp:
        environment.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    """Turn the error that a process meets when another one, or its GPU, is gone into one message, which the lowest rank that is left tells.

    A GPU without memory is no loss: the same command would meet it again.
    """
    try:
        yield
    except RuntimeError as error:  # gloo's has no class of its own
        _check_gpu(error)
        first_line = str(error).partition("\n")[0].split(". This is typically")[0]  # gloo goes on with advice of its own
        if "gloo" not in first_line and type(error).__name__ != "DistBackendError":
            raise
        missing, speaks = _roll_call()
        who = f"no answer from rank {', '.join(map(str, missing))}" if missing else "every rank answers"
        message = (
            f"another process of the run is gone or silent: {who} ({first_line}); look for the first error above, and start the "
            "same command again: it goes on from the last checkpoint."
        )
        if speaks:
            _tell(message)
        if not speaks and os.environ.get("LOCAL_RANK", "0") == "0":
            raise SystemExit(LostProcessError.exit_status) from error
        raise LostProcessError(message) from error


def _check_gpu(error: RuntimeError) -> None:
    """Raise TrainingError where a GPU has too little memory, LostProcessError where it failed."""
    import torch

    where = f"the GPU of rank {os.environ.get('RANK', '0')} on {platform.node()}"
    first_line = str(error).partition("\n")[0]
    if isinstance(error, torch.OutOfMemoryError):
        raise TrainingError(
            f"{where} has too little memory ({first_line}); lower micro_batch_size, recompute activations (recompute_granularity), "
            "or divide the model over more processes: tools/plan.py tells what fits. The last checkpoint is untouched."
        ) from error
    if isinstance(error, torch.AcceleratorError):
        message = f"{where} failed ({first_line}); start the same command again: it goes on from the last checkpoint."
        _tell(message)
        raise LostProcessError(message) from error


def _tell(message: str) -> None:
    """Say what main would keep back, where this is not the first process of its machine."""
    if os.environ.get("LOCAL_RANK", "0") != "0":
        print(f"pretrain.py: error: {message}", file=sys.__stderr__, flush=True)


def _roll_call() -> tuple[list[int], bool]:
    """Return the ranks that do not answer, and whether this process is the lowest that does."""
    import torch.distributed
    from torch.distributed.distributed_c10d import _get_default_store

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    names = [f"alive/{attempt}/{number}" for number in range(size)]
    try:
        store = _get_default_store()
        store.set(names[rank], "yes")
        deadline = time.monotonic() + _ROLL_CALL
        while time.monotonic() < deadline and not store.check(names):
            time.sleep(0.1)
        answers = [store.check([name]) for name in names]
    except RuntimeError:  # the store was kept by a process that is gone
        return [], rank == 0 or os.environ.get("LOCAL_RANK", "0") == "0"
    return [number for number, answer in enumerate(answers) if not answer], answers.index(True) == rank


def _train(config: PretrainConfig, start: Any, layout: Any, plan: Any, sources: Any, identity: dict[str, Any]) -> None:
    """Build everything and run the loop. Every process runs this; a process group that exists already is used and left in place."""
    import torch.distributed

    from megatron_instruct.models.checkpoint_folder import latest_iteration, write_latest
    from megatron_instruct.platform import device
    from megatron_instruct.training.loop import build_run, loop
    from megatron_instruct.training.metrics import Metrics, RunSize
    from megatron_instruct.training.start import whole_start

    own_group = not torch.distributed.is_initialized()
    machine = device.initialize(timeout_minutes=config.parallel.distributed_timeout_minutes, threads=config.parallel.num_threads)
    first = torch.distributed.get_rank() == 0
    start = whole_start(config, start, identity)
    parts = build_run(config, start, layout, plan, sources, machine, identity)
    peak = device.peak_flops(machine, "fp8" if config.fp8.fp8_format and not config.fp8.fp8_emulation else config.dtype)
    size = RunSize(
        train_iters=plan.train_iters,
        tokens_per_iteration=plan.global_batch_size * config.batch.seq_length,
        tokens_before=None if plan.ramp is None else lambda iterations: plan.samples_before(iterations) * config.batch.seq_length,
        flops_per_token=start.architecture.flops_per_token(config.batch.seq_length),
        peak_flops=None if peak is None else peak * layout.world_size,
        devices=layout.world_size,
        peak_memory=functools.partial(device.peak_memory, machine),
    )
    if first:
        if start.resumes and latest_iteration(config.checkpoint.save) is None:
            write_latest(config.checkpoint.save, start.iteration)
        keep_tokenizer(start.tokenizer_path, config.checkpoint.save / "tokenizer", resumes=start.resumes)
        for reason in start.passed_over:
            print(f"passed over: {reason}", flush=True)
        origin = "from scratch" if start.path is None else f"{'resumes' if start.resumes else 'weights'} from {start.path}"
        experts = f"experts over {layout.expert} x tensor {layout.tensor_of_experts}; " if start.architecture.num_experts else ""
        print(
            f"{start.architecture.num_parameters / 1e6:,.1f}M parameters, {origin}, iteration {start.iteration} of {plan.train_iters}\n"
            f"{layout.world_size} x {machine.kind}: tensor {layout.tensor}, context {layout.context}, pipeline {layout.pipeline}, "
            f"data {layout.data}; {experts}"
            f"{plan.num_microbatches} microbatches of {plan.micro_batch_size} x {config.batch.seq_length} tokens",
            flush=True,
        )
        for prefix in sources.without_roles if config.data.role_weights else ():
            print(f"{prefix} has no roles: all its tokens count 1.", flush=True)
        if sources.untested:
            print(f"no test after the last step: {sources.untested}", flush=True)
    with Metrics(
        config.checkpoint.save,
        size,
        start_iteration=start.iteration,
        tensorboard_dir=config.checkpoint.tensorboard_dir,
        writes=first,
        watch=config.watch,
        settings=flat(config),
    ) as metrics:
        try:
            test = loop(parts, metrics)
        except StoppedEarly:
            _leave(own_group)
            raise
    if first:
        facts = {"iteration": plan.train_iters, **test}
        write_manifest(config.checkpoint.save / "manifest.json", Manifest(stage="pretrain", settings=identity, facts=facts))
        print(f"done: {config.checkpoint.save}", flush=True)
    _leave(own_group)


def _leave(own_group: bool) -> None:
    """Part from the other processes, all of which are done."""
    import torch.distributed
    from megatron.core import parallel_state

    torch.distributed.barrier()
    parallel_state.destroy_model_parallel()
    if own_group:
        torch.distributed.destroy_process_group()


def keep_tokenizer(source: Path, target: Path, *, resumes: bool) -> None:
    """Carry the tokenizer's files with the checkpoints, for the export."""
    from megatron_instruct.tokenizer import copy_tokenizer

    if target.exists() and not resumes and not source.resolve().is_relative_to(target.resolve()):
        shutil.rmtree(target)  # that of a start that ended before its first checkpoint
    if not target.exists():
        with atomic_folder(target) as folder:
            copy_tokenizer(source, folder)
