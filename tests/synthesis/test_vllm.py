"""The real vLLM engine with the real small model, through the tool in a process of its own."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow  # the default suite starts the engine once, in tests/e2e/test_readme.py
def test_a_real_model_writes_grounded_pairs(
    bench: Any, smollm2_folder: Path, jargon: list[dict[str, str]], start: Callable[..., subprocess.Popen[str]]
) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    rows = [row for row in jargon if row["title"] in ("broadcast storm", "lexer", "jiffy", "banner")]
    settings = {"engine": "vllm", "model": smollm2_folder, "prompt_format": "chat-extractive", "rounds": 2}
    limits = {"max_new_tokens": 120, "max_model_len": 1536, "threads": 1, "kv_cache_gib": 1}
    arguments = bench.arguments(bench.corpus(rows), **settings, **limits)
    process = start("synthesize.py", *arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    manifest = json.loads((bench.folder / "out" / "manifest.json").read_text())
    assert manifest["counts"]["texts"] == 4
    assert manifest["counts"]["texts_with_pairs"] >= 3
    assert 40 <= manifest["counts"]["generated_tokens"] <= 4 * 120
    shots = [shot for example in bench.lines("out/examples.jsonl") for shot in example["shots"]]
    assert sorted(shot["id"] for shot in shots) == sorted(row["id"] for row in rows)
    assert all(pair["answer"] in shot["text"] and pair["question"].endswith("?") for shot in shots for pair in shot["pairs"])
    assert any(len(example["shots"]) == 2 for example in bench.lines("out/examples.jsonl")), "the second round saw the first"
    assert "4 texts" in out
