"""Random configurations of every family: config.json and weights there and back bit for bit, and the logits of transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.conversion.weights import Weight, join, split, weights_of
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.huggingface_config import read_architecture, write_config
from tests.conversion.conftest import WriteModel, random_tensors
from tests.conversion.random_configs import NAMES, random_config

SAMPLE, ALL, WITH_LOGITS = 60, 1200, 20
DTYPES = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("family", NAMES)
def test_a_sample_of_random_models_comes_back_bit_for_bit(family: str) -> None:
    for number in range(NAMES.index(family), SAMPLE, len(NAMES)):
        check_round_trip(number)


@pytest.mark.slow
def test_more_than_a_thousand_random_models_come_back_bit_for_bit() -> None:
    for number in range(SAMPLE, ALL):
        check_round_trip(number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(WITH_LOGITS))
def test_random_models_have_the_logits_of_transformers_on_both_sides(number: int, write_model: WriteModel, tmp_path: Path) -> None:
    config = {**random_config(number), "vocab_size": 500 + number, "max_position_embeddings": 512}
    source = write_model(config, dtype=list(DTYPES)[number % 3])
    there = run(ConvertConfig(load=source, save=tmp_path / "megatron"))
    back = run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    for manifest in (there, back):
        logits = next(check for check in manifest.facts["proof"]["checks"] if check["name"] == "logits")
        assert logits["values"]["max"] < 1e-4 * logits["values"]["largest"]  # what rounding does to them is the proof's to judge


def check_round_trip(number: int) -> None:
    """Take one random model from Hugging Face's form to megatron-core's parameters and back."""
    config, dtype = random_config(number), list(DTYPES)[number % 3]
    architecture = read_architecture(config, source=f"config {number}", max_position_embeddings=None)
    written = write_config(architecture, dtype="float32", token_ids={})
    assert read_architecture(written, source=f"config {number}, written", max_position_embeddings=None) == architecture
    tensors = random_bits(config, dtype, number)
    weights = weights_of(architecture)
    assert sorted(name for weight in weights for name in weight.huggingface) == sorted(tensors), "each tensor once"
    assert sum(tensor.numel() for tensor in tensors.values()) == architecture.num_parameters
    for weight in weights:
        parts = [tensors[name] for name in weight.huggingface]
        assert tuple(tuple(part.shape) for part in parts) == weight.shapes
        ranks = math.gcd(architecture.num_query_groups, 4)
        rows = math.ceil(architecture.vocab_size / (128 * ranks)) * 128 * ranks if weight.kind == "vocabulary" else parts[0].size(0)
        whole = join(weight, parts, architecture, rows=rows)
        for name, part, back in zip(weight.huggingface, parts, split(weight, whole, architecture), strict=True):
            assert torch.equal(back.contiguous().view(DTYPES[dtype]), part.view(DTYPES[dtype])), name
        check_ranks(weight, whole, parts, architecture, ranks)
        if weight.kind == "vocabulary":
            assert not whole[architecture.vocab_size :].any(), "rows that pad the vocabulary are zero"


def check_ranks(weight: Weight, whole: torch.Tensor, parts: list[torch.Tensor], architecture: Architecture, ranks: int) -> None:
    """The rows of a tensor rank hold whole groups: queries, key and value of its own key/value heads."""
    if weight.kind != "qkv":
        return
    for rank in range(ranks):
        mine = [part.chunk(ranks)[rank] for part in parts]
        size = architecture.num_query_groups // ranks
        head = architecture.kv_channels
        rows = [
            torch.cat([part.unflatten(0, (size, -1))[group] for part in mine]).unflatten(0, (-1, head)).flatten(0, 1)
            for group in range(size)
        ]
        assert torch.equal(whole.chunk(ranks)[rank].view(DTYPES[whole.dtype]), torch.cat(rows).view(DTYPES[whole.dtype]))


def random_bits(config: dict[str, Any], dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    """Return tensors of the model's shapes that hold every bit pattern there is, NaN and infinities too."""
    generator, integers = torch.Generator().manual_seed(seed), DTYPES[dtype]
    limits = torch.iinfo(integers)
    return {
        name: torch.randint(limits.min, limits.max, tensor.shape, generator=generator, dtype=integers).view(dtype)
        for name, tensor in random_tensors(config, torch.float32).items()
    }
