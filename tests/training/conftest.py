"""Tiny data and tiny runs. Runs of one number of processes share a launch (several_runs.py)."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRETRAIN = ROOT / "tools" / "pretrain.py"
ITERATIONS, STOP = 20, 10


@dataclass(frozen=True)
class Metrics:
    """What a run wrote into metrics.jsonl, without what the clock decides."""

    training: list[tuple[int, float, float, float]]
    """iteration, loss, learning rate, norm of the gradient"""
    validation: list[tuple[int, float]]


def read_metrics(folder: Path) -> Metrics:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return Metrics(
        training=[(row["iteration"], row["loss"], row["lr"], row["grad_norm"]) for row in rows if "loss" in row],
        validation=[(row["iteration"], row["validation_loss"]) for row in rows if "validation_loss" in row],
    )


def weights(folder: Path, iteration: int) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole, whatever the layout that wrote it; the optimizer's too."""
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = FileSystemReader(str(folder / f"iter_{iteration:07d}"))
    found = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in found.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """The prefix of a real data set: the first 500 entries of the Jargon File."""
    folder = tmp_path_factory.mktemp("data")
    lines = (ROOT / "examples" / "quickstart" / "jargon.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[:500]), encoding="utf-8")
    return preprocess(folder / "corpus.jsonl", folder / "jargon", tokenizer_folder)


def preprocess(corpus: Path, prefix: Path, tokenizer: Path) -> Path:
    flags = ["--input", corpus, "--output-prefix", prefix, "--tokenizer-model", tokenizer, "--append-eod", "--workers", 1]
    command = [sys.executable, ROOT / "tools" / "preprocess_data.py", *flags]
    subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    return prefix.with_name(prefix.name + "_text_document")


@pytest.fixture(scope="session")
def flags(data: Path, tokenizer_folder: Path) -> Callable[..., list[str]]:
    """The command line of a tiny run of 20 steps; what is given comes last and wins.

    At seq_length 32 one batch (step 10) is ill-conditioned: rounding alone, even another micro batch on one process, moves its
    gradient norm of 2.6 by 1e-5 to 4e-5, while the steps around it agree to about 1e-6. At 64 all 20 steps agree to 1e-5.
    """

    def make(save: Path, *more: object) -> list[str]:
        words = [
            *("--preset", "tiny", "--data-path", data, "--tokenizer-model", tokenizer_folder, "--split", "90,10,0"),
            *("--seq-length", 64, "--micro-batch-size", 2, "--global-batch-size", 8, "--train-iters", ITERATIONS),
            *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", 2, "--save", save, "--save-interval", STOP),
            *("--eval-interval", 10, "--eval-iters", 2),
        ]
        return list(map(str, [*words, *more]))

    return make


Runs = Callable[[int, Mapping[str, tuple[object, ...]], Mapping[str, tuple[Path | str, tuple[object, ...]]]], dict[str, Path]]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, flags: Callable[..., list[str]], torchrun_session: Any) -> Runs:
    """Do named runs in one launch of so many processes, then resume named ones from iteration STOP; return their folders."""

    def do(
        processes: int, fresh: Mapping[str, tuple[object, ...]], resumed: Mapping[str, tuple[Path | str, tuple[object, ...]]]
    ) -> dict[str, Path]:
        folder = tmp_path_factory.mktemp(f"{processes}-processes")
        folders = {name: folder / name.replace(" ", "-") for name in (*fresh, *resumed)}
        plan: list[dict[str, object]] = [{"flags": flags(folders[name], *more), "of": None, "at": 0} for name, more in fresh.items()]
        for name, (source, more) in resumed.items():
            of = source if isinstance(source, Path) else folders[source]
            plan.append({"flags": flags(folders[name], *more), "of": str(of), "at": STOP})
        (folder / "runs.json").write_text(json.dumps(plan))
        result = torchrun_session(processes, Path(__file__).with_name("several_runs.py"), folder / "runs.json")
        assert result.returncode == 0, result.stderr[-3000:]
        assert json.loads((folder / "runs.json.ends").read_text()) == ["done"] * len(plan)
        return folders

    return do


