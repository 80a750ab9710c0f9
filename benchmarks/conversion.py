#!/usr/bin/env python
"""Conversion both ways against `cp` of the same bytes on the same disk, and the peak memory of each way.

A random model is written as a Hugging Face folder; then cp (flushed to the disk, as conversion flushes), the way to Megatron and the way
back take turns, each in a process of its own, as a user starts it. The time of a process that imports the same libraries and converts a
model of nothing is measured, too, and given beside the whole: it does not grow with the model. The last line is JSON with medians:
seconds, their ratio to cp, peak resident memory, and the bound on it: twice the largest tensor and 1 GB.
"""

import argparse
import concurrent.futures
import filecmp
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CONVERT = ROOT / "tools" / "convert_checkpoint.py"


@dataclass(frozen=True)
class Run:
    seconds: float
    peak_bytes: int
    """Largest resident memory of the process. (A process starts with the memory of the one that starts it, so this one stays small.)"""


def write_model(folder: Path, given: dict[str, Any], preset: str, vocab_size: int) -> tuple[int, int]:
    """Write a random bf16 model with a tokenizer of 256 bytes; return its parameters and the bytes of its largest tensor."""
    import tokenizers
    import torch

    from megatron_instruct.conversion.huggingface_config import write_config
    from megatron_instruct.conversion.safetensors_folder import Writer
    from megatron_instruct.conversion.weights import largest_tensor, weights_of
    from megatron_instruct.models.presets import make_architecture

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
    with Writer(folder, shapes, torch.bfloat16, max_shard_size="5GB") as writer:
        for name, shape in shapes.items():
            writer.write(name, torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, 0.02, generator=generator))
    return architecture.num_parameters, 2 * largest_tensor(weights)


def copy(source: Path, target: Path) -> Run:
    """Copy with cp, and flush what it wrote."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in target.rglob("*"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return Run(time.perf_counter() - start, 0)


def convert(source: Path, target: Path, *flags: str) -> Run:
    """Convert in a process of its own."""
    command = [sys.executable, str(CONVERT), "--load", str(source), "--save", str(target), *flags]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return Run(time.perf_counter() - start, usage.ru_maxrss * 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="size, such as 1.3B or 7B")
    parser.add_argument("--num-layers", type=int, help="instead of the preset's")
    parser.add_argument("--vocab-size", type=int, default=32000, help="ids")
    parser.add_argument("--turns", type=int, default=3, help="times that each is measured")
    parser.add_argument("--prove", action="store_true", help="with the proof, which runs both sides where the model fits the memory")
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder); the disk that is measured")
    options = parser.parse_args()
    flags = ("--prove",) if options.prove else ("--no-prove",)

    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        work = Path(place)
        given = {} if options.num_layers is None else {"num_layers": options.num_layers}
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as other:
            parameters, largest = other.submit(write_model, work / "source", given, options.preset, options.vocab_size).result()
            other.submit(write_model, work / "nothing", {"num_layers": 1}, "tiny", 257).result()
        runs: dict[str, list[Run]] = {"cp": [], "to_megatron": [], "to_huggingface": [], "start_up": []}
        for turn in range(options.turns):
            runs["cp"].append(copy(work / "source", work / "copy"))
            runs["to_megatron"].append(convert(work / "source", work / "megatron", *flags))
            runs["to_huggingface"].append(convert(work / "megatron", work / "back", *flags))
            runs["start_up"].append(convert(work / "nothing", work / "little", *flags))
            same = all(filecmp.cmp(file, work / "back" / file.name, shallow=False) for file in (work / "source").glob("*.safetensors"))
            if not same:
                raise SystemExit("the model did not come back byte for byte")
            for name in ("copy", "megatron", "back", "little"):
                shutil.rmtree(work / name)
            print(
                f"turn {turn + 1}/{options.turns}: " + ", ".join(f"{name} {taken[-1].seconds:.2f} s" for name, taken in runs.items()),
                flush=True,
            )
    seconds = {name: statistics.median(run.seconds for run in taken) for name, taken in runs.items()}
    ways = ("to_megatron", "to_huggingface")
    print(
        json.dumps(
            {
                "parameters": parameters,
                "gigabytes": round(2 * parameters / 1e9, 3),
                **{f"{name}_seconds": round(value, 2) for name, value in seconds.items()},
                **{f"{name}_ratio": round(seconds[name] / seconds["cp"], 2) for name in ways},
                **{f"{name}_ratio_without_start_up": round((seconds[name] - seconds["start_up"]) / seconds["cp"], 2) for name in ways},
                **{f"{name}_peak_gb": round(max(run.peak_bytes for run in runs[name]) / 1e9, 3) for name in (*ways, "start_up")},
                "bound_gb": round((2 * largest + 1e9) / 1e9, 3),
                "proved": options.prove,
            }
        )
    )


if __name__ == "__main__":
    main()
