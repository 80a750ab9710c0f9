#!/usr/bin/env python
"""Conversion both ways against `cp` of the same bytes on the same disk, and the peak memory of each way, over all its processes.

A random bf16 model is written as a Hugging Face folder, tensor by tensor. Then, in turns: cp of it, flushed to the disk as conversion
flushes; the way to Megatron; the way back, after which its files must have the SHA-256 that they began with. Before each, what it reads
is dropped from the page cache, so that all read from the disk. Each is a process of its own, as a user starts it. Of the model there
are never more than two copies on the disk. The time of converting a model of nothing is measured, too: it does not grow with the model.
Memory is watched in one turn more, whose times do not count: looking at it takes processor time.

--size takes several sizes; with two, the last line says what the larger one takes per byte against the smaller one. The last line is
JSON with medians: seconds, their ratio to cp, peak memory (PSS: pages that processes share count once), and the bound on it, twice the
largest tensor and 1 GB.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CONVERT = ROOT / "tools" / "convert_checkpoint.py"
SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("tiny", {}),
    "1.2b": ("1.3B", {}),
    "3.6b": ("7B", {"num_layers": 16}),
    "7b": ("7B", {}),
    "mixtral": ("8x7B", {"num_layers": 4}),
}
"""Name -> preset, and what differs from it."""
POOL = 1 << 26  # random values that the tensors of a model are cut from
WAYS = ("to_megatron", "to_huggingface")


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_bytes: int
    """Largest sum of the memory of all processes."""


@dataclass(frozen=True)
class Model:
    parameters: int
    largest_bytes: int
    """Of one tensor."""
    sha256: dict[str, str]
    """By file."""


def write_model(folder: Path, size: str, vocab_size: int) -> Model:
    """Write a random bf16 model with a tokenizer of 256 bytes."""
    import tokenizers
    import torch

    from megatron_instruct.conversion.safetensors_folder import Writer
    from megatron_instruct.conversion.weights import largest_tensor, weights_of
    from megatron_instruct.models.huggingface_config import write_config
    from megatron_instruct.models.presets import make_architecture

    preset, given = SIZES[size]
    architecture = make_architecture(given, preset_name=preset, vocab_size=vocab_size, seq_length=2048)
    folder.mkdir(parents=True)
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator([], trainer)
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}', encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(write_config(architecture, dtype="bfloat16", token_ids={})), encoding="utf-8")
    weights, generator = weights_of(architecture), torch.Generator().manual_seed(1)
    shapes = {name: shape for weight in weights for name, shape in zip(weight.huggingface, weight.shapes, strict=True)}
    pool = torch.empty(min(POOL, architecture.num_parameters), dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator)
    with Writer(folder, shapes, torch.bfloat16, max_shard_size="5GB") as writer:
        for name, shape in shapes.items():
            start = int(torch.randint(pool.numel(), (), generator=generator))
            count = torch.Size(shape).numel()
            tensor = torch.cat([pool[start:], *[pool] * (count // pool.numel()), pool[:start]])[:count]
            writer.write(name, (1.0 + tensor if "norm" in name else tensor).reshape(shape))
    known = {file.name: found.sha256 for file, found in writer.records().items()}
    return Model(architecture.num_parameters, 2 * largest_tensor(weights), known)


def forget(folder: Path) -> None:
    """Drop the folder's files from the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> Run:
    """Copy with cp, and flush what it wrote."""
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return Run(time.perf_counter() - start, 0)


def convert(source: Path, target: Path, *flags: str, watched: bool) -> Run:
    """Convert in a process of its own. watched: whether to note its memory, besides the time."""
    command = [sys.executable, str(CONVERT), "--load", str(source), "--save", str(target), *flags]
    forget(source)
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = [0]
    watch = threading.Thread(target=watch_memory, args=(process, peak)) if watched else None
    if watch:
        watch.start()
    said, _ = process.communicate()
    seconds = time.perf_counter() - start
    if watch:
        watch.join()
    if process.returncode:
        raise SystemExit(f"{said}{' '.join(command)} ended with status {process.returncode}")
    return Run(seconds, peak[0])