TENSOR, PIPELINE = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
CONTEXT = ("--context-parallel-size", 2)
SHARDED = ("--use-distributed-optimizer",)
FULLY_SHARDED = ("--use-megatron-fsdp",)
STRATEGY = (*FULLY_SHARDED, "--data-parallel-sharding-strategy")
OVERLAPPED = (*SHARDED, "--overlap-grad-reduce", "--overlap-param-gather")
INTERLEAVED = (*PIPELINE, "--num-layers-per-virtual-pipeline-stage", 1)
SEQUENCE = (*TENSOR, "--sequence-parallel")
WITHIN = ("--reset-attention-mask",)
FIRST_STEP_IDLE = ("--train-iters", 1, "--lr-warmup-iters", 1, "--lr-decay-iters", 20)
"""One step at a learning rate of zero: the checkpoint holds the initial weights."""

GROWING = ("--rampup-batch-size", 4, 2, 30, "--micro-batch-size", 1)

MUON = ("--optimizer", "muon", "--muon-nesterov", "--muon-extra-scale-factor", 0.2, "--muon-fp32-matmul-prec", "highest")

WINDOW = ("--family", "mistral", "--sliding-window", 10)
"""Of the 64 tokens of a sequence; a context rank has 32."""

ONE: dict[str, tuple[object, ...]] = {
    "reference": (),
    "initial": FIRST_STEP_IDLE,
    "growing batch": GROWING,
    "muon": MUON,
    "window": WINDOW,
    "other padding": ("--make-vocab-size-divisible-by", 1000),
    "weight gradients apart": ("--transformer-config", "gradient_accumulation_fusion", "false"),
}
TWO: dict[str, tuple[object, ...]] = {
    "tensor": TENSOR,
    "pipeline": PIPELINE,
    "data": (),
    "distributed optimizer": SHARDED,
    "fully sharded": FULLY_SHARDED,
}
TWO_KINDS: dict[str, tuple[object, ...]] = {"muon tensor": (*TENSOR, *MUON), "window context": (*CONTEXT, *WINDOW)}
TWO_RESUMED: dict[str, tuple[str, tuple[object, ...]]] = {
    "again distributed optimizer": ("distributed optimizer", SHARDED),
    "distributed optimizer to tensor": ("distributed optimizer", TENSOR),
    "again fully sharded": ("fully sharded", FULLY_SHARDED),
    "fully sharded to tensor": ("fully sharded", TENSOR),
    "muon tensor to pipeline": ("muon tensor", (*PIPELINE, *MUON)),
}

# what takes longer, marked slow
ONE_MORE: dict[str, tuple[object, ...]] = {
    "micro batch 4": ("--micro-batch-size", 4),
    "recompute all": ("--recompute-granularity", "full"),
    "recompute the first": ("--recompute-granularity", "full", "--recompute-method", "block", "--recompute-num-layers", 2),
    "recompute attention": ("--recompute-granularity", "selective"),
    "bf16": ("--bf16", "--train-iters", 3, "--lr-decay-iters", 20),
    "logged every 4": ("--log-interval", 4),
    "within documents": WITHIN,
}
MORE: dict[str, tuple[object, ...]] = {
    "overlapped": OVERLAPPED,
    "interleaved": INTERLEAVED,
    "sequence parallel": SEQUENCE,
    "context": CONTEXT,
    "uneven stages": (*PIPELINE, "--decoder-last-pipeline-num-layers", 1),
    "pipeline recompute": (*PIPELINE, "--recompute-granularity", "full"),
    "data micro batch 1": ("--micro-batch-size", 1),
    **{f"sharded by {strategy}": (*STRATEGY, strategy) for strategy in ("no_shard", "optim", "optim_grads")},
    "fully sharded context": (*FULLY_SHARDED, *CONTEXT),
    "fully sharded sequence": (*FULLY_SHARDED, *SEQUENCE),
    "fully sharded recompute": (*FULLY_SHARDED, "--recompute-granularity", "full"),
}
MORE_GROWING: dict[str, tuple[object, ...]] = {"pipeline growing": (*PIPELINE, *GROWING), "data growing": (*SHARDED, *GROWING)}
MORE_WITHIN: dict[str, tuple[object, ...]] = {
    "tensor within documents": (*SEQUENCE, *WITHIN),
    "pipeline within documents": (*PIPELINE, "--recompute-granularity", "full", *WITHIN),
}
MORE_RESUMED: dict[str, tuple[str, tuple[object, ...]]] = {
    "again overlapped": ("overlapped", OVERLAPPED),
    "again interleaved": ("interleaved", INTERLEAVED),
    "again context": ("context", CONTEXT),
    "again sequence parallel": ("sequence parallel", SEQUENCE),
    **{f"again {name}": (name, MORE[name]) for name in MORE if "sharded by" in name or name == "fully sharded sequence"},
    "again data growing": ("data growing", MORE_GROWING["data growing"]),
}


