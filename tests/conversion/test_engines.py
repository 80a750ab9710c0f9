"""What is exported loads in transformers, vLLM and lm-eval as it is: small random models of every family, and SmolLM2-135M."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.errors import InputError
from megatron_instruct.tokenizer import load_tokenizer
from tests.conversion.ask_engines import END, NEW_TOKENS, TEXT
from tests.conversion.conftest import FAMILIES, WriteModel

SCRIPT = Path(__file__).with_name("ask_engines.py")
REAL = "SmolLM2-135M"
VLLM_ON_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}


def ask(engine: str, folders: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """Return the engine's and transformers' answers by folder."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), engine, *map(str, folders)]
    environment = {**os.environ, **VLLM_ON_CPU, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def export(source: Path, place: Path, name: str) -> Path:
    """Take a folder to Megatron and back."""
    run(ConvertConfig(load=source, save=place / f"{name}-megatron", prove=False))
    run(ConvertConfig(load=place / f"{name}-megatron", save=place / name, prove=False))
    return place / name


def random_model(family: str, write_model: WriteModel) -> Path:
    """Write one with heads of a size that vLLM has kernels for."""
    config = {**FAMILIES[family], "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    return write_model(config, name=f"{family}-source")


def test_exported_folders_of_every_family_load_in_transformers_as_they_are(write_model: WriteModel, tmp_path: Path) -> None:
    folders = [export(random_model(family, write_model), tmp_path, family) for family in FAMILIES]
    found = {family: answers["transformers"] for family, answers in ask("transformers", folders).items()}
    assert list(found) == list(FAMILIES)
    for folder, (family, answers) in zip(folders, found.items(), strict=True):
        loaded = {"class": FAMILIES[family]["architectures"][0], "dtype": "torch.float32", "missing": []}
        loaded["ids"] = load_tokenizer(folder).encode(TEXT)
        assert {name: answers[name] for name in loaded} == loaded, family
        assert len(answers["tokens"]) == NEW_TOKENS


def test_a_tokenizer_that_transformers_would_not_take_for_the_family_fails_the_proof(
    write_model: WriteModel, tokenizer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers 5 takes Qwen's splitting for every model of the type qwen2; this tokenizer makes one token of a blank and a digit."""
    run(ConvertConfig(load=write_model(FAMILIES["qwen2"]), save=tmp_path / "megatron", tokenizer=tokenizer_folder, prove=False))
    with pytest.raises(InputError, match=r"the proof failed \(tokenizer\)"):
        run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    assert "FAIL  tokenizer  AutoTokenizer (Qwen2Tokenizer) makes other" in capsys.readouterr().out
    assert not list(tmp_path.glob("back*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FAMILIES, REAL])
def test_an_exported_folder_goes_on_in_vllm_as_in_transformers(
    name: str, write_model: WriteModel, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Slow: the engine alone takes about a minute to start."""
    source = request.getfixturevalue("smollm2_folder") if name == REAL else random_model(name, write_model)
    answers = ask("vllm", [export(source, tmp_path, name)])[name]
    theirs, ours = answers["transformers"], answers["vllm"]
    assert (ours["ids"], ours["tokens"]) == (theirs["ids"], theirs["tokens"])
    assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)


@pytest.mark.slow
def test_exported_folders_are_scored_by_lm_eval_as_by_transformers(write_model: WriteModel, smollm2_folder: Path, tmp_path: Path) -> None:
    """Slow: lm-eval's imports alone take half a minute."""
    sources = {**{family: random_model(family, write_model) for family in FAMILIES}, REAL: smollm2_folder}
    found = ask("lm_eval", [export(source, tmp_path, name) for name, source in sources.items()])
    assert list(found) == list(sources)
    for name, answers in found.items():
        assert answers["lm_eval"]["score"] == pytest.approx(answers["transformers"]["score"], abs=1e-2), name
        assert -1000 < answers["lm_eval"]["score"] < 0
    per_token = found[REAL]["lm_eval"]["score"] / len(load_tokenizer(smollm2_folder).encode(END))
    assert per_token > -6, "a model that has learnt English"
