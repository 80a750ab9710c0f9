#!/usr/bin/env python
"""Training on the GPUs of this machine: tokens/s and MFU for each preset that fits, BF16 and FP8, beside published figures.

Each preset and precision is trained a few steps by tools/pretrain.py itself, started with torchrun over so many GPUs, in the layout that
tools/plan.py's search finds fastest. Text of made-up words goes through tools/preprocess_data.py with a vocabulary of the preset's size.
The last line is JSON. --plan prints the commands and runs nothing; it needs no GPU where --gpu names a kind.
"""

import argparse
import json
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_instruct.errors import ConfigError  # noqa: E402
from megatron_instruct.models.architecture import Architecture  # noqa: E402
from megatron_instruct.models.presets import make_architecture  # noqa: E402
from megatron_instruct.planning.constants import load_constants  # noqa: E402
from megatron_instruct.planning.execution import Execution  # noqa: E402
from megatron_instruct.planning.gpus import Gpu, Precision, find_gpu, kinds  # noqa: E402
from megatron_instruct.planning.search import Task, rank  # noqa: E402

PRESETS = ("500M", "1.3B", "3B", "7B", "8B", "13B", "34B", "70B")
LLAMA_3 = 128256
VOCABULARIES = {"tiny": 512, "31M": 24064, "3B": LLAMA_3, "8B": LLAMA_3, "70B": LLAMA_3}
"""Ids of the tokenizers that the presets are known with; 32,000 for the others."""
WARM_UP = 4
"""Steps that are not counted: libraries are loaded, kernels chosen, memory found."""


@dataclass(frozen=True)
class Published:
    """One figure of another project."""

    preset: str
    precision: str
    gpus: int
    tokens_per_second_per_gpu: float
    source: str


PUBLISHED = (
    Published("8B", "fp8", 8, 13812, "Megatron-LM, Llama 3 8B example, H100"),
    Published("70B", "fp8", 64, 1621, "Megatron-LM, Llama 3 70B example, H100"),
    Published("8B", "bf16", 8, 6667, "torchtitan, compiled, H100"),
    Published("8B", "fp8", 8, 8532, "torchtitan, compiled, Float8, H100"),
)
PUBLISHED_MFU = "Megatron-LM on H100 in BF16, sequence 4096: 1.7B 41 %, 7.1B 47 %, 16B 49 %, 32B 46 %, 70B 42 %"


@dataclass(frozen=True)
class Case:
    """One training that is to be timed."""

    preset: str
    precision: Precision
    architecture: Architecture
    execution: Execution

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.precision}"


def plan(options: argparse.Namespace, gpu: Gpu) -> tuple[list[Case], list[str]]:
    """Return what fits, in its fastest layout, and a line for each preset and precision that is left out."""
    cases, left_out = [], []
    for preset in options.presets:
        vocab_size = VOCABULARIES.get(preset, 32000)
        architecture = make_architecture({}, preset_name=preset, vocab_size=vocab_size, seq_length=options.seq_length)
        for precision in options.precisions:
            if precision not in gpu.peak_flops:
                left_out.append(f"{preset} {precision}: {gpu.kind} has no {precision} units")
                continue
            task = Task(
                architecture=architecture,
                gpu=gpu,
                num_gpus=options.num_gpus,
                seq_length=options.seq_length,
                global_batch_size=options.global_batch_size,
                precision=precision,
                fp8_recipe=options.fp8_recipe,
            )
            ranking = rank(task, load_constants())
            if ranking.fitting:
                cases.append(Case(preset, precision, architecture, ranking.fitting[0].execution))
            elif ranking.closest is None:
                left_out.append(f"{preset} {precision}: no layout divides it over {options.num_gpus} GPUs")
            else:
                missing = ranking.closest.missing_bytes / 2**30
                left_out.append(f"{preset} {precision}: {missing:,.1f} GiB a GPU are missing on {options.num_gpus} x {gpu.kind}")
    return cases, left_out