@pytest.fixture(scope="session")
def blend(data: Path) -> tuple[object, ...]:
    """The same data set twice, in unequal parts."""
    return ("--data-path", "0.3", data, "0.7", data)


def in_phases(data: Path, *, last: str = "0.5 {0} 0.5 {0}") -> tuple[object, ...]:
    """Three phases on one data set: of the first 7 steps, of the next 7 with a learning rate of their own, and of the last."""
    first, second = f"{{until: 7, data_path: {data}}}", f"{{until: 70%, data_path: 0.3 {data} 0.7 {data}, lr: 5.0e-4, min_lr: 0}}"
    third = f"{{data_path: {last.format(data)}}}"
    return ("--data-path", "--valid-data-path", data, "--phases", first, second, third)


@pytest.fixture(scope="session")
def one(runs: Runs, blend: tuple[object, ...], data: Path) -> dict[str, Path]:
    """Runs of one process; "reference" is what every layout must equal."""
    return runs(
        1,
        {**ONE, "blend": blend, "phases": in_phases(data), "phases growing": (*in_phases(data), *GROWING)},
        {
            "again reference": ("reference", ()),
            "again muon": ("muon", MUON),
            "again phases": ("phases", in_phases(data)),
            "phases with another end": ("phases", in_phases(data, last="{0}")),
        },
    )


@pytest.fixture(scope="session")
def one_more(runs: Runs) -> dict[str, Path]:
    """Further runs of one process."""
    return runs(1, ONE_MORE, {"again logged every 4": ("logged every 4", ONE_MORE["logged every 4"])})


@pytest.fixture(scope="session")
def two(runs: Runs) -> dict[str, Path]:
    """Runs of two processes."""
    return runs(2, {**TWO, **TWO_KINDS}, TWO_RESUMED)


@pytest.fixture(scope="session")
def more(runs: Runs, one: dict[str, Path], blend: tuple[object, ...]) -> dict[str, Path]:
    """Further runs of two processes."""
    elsewhere = {
        "interleaved to data": ("interleaved", SHARDED),
        "one to interleaved": (one["reference"], INTERLEAVED),
        "one to tensor": (one["reference"], TENSOR),
        "one to fully sharded": (one["reference"], FULLY_SHARDED),
        "sharded optimizer to fully sharded": ("sharded by optim", FULLY_SHARDED),
    }
    return runs(2, {**MORE, **MORE_GROWING, **MORE_WITHIN, "blend": (*TENSOR, *blend)}, {**MORE_RESUMED, **elsewhere})


@pytest.fixture(scope="session")
def torchrun_session() -> Callable[..., subprocess.CompletedProcess[str]]:
    """As the fixture torchrun, for fixtures that live as long as the session."""

    def run(processes: int, script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
        command = [sys.executable, *launcher, str(script), *map(str, arguments)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)

    return run


def assert_same_end(folder: Path, undisturbed: Path) -> None:
    """Bit for bit: metrics, weights and the optimizer's state."""
    import torch

    assert read_metrics(folder) == read_metrics(undisturbed)
    mine, theirs = weights(folder, ITERATIONS), weights(undisturbed, ITERATIONS)
    assert mine.keys() == theirs.keys()
    assert any("exp_avg" in name for name in mine)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
