"""SmolLM2-135M both ways with its own tokenizer, and an exported folder in the engines that are to load it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.tokenizer import load_tokenizer
from tests.conversion.conftest import FAMILIES, MISTRAL, WriteModel

VLLM = """
import sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    model = LLM(model=sys.argv[1], max_model_len=256, dtype="float32", enforce_eager=True, gpu_memory_utilization=0.3)
    (output,) = model.generate(["A hacker's bug"], SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False)
    print("TOKENS", len(output.outputs[0].token_ids))
"""
LM_EVAL = """
import json, sys
from pathlib import Path
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

found = {}
for folder in sys.argv[1:]:
    model = HFLM(pretrained=folder, device="cpu", batch_size=1, dtype="float32")
    request = Instance(request_type="loglikelihood", doc={}, arguments=("A hacker's", " bug"), idx=0)
    found[Path(folder).name] = model.loglikelihood([request], disable_tqdm=True)[0][0]
print(json.dumps(found))
"""
LOAD = """
import json, sys, torch, transformers

folder = sys.argv[1]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
model, loading = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
ids = tokenizer(sys.argv[2], add_special_tokens=False)["input_ids"]
model.generate(torch.tensor([ids]), max_new_tokens=4)
print(json.dumps({"class": type(model).__name__, "ids": ids, "missing": sorted(loading["missing_keys"]), "dtype": str(model.dtype)}))
"""


def test_the_real_small_model_is_proved_both_ways_and_comes_back_byte_for_byte(smollm2_folder: Path, tmp_path: Path) -> None:
    there = run(ConvertConfig(load=smollm2_folder, save=tmp_path / "megatron"))
    back = run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    for manifest in (there, back):
        assert manifest.facts["proof"]["proved"]
        (logits,) = [check["values"] for check in manifest.facts["proof"]["checks"] if check["name"] == "logits"]
        assert logits["tokens"] >= 128
        assert logits["max"] < 1e-3 < logits["largest"]
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (smollm2_folder / name).read_bytes(), name
    before = json.loads((smollm2_folder / "config.json").read_text())
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {name: after[name] for name in after if name != "rope_theta"}.items() <= before.items()


def test_an_exported_folder_loads_in_transformers_as_it_is(write_model: WriteModel, tmp_path: Path) -> None:
    run(ConvertConfig(load=write_model(MISTRAL), save=tmp_path / "megatron", prove=False))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back", prove=False))
    text = "Entry 7. A hacker's bug, number 49."
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path / "back"), text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    ids = load_tokenizer(tmp_path / "back").encode(text)
    assert found == {"class": "MistralForCausalLM", "ids": ids, "missing": [], "dtype": "torch.float32"}


@pytest.mark.slow
def test_exported_folders_of_every_family_load_in_lm_eval_as_they_are(write_model: WriteModel, tmp_path: Path) -> None:
    """Slow: lm-eval's imports alone take half a minute."""
    for family, config in FAMILIES.items():
        run(ConvertConfig(load=write_model(config, name=f"{family}-source"), save=tmp_path / f"{family}-megatron", prove=False))
        run(ConvertConfig(load=tmp_path / f"{family}-megatron", save=tmp_path / family, prove=False))
    command = [sys.executable, "-W", "ignore", "-c", LM_EVAL, *(str(tmp_path / family) for family in FAMILIES)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert list(found) == list(FAMILIES)
    assert all(-1000 < value < 0 for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_exported_folder_loads_in_vllm_as_it_is(family: str, write_model: WriteModel, tmp_path: Path) -> None:
    """Slow: the engine alone takes about a minute to start."""
    config = {**FAMILIES[family], "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    run(ConvertConfig(load=write_model(config), save=tmp_path / "megatron", prove=False))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    script = tmp_path / "generate.py"
    script.write_text(VLLM)
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "back")],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )
    assert "TOKENS 8" in done.stdout, done.stderr[-3000:]