def command(case: Case, options: argparse.Namespace, folder: Path) -> list[str]:
    """Return the command line of a case: torchrun and tools/pretrain.py."""
    execution, layout = case.execution, case.execution.layout
    words: list[object] = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", layout.world_size]
    words += [ROOT / "tools" / "pretrain.py", "--preset", case.preset]
    words += ["--train-data-path", folder / f"data-{case.architecture.vocab_size}_text_document"]
    words += ["--tokenizer-model", folder / f"tokenizer-{case.architecture.vocab_size}", "--save", folder / case.name]
    words += ["--seq-length", execution.seq_length, "--micro-batch-size", execution.micro_batch_size]
    words += ["--global-batch-size", execution.global_batch_size, "--train-iters", options.steps + WARM_UP]
    words += ["--lr", "3e-4", "--lr-warmup-iters", 2, "--recompute-granularity", execution.recompute]
    words += ["--tensor-model-parallel-size", layout.tensor, "--pipeline-model-parallel-size", layout.pipeline]
    words += ["--context-parallel-size", layout.context]
    if layout.virtual_pipeline is not None:
        per_chunk = case.architecture.num_layers // (layout.pipeline * layout.virtual_pipeline)
        words += ["--num-layers-per-virtual-pipeline-stage", per_chunk]
    if layout.layers_in_last_stage is not None:
        words += ["--decoder-last-pipeline-num-layers", layout.layers_in_last_stage]
    words += ["--sequence-parallel"] if layout.sequence_parallel else []
    if execution.distributed_optimizer:
        words += ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]
    words += ["--bf16"] if case.precision != "fp32" else []
    if case.precision == "fp8":
        words += ["--fp8-format", options.fp8_format, "--fp8-recipe", options.fp8_recipe]
        words += ["--fp8-emulation"] if options.rehearse else []
    return list(map(str, words))


