#!/usr/bin/env python
"""What operations cost: saving, synchronous against asynchronous; going on, against a cold start; watching, against the steps.

Saving: one process trains a model and saves it in turns, one way and the other; a save's stall is the time in which no step runs
(the call itself and, of the asynchronous one, committing what its process wrote). The steps beside a writing process are compared
with steps alone, since on a CPU both want its cores.
Resuming: tools/pretrain.py is started as a user does, from nothing and from its checkpoint, in turns; what counts is the time from the
start of the process to the end of its first step.
Watching: in a run of tools/pretrain.py with a line of progress, metrics.jsonl and TensorBoard every step, what is neither forward and
backward nor the optimizer's update: the search for bad steps, the ledger, the log. And a page of its curves, made every ten minutes.
The last line is JSON with the medians and their ratios.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


class Training:
    """A model in training on random tokens, on one process."""

    def __init__(self, options: argparse.Namespace) -> None:
        from megatron_instruct.platform import device, noise

        noise.silence()
        from megatron_instruct.models.build import BuildOptions, build_model, join_model_parallel_groups
        from megatron_instruct.models.layout import ParallelLayout
        from megatron_instruct.models.presets import make_architecture
        from megatron_instruct.training.optimizer import make_optimizer, wrap_data_parallel
        from megatron_instruct.training.settings.batch import BatchOptions
        from megatron_instruct.training.settings.parallel import ParallelOptions
        from megatron_instruct.training.step import StepShape

        machine = device.initialize(threads=options.threads)
        join_model_parallel_groups(ParallelLayout(), seed=1)
        self.architecture = make_architecture({}, preset_name=options.preset, vocab_size=options.vocab_size, seq_length=options.seq_length)
        self.models = build_model(self.architecture, ParallelLayout(), machine, BuildOptions())
        self.chunks = wrap_data_parallel(self.models, ParallelOptions())
        batch = BatchOptions(train_iters=1000, seq_length=options.seq_length, global_batch_size=2, lr=3e-4)
        self.optimizer = make_optimizer(self.chunks, ParallelOptions(), batch, machine)
        self.shape = StepShape(num_microbatches=1, micro_batch_size=2, seq_length=options.seq_length)
        self.data = self._batches(options)

    def _batches(self, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
        import torch

        generator = torch.Generator().manual_seed(1)
        positions, mask = torch.arange(options.seq_length).expand(2, -1), torch.ones(2, options.seq_length)
        while True:
            tokens = torch.randint(options.vocab_size, (2, options.seq_length + 1), generator=generator)
            yield {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "loss_mask": mask, "position_ids": positions}

    def step(self) -> float:
        from megatron_instruct.training.step import compute_gradients, update

        return _seconds(lambda: update(self.optimizer, compute_gradients(self.chunks, self.optimizer, [self.data], self.shape)))


def saving(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the medians over the turns."""
    from megatron_instruct.training.checkpoint import Checkpoints
    from megatron_instruct.training.settings.checkpoint import CheckpointOptions

    training = Training(options)
    stalls: dict[str, list[float]] = {"synchronous": [], "asynchronous": []}
    alone: list[float] = []
    beside: list[float] = []
    training.step()
    for turn in range(-1, options.turns):
        for name, measured in stalls.items():
            save = folder / name
            save.mkdir(exist_ok=True)
            settings = CheckpointOptions(save=save, async_save=name == "asynchronous", keep_last=1)
            identity = {"tokenizer": "random", "seed": 1, "dtype": "fp32"}
            with Checkpoints(
                settings, training.models, training.optimizer, architecture=training.architecture, identity=identity
            ) as checkpoints:
                stall = _seconds(lambda saver=checkpoints, number=turn + 2: saver.save(number))
                steps = []
                while (save / f"iter_{turn + 2:07d}.partial").exists():
                    steps.append(training.step())
                    stall += _seconds(checkpoints.poll)
            if turn >= 0:  # the first turn warms up
                measured.append(stall)
                beside += steps
                alone += [training.step() for _ in range(len(steps))]
    medians = {name: statistics.median(measured) for name, measured in stalls.items()}
    size = sum(path.stat().st_size for path in folder.glob("synchronous/iter_*/*"))
    return {
        "checkpoint_gb": round(size / 1e9, 3),
        **{f"{name}_stall_seconds": round(median, 4) for name, median in medians.items()},
        "stall_ratio": round(medians["asynchronous"] / medians["synchronous"], 4),
        "steps_beside_a_save": len(beside) / options.turns,
        "step_seconds_alone": round(statistics.median(alone), 4) if alone else None,
        "step_ratio_beside": round(statistics.median(beside) / statistics.median(alone), 3) if beside else None,
    }


