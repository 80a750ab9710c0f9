"""A small random model with a real tokenizer, and held-out documents."""

import json
import shutil
from pathlib import Path

import pytest


def write_model(folder: Path, tokenizer_folder: Path, *, seed: int) -> Path:
    """Write a random Llama of two layers as a Hugging Face folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "a", tokenizer_folder, seed=1)


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "b", tokenizer_folder, seed=2)


@pytest.fixture(scope="session")
def heldout(tmp_path_factory: pytest.TempPathFactory, jargon: list[dict[str, str]]) -> Path:
    """Twelve entries, one of them far longer than the model."""
    rows = jargon[7::160]
    rows.append({"id": "long", "title": "long", "text": " ".join(row["text"] for row in jargon[200:203])})
    path = tmp_path_factory.mktemp("heldout") / "heldout.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