def make_data(folder: Path, vocab_size: int, *, tokens: int) -> None:
    """Write a tokenizer of so many made-up words, and documents of them in Megatron's format."""
    import tokenizers

    words = [f"w{number}" for number in range(vocab_size - 1)]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({**{word: i for i, word in enumerate(words)}, "</s>": len(words)}, "</s>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(["</s>"])
    target = folder / f"tokenizer-{vocab_size}"
    target.mkdir()
    model.save(str(target / "tokenizer.json"))
    (target / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    choose = random.Random(1)
    with open(folder / "words.jsonl", "w") as stream:
        for number in range(max(2, tokens // 1000)):
            stream.write(json.dumps({"id": str(number), "text": " ".join(choose.choices(words, k=1000))}) + "\n")
    flags = ["--input", folder / "words.jsonl", "--output-prefix", folder / f"data-{vocab_size}", "--tokenizer-model", target]
    script = [sys.executable, ROOT / "tools" / "preprocess_data.py", *flags, "--append-eod"]
    subprocess.run(list(map(str, script)), check=True, capture_output=True, text=True)


def read_rates(metrics: Path, *, warm_up: int = WARM_UP) -> list[float]:
    """Return tokens a second of each step after the warm-up, over all processes."""
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [row["tokens_per_second"] for row in rows if "loss" in row and row["iteration"] > warm_up]


def measure(case: Case, options: argparse.Namespace, gpu: Gpu, folder: Path) -> dict[str, Any]:
    """Train the case and return its figures; where it fails, the reason."""
    result = subprocess.run(command(case, options, folder), capture_output=True, text=True, check=False)
    metrics = folder / case.name / "metrics.jsonl"
    rates = read_rates(metrics) if metrics.is_file() else []
    shutil.rmtree(folder / case.name, ignore_errors=True)  # a checkpoint of the last step may be large, or have found no room
    if len(rates) < options.steps:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "Error" in line or "error:" in line), lines[-1] if lines else "no message")
        return {"preset": case.preset, "precision": case.precision, "failed": reason.strip()}
    rate = statistics.median(rates) / case.execution.layout.world_size
    flops = rate * case.architecture.flops_per_token(case.execution.seq_length)
    layout = case.execution.layout
    return {
        "preset": case.preset,
        "precision": case.precision,
        "tokens_per_second_per_gpu": round(rate, 1),
        "mfu": float(f"{flops / gpu.peak_flops[case.precision]:.4g}"),
        "mfu_of_bf16_peak": float(f"{flops / gpu.peak_flops['bf16']:.4g}"),
        "layout": f"TP{layout.tensor} CP{layout.context} PP{layout.pipeline} DP{layout.data}, "
        f"micro batch {case.execution.micro_batch_size}, recompute {case.execution.recompute}",
    }


def lines(result: dict[str, Any], gpus: int) -> Iterator[str]:
    """Yield a result for a person to read, with the published figures for the same model, precision and GPUs below it."""
    name = f"{result['preset']:>5} {result['precision']}"
    if "failed" in result:
        yield f"{name}: failed: {result['failed']}"
        return
    yield (
        f"{name}: {result['tokens_per_second_per_gpu']:>10,.1f} tokens/s/GPU, MFU {result['mfu']:.1%} "
        f"({result['mfu_of_bf16_peak']:.1%} of the BF16 peak), {result['layout']}"
    )
    for row in PUBLISHED:
        if (row.preset, row.precision) == (result["preset"], result["precision"]):
            ratio = result["tokens_per_second_per_gpu"] / row.tokens_per_second_per_gpu
            ratio_text = f"ratio {ratio:.2f}" if row.gpus == gpus else f"on {row.gpus} GPUs"
            yield f"{'':>10}{row.tokens_per_second_per_gpu:>10,.0f} {row.source}: {ratio_text}"


def this_gpu(options: argparse.Namespace) -> Gpu:
    """Return the kind that was named, else that of this machine's GPUs. Raises ConfigError where neither is known."""
    if options.gpu is not None:
        return find_gpu(options.gpu)
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("there is no GPU here; run this on a machine with one, or see what it would do with --plan --gpu h100.")
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    fitting = [kind for kind in kinds() if kind.split("-")[0] in name.split("-") or kind.split("-")[0] in name]
    if not fitting:
        raise ConfigError(f"the GPU {name!r} is no kind of megatron_instruct/planning/gpus.yaml; name the closest with --gpu.")
    closest = min(fitting, key=lambda kind: abs(find_gpu(kind).memory_bytes / 2**30 - memory))
    return find_gpu(closest, memory_gib=memory)


def read_options(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", type=lambda text: text.split(","), default=list(PRESETS), help="sizes, with commas between")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["bf16", "fp8"], help="bf16, fp8 or both")
    parser.add_argument("--num-gpus", type=int, help="GPUs to train on (default: all of this machine)")
    parser.add_argument("--gpu", help="kind of GPU, of megatron_instruct/planning/gpus.yaml (default: this machine's)")
    parser.add_argument("--seq-length", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--global-batch-size", type=int, default=128, help="sequences of a step")
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--fp8-format", choices=("hybrid", "e4m3"), default="hybrid")
    parser.add_argument("--fp8-recipe", choices=("delayed", "tensorwise", "blockwise", "mxfp8"), default="tensorwise")
    parser.add_argument(
        "--folder", type=Path, help="where data and checkpoints are written meanwhile (default: the system's temporary folder)"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be run")
    parser.add_argument("--rehearse", action="store_true", help="run on CPU with emulated FP8, for trying this file: figures mean nothing")
    options = parser.parse_args(argv)
    if options.num_gpus is None:
        import torch

        options.num_gpus = max(1, torch.cuda.device_count())
    for name in ("num_gpus", "steps", "seq_length", "global_batch_size"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    unknown = set(options.precisions) - {"bf16", "fp8"}
    if unknown:
        parser.error(f"--precisions: {', '.join(sorted(unknown))} is neither bf16 nor fp8")
    return options


def main(argv: list[str] | None = None) -> int:
    options = read_options(argv)
    try:
        gpu = find_gpu(options.gpu or "h100") if options.rehearse else this_gpu(options)
        cases, left_out = plan(options, gpu)
    except ConfigError as error:
        print(f"gpu.py: {error}", file=sys.stderr)
        return 2
    for line in left_out:
        print(f"left out: {line}")
    if options.plan:
        for case in cases:
            print(" ".join(command(case, options, Path("FOLDER"))))
        return 0
    results = []
    with tempfile.TemporaryDirectory(prefix="gpu-benchmark-", dir=options.folder) as name:
        folder = Path(name)
        for case in cases:
            vocab_size = case.architecture.vocab_size
            if not (folder / f"tokenizer-{vocab_size}").exists():
                tokens = options.seq_length * options.global_batch_size * (options.steps + WARM_UP)
                make_data(folder, vocab_size, tokens=min(tokens, 4_000_000))
            results.append(measure(case, options, gpu, folder))
            print("\n".join(lines(results[-1], options.num_gpus)), flush=True)
    print(PUBLISHED_MFU)
    machine = "rehearsal on CPU" if options.rehearse else f"{options.num_gpus} x {gpu.kind}"
    print(json.dumps({"results": results, "left_out": left_out, "machine": machine, "seq_length": options.seq_length}))
    return 1 if any("failed" in result for result in results) or not results else 0


if __name__ == "__main__":
    sys.exit(main())