def watching(flags: list[str], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the share of a step, the medians over the steps of one run in this process."""
    from megatron_instruct.training import bad_steps, run

    starts, needed = list[float](), list[float]()
    bad_steps.compute_gradients = _timed(bad_steps.compute_gradients, starts, needed)
    bad_steps.update = _timed(bad_steps.update, [], needed)
    looking = list[float]()
    bad_steps.gradient_is_finite = _timed(bad_steps.gradient_is_finite, [], looking)
    more = ["--save", folder / "watched", "--tensorboard-dir", folder / "events", "--train-iters", options.watched_steps]
    more += ["--global-batch-size", 2 * options.watched_microbatches, "--save-interval", options.watched_steps]
    status = run.main([*flags, *map(str, more)])
    assert status == 0, "the run failed"
    steps = [end - start for start, end in itertools.pairwise(starts)][2:]
    watched = [step - compute - update for step, compute, update in zip(steps, needed[4::2], needed[5::2], strict=False)]
    return {
        "watched_step_seconds": round(statistics.median(steps), 4),
        "watching_seconds": round(statistics.median(watched), 5),
        "watching_seconds_looking_for_what_is_not_finite": round(statistics.median(looking), 5),
        "watching_share": round(statistics.median(watched) / statistics.median(steps), 5),
        **_page(folder / "watched"),
    }


def _timed(action: Any, starts: list[float], seconds: list[float]) -> Any:
    def timed(*arguments: Any) -> Any:
        starts.append(time.perf_counter())
        result = action(*arguments)
        seconds.append(time.perf_counter() - starts[-1])
        return result

    return timed


def _page(save: Path) -> dict[str, Any]:
    """Return what the page of a run of ten thousand steps costs, made every ten minutes."""
    metrics = save / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    long = [{**rows[number % len(rows)], "iteration": number + 1} for number in range(10_000)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in long))
    command = [sys.executable, str(ROOT / "tools" / "report_run.py"), "--runs", str(save)]
    seconds = [_seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)) for _ in range(3)]
    return {"page_seconds": round(statistics.median(seconds), 2), "page_share": round(statistics.median(seconds) / 600.0, 5)}


def resuming(flags: list[str], options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the medians over the starts."""
    command = [sys.executable, str(ROOT / "tools" / "pretrain.py"), *flags]
    stopped = folder / "stopped"
    _first_step(command, stopped, kill=False)
    (stopped / "manifest.json").unlink()
    seconds: dict[str, list[float]] = {"cold": [], "resumed": []}
    for turn in range(-1, options.starts):
        for name, measured in seconds.items():
            save = folder / name
            shutil.rmtree(save, ignore_errors=True)
            if name == "resumed":
                shutil.copytree(stopped, save)
            taken = _first_step([*command, "--train-iters", "3"] if name == "cold" else command, save, kill=True)
            if turn >= 0:
                measured.append(taken)
    medians = {name: statistics.median(measured) for name, measured in seconds.items()}
    return {
        **{f"{name}_start_seconds": round(median, 2) for name, median in medians.items()},
        "resume_ratio": round(medians["resumed"] / medians["cold"], 3),
    }


def _flags(options: argparse.Namespace, folder: Path) -> list[str]:
    """Preprocess a small corpus and return the flags of a run of three steps that saves after the second."""
    import tokenizers

    corpus = ROOT / "examples" / "quickstart" / "jargon.jsonl"
    model = tokenizers.ByteLevelBPETokenizer()
    model.train([str(corpus)], vocab_size=options.resume_vocab_size, special_tokens=["<|endoftext|>"], show_progress=False)
    (folder / "tokenizer").mkdir()
    model.save(str(folder / "tokenizer" / "tokenizer.json"))
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    words = ["--input", corpus, "--output-prefix", folder / "data", "--tokenizer-model", folder / "tokenizer", "--append-eod"]
    subprocess.run([sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, words)], check=True, capture_output=True)
    flags = ["--preset", options.preset, "--data-path", folder / "data_text_document", "--tokenizer-model", folder / "tokenizer"]
    flags += ["--seq-length", options.seq_length, "--micro-batch-size", 2, "--global-batch-size", 2, "--lr", "1e-4", "--train-iters", 3]
    flags += ["--lr-warmup-iters", 1, "--save-interval", 2, "--data-cache-path", folder / "cache", "--num-threads", options.threads]
    return list(map(str, flags))


def _first_step(command: list[str], save: Path, *, kill: bool) -> float:
    """Start a run; return the seconds until metrics.jsonl has one line more than at its start."""
    metrics = save / "metrics.jsonl"
    resumed = metrics.exists()
    if resumed:  # as a run stopped after its second step
        shutil.rmtree(save / "iter_0000003")
        (save / "latest_checkpointed_iteration.txt").write_text("2\n")
        metrics.write_text("".join(line for line in metrics.read_text().splitlines(keepends=True) if '"iteration": 3' not in line))
    wanted = f'"iteration": {3 if resumed else 1},'
    start = time.perf_counter()
    process = subprocess.Popen([*command, "--save", str(save)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (metrics.exists() and wanted in metrics.read_text()):
        if process.poll() not in (None, 0):
            raise RuntimeError(f"the run failed: {process.stderr.read() if process.stderr else ''}")
        time.sleep(0.005)
    seconds = time.perf_counter() - start
    if kill:
        process.kill()
    process.communicate()
    return seconds


def _seconds(action: Any) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="31M")
    parser.add_argument("--vocab-size", type=int, default=24064, help="ids of the model that is saved")
    parser.add_argument("--resume-vocab-size", type=int, default=8000, help="ids of the model that is resumed")
    parser.add_argument("--seq-length", type=int, default=256, help="tokens")
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1) - 1), help="CPU threads of the training")
    parser.add_argument("--turns", type=int, default=7, help="saves of each kind")
    parser.add_argument("--starts", type=int, default=5, help="starts of each kind")
    parser.add_argument("--watched-steps", type=int, default=20, help="steps of the run that is watched")
    parser.add_argument("--watched-microbatches", type=int, default=8, help="microbatches of 2 sequences in a step of it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        flags = _flags(options, folder)
        parts = {
            "resuming": lambda place: resuming(flags, options, place),
            "watching": lambda place: watching(flags, options, place),
            "saving": lambda place: saving(options, place),
        }
        result: dict[str, Any] = {}
        for name, part in parts.items():
            (folder / name).mkdir()
            result |= part(folder / name)
            print(json.dumps(result), flush=True)
            shutil.rmtree(folder / name)
    result |= {"threads": options.threads, "preset": options.preset, "machine": platform.processor() or platform.machine()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