def watch_memory(process: "subprocess.Popen[str]", peak: list[int]) -> None:
    """Note the largest memory of a process and of those that it started."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        first = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for part in [first, *first.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                    lines = Path(f"/proc/{part.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
                    total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            peak[0] = max(peak[0], total)
            time.sleep(0.2)


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one size, and return its figures."""
    flags = ("--prove",) if options.prove else ("--no-prove",)
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        work = Path(place)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            model = other.submit(write_model, work / "source", size, options.vocab_size).result()
            other.submit(write_model, work / "nothing", "tiny", 257).result()
        runs: dict[str, list[Run]] = {"cp": [], **{way: [] for way in WAYS}, "start_up": []}
        for turn in range(options.turns + 1):
            watched = turn == options.turns
            if not watched:
                runs["cp"].append(copy(work / "source", work / "copy"))
                shutil.rmtree(work / "copy")
            runs["to_megatron"].append(convert(work / "source", work / "megatron", *flags, watched=watched))
            shutil.rmtree(work / "source")
            runs["to_huggingface"].append(convert(work / "megatron", work / "source", *flags, watched=watched))
            shutil.rmtree(work / "megatron")
            written = {
                output["path"]: output["sha256"] for output in json.loads((work / "source" / "manifest.json").read_text())["outputs"]
            }
            if not model.sha256.items() <= written.items():
                raise SystemExit("the model did not come back byte for byte")
            (work / "source" / "manifest.json").unlink()
            runs["start_up"].append(convert(work / "nothing", work / "little", *flags, watched=watched))
            shutil.rmtree(work / "little")
            took = ", ".join(
                f"{name} {f'{taken[-1].peak_bytes / 1e9:.2f} GB' if watched else f'{taken[-1].seconds:.2f} s'}"
                for name, taken in runs.items()
                if len(taken) > turn
            )
            print(f"{size}, {'memory' if watched else f'turn {turn + 1}/{options.turns}'}: {took}", flush=True)
    seconds = {name: statistics.median(run.seconds for run in taken[: options.turns]) for name, taken in runs.items()}
    return {
        "parameters": model.parameters,
        "gigabytes": round(2 * model.parameters / 1e9, 3),
        **{f"{name}_seconds": round(value, 2) for name, value in seconds.items()},
        **{f"{name}_ratio": round(seconds[name] / seconds["cp"], 2) for name in WAYS},
        **{f"{name}_ratio_without_start_up": round((seconds[name] - seconds["start_up"]) / seconds["cp"], 2) for name in WAYS},
        **{f"{name}_peak_gb": round(max(run.peak_bytes for run in runs[name]) / 1e9, 3) for name in (*WAYS, "start_up")},
        "bound_gb": round((2 * model.largest_bytes + 1e9) / 1e9, 3),
        "proved": options.prove,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", default=["tiny"], choices=list(SIZES), help="7b needs 31 GB of disk and a few minutes a turn")
    parser.add_argument("--vocab-size", type=int, default=32000, help="ids")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured")
    parser.add_argument("--no-prove", dest="prove", action="store_false", help="convert without the proof")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder); the disk that is measured")
    options = parser.parse_args()
    figures = {size: measure(size, options) for size in options.size}
    if len(figures) == 1:
        print(json.dumps(figures[options.size[0]]))
        return
    small, large = (figures[size] for size in options.size[:2])
    growth = {
        f"{way}_growth": round((large[f"{way}_seconds"] / small[f"{way}_seconds"]) / (large["parameters"] / small["parameters"]), 2)
        for way in WAYS
    }
    print(json.dumps({**figures, **growth}))


if __name__ == "__main__":
    main()
