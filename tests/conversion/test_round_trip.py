"""Both ways for random models: the same bits back, and the logits of transformers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.errors import ConfigError
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.models.huggingface_config import read_architecture
from tests.conversion.conftest import FAMILIES, LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, WriteModel

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
OLD = {name: value for name, value in LLAMA.items() if name != "rope_parameters"}
CASES: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "llama, groups of query heads": (LLAMA, torch.float32),
    "llama, odd head counts, tied": (
        {
            **LLAMA,
            "hidden_size": 72,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "num_hidden_layers": 3,
        },
        torch.bfloat16,
    ),
    "llama, one key head, head size of its own": (
        {**LLAMA, "hidden_size": 60, "num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 24},
        torch.float32,
    ),
    "llama 3.1 scaling": ({**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}}, torch.float32),
    "llama 3.1 scaling, older form": ({**OLD, "rope_theta": 500000.0, "rope_scaling": {"type": "llama3", **LLAMA3}}, torch.float32),
    "linear scaling": ({**OLD, "rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}, torch.float32),
    "mistral, another epsilon and base": (
        {**MISTRAL, "rms_norm_eps": 3e-4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        torch.float32,
    ),
    "mistral, sliding window in effect": ({**MISTRAL, "sliding_window": 37}, torch.float32),
    "qwen2, biases": (QWEN2, torch.float32),
    "qwen2, window from the second layer on": (
        {**QWEN2, "use_sliding_window": True, "sliding_window": 29, "max_window_layers": 1},
        torch.float32,
    ),
    "qwen3, norms of queries and keys, tied": ({**QWEN3, "tie_word_embeddings": True}, torch.bfloat16),
    "mixtral": (MIXTRAL, torch.float32),
    "mixtral, all of three experts, window": (
        {**MIXTRAL, "num_local_experts": 3, "num_experts_per_tok": 3, "sliding_window": 50},
        torch.bfloat16,
    ),
    "mistral, vocabulary that needs padding, fp16": ({**MISTRAL, "vocab_size": 613}, torch.float16),
}


def check(manifest: Manifest, name: str) -> dict[str, Any]:
    (found,) = [entry for entry in manifest.facts["proof"]["checks"] if entry["name"] == name]
    return dict(found)


@pytest.mark.parametrize("name", CASES)
def test_a_model_comes_back_bit_for_bit_with_the_logits_of_transformers(name: str, write_model: WriteModel, tmp_path: Path) -> None:
    config, dtype = CASES[name]
    source = write_model(config, dtype=dtype)
    there = run(ConvertConfig(load=source, save=tmp_path / "megatron"))
    back = run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    for manifest in (there, back):
        assert manifest.facts["proof"]["proved"]
        logits = check(manifest, "logits")["values"]
        assert logits["max"] < 1e-4, "fp32 on both sides"
        assert logits["largest"] > 1.0, "large enough for a difference to show"
        assert logits["tokens"] >= 128
    before = safetensors.torch.load_file(source / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype == dtype
        assert torch.equal(before[tensor], after[tensor]), tensor
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert {key: written[key] for key in OLD} == OLD | {key: config[key] for key in OLD}
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert read_manifest(tmp_path / "back" / "manifest.json", stage="convert") == back


def test_what_a_second_run_finds_it_leaves_and_other_settings_are_refused(
    write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = write_model(), tmp_path / "megatron"
    run(ConvertConfig(load=source, save=target))
    before = {file: file.stat().st_mtime_ns for file in target.rglob("*")}
    run(ConvertConfig(load=source, save=target))
    assert "Finished already" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in target.rglob("*")} == before
    with pytest.raises(ConfigError, match="dtype='fp32', and this run asks for dtype='bf16'"):
        run(ConvertConfig(load=source, save=target, dtype="bf16"))
    run(ConvertConfig(load=target, save=tmp_path / "back", prove=False))
    run(ConvertConfig(load=target, save=tmp_path / "back", prove=False))
    with pytest.raises(ConfigError, match="prove=False, and this run asks for prove=True"):
        run(ConvertConfig(load=target, save=tmp_path / "back"))


def test_two_runs_write_the_same_bytes(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model()
    for name in ("a", "b"):
        run(ConvertConfig(load=source, save=tmp_path / name))
        run(ConvertConfig(load=tmp_path / name, save=tmp_path / f"{name}-back"))
    for first, second in (("a", "b"), ("a-back", "b-back")):
        files = {file.relative_to(tmp_path / first): file.read_bytes() for file in (tmp_path / first).rglob("*") if file.is_file()}
        others = {file.relative_to(tmp_path / second): file.read_bytes() for file in (tmp_path / second).rglob("*") if file.is_file()}
        assert files.keys() == others.keys()
        assert [name for name in files if files[name] != others[name] and (second == "b" or name.name != "manifest.json")] == []


def test_an_export_in_another_type_is_rounded_and_says_so(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model()
    run(ConvertConfig(load=source, save=tmp_path / "megatron", prove=False))
    manifest = run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back", dtype="bf16"))
    assert "after rounding to bf16" in check(manifest, "weights")["detail"]
    assert 1e-4 < check(manifest, "logits")["values"]["max"] <= check(manifest, "logits")["values"]["tolerance"]
    before = safetensors.torch.load_file(source / "model.safetensors")
    after = safetensors.torch.load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["dtype"] == "bfloat16"


def test_shards_are_no_larger_than_asked_for_and_come_back(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model()
    run(ConvertConfig(load=source, save=tmp_path / "megatron", prove=False))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "sharded", max_shard_size="150KB"))
    shards = sorted((tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 2
    run(ConvertConfig(load=tmp_path / "sharded", save=tmp_path / "again", prove=False))
    run(ConvertConfig(load=tmp_path / "again", save=tmp_path / "back", prove=False))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_tied_output_layer_that_is_stored_twice_is_set_aside_by_name(write_model: WriteModel, tmp_path: Path) -> None:
    def store_twice(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    source = write_model({**LLAMA, "tie_word_embeddings": True}, change=store_twice)
    manifest = run(ConvertConfig(load=source, save=tmp_path / "megatron"))
    assert check(manifest, "names")["values"]["set_aside"] == ["lm_head.weight", "model.layers.1.self_attn.rotary_emb.inv_freq"]


def test_the_longest_sequence_can_be_set(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model({**MISTRAL, "sliding_window": 256})
    run(ConvertConfig(load=source, save=tmp_path / "megatron", max_position_embeddings=256))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["sliding_window"], written["max_position_embeddings"]) == (256, 256)


def test_a_window_of_a_qwen_that_no_layer_has_is_none(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model({**QWEN2, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 28})
    run(ConvertConfig(load=source, save=tmp_path / "megatron"))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back", prove=False))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["use_sliding_window"], written["sliding_window"]) == (False, None)


@pytest.mark.parametrize("name", FAMILIES)
def test_key_value_heads_that_are_left_out_are_those_of_transformers(name: str) -> None:
    config = {**FAMILIES[name], "num_attention_heads": 32, "hidden_size": 256, "head_dim": 8}
    silent = {key: value for key, value in config.items() if key != "num_key_value_heads"}
    theirs = transformers.AutoConfig.for_model(**silent).num_key_value_heads
    assert read_architecture(silent, source="", max_position_embeddings=None).num_query_groups == theirs
    none = read_architecture({**silent, "num_key_value_heads": None}, source="", max_position_embeddings=None)
    assert none.num_query_groups == 32, "one for each head, in transformers too where it takes null"


def test_special_token_ids_and_generation_settings_survive(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model({**LLAMA, "eos_token_id": [7, 9], "bos_token_id": 3, "pad_token_id": 5})
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.6, "do_sample": True}))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    run(ConvertConfig(load=source, save=tmp_path / "megatron", prove=False))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back", prove=False))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (written["eos_token_id"], written["bos_token_id"], written["pad_token_id"]) == ([7, 9], 3, 5)
    for name in ("generation_config.json", "chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()


def test_a_model_trained_in_fp8_is_exported_in_the_type_of_its_weights_and_this_is_said(
    write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model(dtype=torch.bfloat16)
    run(ConvertConfig(load=source, save=tmp_path / "trained", prove=False))
    place = tmp_path / "trained" / "iter_0000000" / "manifest.json"
    content = json.loads(place.read_text())
    settings = {"dtype": "bf16", "fp8": {"fp8": "hybrid", "fp8_recipe": "delayed"}}
    place.write_text(json.dumps({**content, "stage": "pretrain", "settings": settings}))
    manifest = run(ConvertConfig(load=tmp_path / "trained", save=tmp_path / "back", prove=False))
    said = "trained in FP8 (fp8=hybrid, fp8_recipe=delayed): its weights are stored in bf16, and exported in bf16"
    assert said in capsys.readouterr().out
    assert (manifest.facts["dtype"], manifest.facts["trained_in_fp8"]) == ("bf16", "fp8=hybrid, fp8_recipe=delayed")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()


def test_a_process_that_has_computed_already_gets_its_answer(write_model: WriteModel) -> None:
    """transformers' process is a fork of it, in which OpenMP waits for threads that only the first process has."""
    source = write_model({**LLAMA, "hidden_size": 256, "intermediate_size": 1024})
    code = (
        "import sys, torch; from pathlib import Path; from megatron_instruct.conversion import huggingface_side\n"
        "torch.randn(1500, 1500) @ torch.randn(1500, 1500)\n"
        "layers, logits = huggingface_side.outputs(Path(sys.argv[1]), Path(sys.argv[1]) / 'config.json', list(range(200)))\n"
        "print(len(layers), *logits.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True, timeout=240)
    assert done.stdout.split() == [str(LLAMA["num_hidden_layers"]), "200", str(LLAMA["vocab_size"])]
