"""Whatever cannot be converted is refused by name, and nothing that loads is left."""

import json
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tokenizers
import torch

from megatron_instruct.conversion import weights
from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.huggingface_source import Source
from megatron_instruct.conversion.run import main, run
from megatron_instruct.conversion.target import new_folder
from megatron_instruct.errors import ConfigError, InputError, MegatronInstructError
from tests.conversion.conftest import LLAMA, MISTRAL, MIXTRAL, QWEN2, WriteModel

Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], object]
NORM = "model.norm.weight"
UP, DOWN = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
BAD_MODELS: dict[str, tuple[Change, str]] = {
    "missing tensor": (lambda _, tensors: tensors.pop(UP), rf"lacks {UP}"),
    "missing output layer": (lambda _, tensors: tensors.pop("lm_head.weight"), r"lacks lm_head.weight.*tie_word_embeddings"),
    "extra tensor": (
        lambda _, tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}),
        r"holds model.layers.0.self_attn.q_proj.bias, which a llama model .* does not have; copy the model's folder again",
    ),
    "one layer too many": (lambda config, _: config.update(num_hidden_layers=1), r"holds model.layers.1.*and 5 more"),
    "wrong shape": (
        lambda config, _: config.update(intermediate_size=175),
        r"gate_proj.weight has the shape \[176, 64\], and config.json calls for \[175, 64\]; copy",
    ),
    "integers": (lambda _, tensors: tensors.update({DOWN: tensors[DOWN].to(torch.int8)}), rf"{DOWN} is stored as I8; supported: F32"),
    "mixed types": (lambda _, tensors: tensors.update({DOWN: tensors[DOWN].half()}), r"mixes weights of F16, F32; say which .* --dtype"),
    "not finite": (lambda _, tensors: tensors[DOWN][3].fill_(torch.nan), rf"{DOWN} holds values that are not finite"),
    "tied, and apart": (
        lambda config, _: config.update(tie_word_embeddings=True),
        r"tie_word_embeddings is true, and lm_head.weight differs from model.embed_tokens.weight",
    ),
    "tied, and of integers": (
        lambda config, tensors: (
            config.update(tie_word_embeddings=True),
            tensors.update({"lm_head.weight": tensors["lm_head.weight"].to(torch.int8)}),
        ),
        r"lm_head.weight is stored as I8; supported: F32",
    ),
    "unknown architecture": (
        lambda config, _: config.update(model_type="gpt2"),
        r"model_type='gpt2' is not supported; supported: llama, mistral, qwen2, qwen3, mixtral",
    ),
    "another head": (lambda config, _: config.update(architectures=["LlamaForSequenceClassification"]), r"only LlamaForCausalLM is"),
    "attention bias": (
        lambda config, _: config.update(attention_bias=True),
        r"attention_bias=True is not supported; only attention_bias=False",
    ),
    "mlp bias": (lambda config, _: config.update(mlp_bias=True), r"mlp_bias=True is not supported"),
    "activation": (lambda config, _: config.update(hidden_act="gelu"), r"hidden_act='gelu' is not supported; only hidden_act='silu'"),
    "dropout": (lambda config, _: config.update(attention_dropout=0.1), r"attention_dropout=0.1 is not supported"),
    "quantized": (
        lambda config, _: config.update(quantization_config={"quant_method": "gptq"}),
        r"quantization_config=.* is not supported",
    ),
    "code of its own": (lambda config, _: config.update(auto_map={"AutoModel": "x.py"}), r"auto_map=.* is not supported"),
    "rope kind": (
        lambda config, _: config.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}),
        r"rope_type='yarn' is not supported; supported: default, linear, llama3",
    ),
    "rope without a factor": (lambda config, _: config.update(rope_parameters={"rope_type": "linear"}), r"'linear' lacks 'factor'"),
    "no size": (lambda config, _: config.pop("hidden_size"), r"hidden_size=None must be a whole number"),
    "a list of values": (lambda config, _: config.update(model_type=["llama"]), r"model_type=\['llama'\] is not supported"),
    "no heads": (lambda config, _: config.update(num_attention_heads=0), r"num_attention_heads=0 must be at least 1"),
    "an epsilon in words": (lambda config, _: config.update(rms_norm_eps="small"), r"rms_norm_eps='small' must be a finite number"),
    "an epsilon of nothing": (lambda config, _: config.update(rms_norm_eps=float("nan")), r"rms_norm_eps=nan must be a finite number"),
    "a negative epsilon": (lambda config, _: config.update(rms_norm_eps=-1e-5), r"layernorm_epsilon=-1e-05 must be at least 0"),
    "tied in words": (lambda config, _: config.update(tie_word_embeddings="false"), r"tie_word_embeddings='false' must be true or false"),
    "layers in a number": (lambda config, _: config.update(layer_types=2), r"layer_types=2 must be a list"),
    "rope in a list": (
        lambda config, _: config.update(rope_parameters=[1e4]),
        r"rope_parameters=\[10000.0\] is not supported; only one mapping",
    ),
    "rope by kind of layer": (
        lambda config, _: config.update(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0}}),
        r"rope_parameters=\{'full_attention': .* is not supported; only one mapping for all layers is",
    ),
    "a base of nothing": (lambda config, _: config.update(rope_parameters={"rope_theta": 0}), r"rotary_base=0.0 must be above 0"),
    "half a head": (
        lambda config, _: config.update(rope_parameters={"partial_rotary_factor": 0}),
        r"partial_rotary_factor=0 is not supported",
    ),
    "factor in words": (
        lambda config, _: config.update(rope_parameters={**LLAMA3, "low_freq_factor": "1"}),
        r"low_freq_factor='1' must be a finite number",
    ),
    "smaller embedding than tokenizer": (
        lambda config, tensors: (
            config.update(vocab_size=200),
            tensors.update({name: tensors[name][:200].clone() for name in ("lm_head.weight", "model.embed_tokens.weight")}),
        ),
        r"has \d+ ids, and the embedding of .* has 200 rows",
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_model_that_cannot_be_converted_is_refused_by_name(name: str, write_model: WriteModel, tmp_path: Path) -> None:
    change, message = BAD_MODELS[name]
    with pytest.raises(InputError, match=message):
        run(ConvertConfig(load=write_model(change=change), save=tmp_path / "out", prove=False))
    assert not list(tmp_path.glob("out*"))


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "kinds of layers in another order": (
        {**QWEN2, "use_sliding_window": True, "sliding_window": 64, "layer_types": ["sliding_attention", "full_attention"]},
        r"layer_types=.* with sliding_window=64 is not supported; only full attention in the first layers",
    ),
    "a mistral without a window in one layer": (
        {**MISTRAL, "sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
        r"layer_types=.* of which a mistral has no first",
    ),
    "a window of nothing": ({**MISTRAL, "sliding_window": 0}, r"sliding_window=0 is not possible"),
    "a qwen2 with heads of another size": (
        {**QWEN2, "head_dim": 16},
        r"kv_channels=16 must be hidden_size / num_attention_heads = 64 / 8 in the family qwen2",
    ),
    "one expert a token": ({**MIXTRAL, "num_experts_per_tok": 1}, r"experts_per_token=1 must be 2 to num_experts=4"),
    "noise in the router": ({**MIXTRAL, "router_jitter_noise": 0.1}, r"router_jitter_noise=0.1 is not supported"),
    "scaling that shrinks": (
        {**LLAMA, "rope_parameters": {**LLAMA3, "factor": 0.5}},
        r"config.json: rope scaling llama3: factor=0.5 must be at least 1",
    ),
    "scaling with factors the wrong way round": (
        {**LLAMA, "rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}},
        r"low_freq_factor=4.0 must be positive and below high_freq_factor=4.0",
    ),
    "scaling of no length": (
        {**LLAMA, "rope_parameters": {**LLAMA3, "original_max_position_embeddings": 0}},
        r"original_max_position_embeddings=0 must be at least 1",
    ),
    "scaling without its length": (
        {**LLAMA, "rope_parameters": {name: value for name, value in LLAMA3.items() if not name.startswith("original")}},
        r"'llama3' lacks 'original_max_position_embeddings'",
    ),
    "odd heads": ({**LLAMA, "head_dim": 7}, r"kv_channels=7 must be even"),
    "heads that no group divides": ({**LLAMA, "num_key_value_heads": 3}, r"num_attention_heads=8 is not a multiple of num_query_groups=3"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_option_that_cannot_be_carried_is_refused_by_name(name: str, write_model: WriteModel, tmp_path: Path) -> None:
    config, message = UNSUPPORTED[name]
    with pytest.raises(InputError, match=message):
        run(ConvertConfig(load=write_model(config), save=tmp_path / "out", prove=False))
    assert not list(tmp_path.glob("out*"))


def cut_short(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index_names_an_absent_file(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}})
    )


def index_leads_outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": "../model.safetensors"}}))


def index_names_an_absent_tensor(folder: Path) -> None:
    names = {"model.norm.weight": "model.safetensors", "model.more.weight": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_beside_a_single_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {NORM: "model-00001-of-00001.safetensors"}}))


def tokenizer_config_in_a_list(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("[]")


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def tokenizer_with_code(folder: Path) -> None:
    content = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**content, "auto_map": {"AutoTokenizer": ["own.Own", None]}}))
    (folder / "own.py").write_text("raise SystemExit('code of the folder was run')")


BAD_FOLDERS: dict[Callable[[Path], None], str] = {
    cut_short: r"model.safetensors is damaged or cut short .* copy it again",
    pickled: r"holds its weights as pickles \(pytorch_model.bin\).*save_pretrained",
    index_names_an_absent_file: r"model-00002-of-00002.safetensors: named by model.safetensors.index.json, and there is no such file",
    index_leads_outside: r"named by model.safetensors.index.json, and there is no such file beside it",
    index_names_an_absent_tensor: r"says that model.safetensors holds model.more.weight, and it does not",
    index_beside_a_single_file: r"holds model.safetensors, which transformers reads, and model.safetensors.index.json, which names others",
    tokenizer_config_in_a_list: r"tokenizer_config.json holds no mapping; copy the tokenizer's files again",
    broken_config: r"config.json is not valid JSON",
    no_weights: r"has neither model.safetensors nor model.safetensors.index.json",
    tokenizer_with_code: r"tokenizer_config.json: auto_map=.*own.Own.* calls for code .* never run; remove auto_map",
    no_tokenizer: r"has neither tokenizer.json nor tokenizer.model",
}


@pytest.mark.parametrize("damage", BAD_FOLDERS)
def test_a_damaged_folder_is_refused_by_name(damage: Callable[[Path], None], write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model()
    damage(source)
    with pytest.raises(InputError, match=BAD_FOLDERS[damage]):
        run(ConvertConfig(load=source, save=tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("size", ["5XB", "0", "-5GB", "0GB", ""])
def test_a_size_of_shards_that_is_none_is_refused_before_anything_is_read(size: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"max_shard_size='{size}' must be a size above 0"):
        ConvertConfig(load=tmp_path, save=tmp_path / "out", max_shard_size=size)


def test_a_direction_that_the_source_does_not_have_is_refused(write_model: WriteModel, tmp_path: Path) -> None:
    source, out = write_model(), tmp_path / "out"
    with pytest.raises(ConfigError, match=r"to='huggingface', but .* holds config.json, which becomes 'megatron'"):
        run(ConvertConfig(load=source, save=out, to="huggingface"))
    with pytest.raises(ConfigError, match="iteration=3 goes with a Megatron source"):
        run(ConvertConfig(load=source, save=out, iteration=3))
    with pytest.raises(InputError, match=r"neither a Hugging Face folder .* nor a checkpoint folder"):
        run(ConvertConfig(load=tmp_path, save=out))
    (source / "latest_checkpointed_iteration.txt").write_text("0\n")
    with pytest.raises(ConfigError, match=r"holds both .* --to"):
        run(ConvertConfig(load=source, save=out))


def test_a_folder_that_holds_something_else_is_left_alone(write_model: WriteModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else already; give another --save"):
        run(ConvertConfig(load=write_model(), save=tmp_path / "out", prove=False))
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_folder_that_another_run_is_making_is_left_alone(write_model: WriteModel, tmp_path: Path) -> None:
    source, out = write_model(), tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "half").write_text("a half-made model")
        with pytest.raises(ConfigError, match=r"another run is writing to .*out\.lock; wait for it"):
            run(ConvertConfig(load=source, save=out, prove=False))
        assert (folder / "half").is_file()
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_too_little_disk_or_memory_is_said_before_anything_is_written(
    write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model()
    usage = type("usage", (), {"free": 1000})
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(ConfigError, match=r"0.00 GB free, and the result takes about"):
            run(ConvertConfig(load=source, save=tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: type("memory", (), {"available": 1000}))
        with pytest.raises(ConfigError, match=r"of memory .* 0.0 GB are free; free some"):
            run(ConvertConfig(load=source, save=tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))
    run(ConvertConfig(load=source, save=tmp_path / "megatron", prove=False))
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"0.00 GB free, and the result takes about .*; free room, or give another --save"):
        run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "out"))
    assert not list(tmp_path.glob("out*"))


def test_a_disk_that_fills_up_meanwhile_is_told_of_and_leaves_nothing(
    write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: the system refuses both in the same way."""
    source, out = write_model({**LLAMA, "num_hidden_layers": 8}), tmp_path / "out"
    run(ConvertConfig(load=source, save=tmp_path / "megatron", prove=False))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for load, file in ((source, "__0_0.distcp"), (tmp_path / "megatron", "model.safetensors")):
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
        try:
            status = main(["--load", str(load), "--save", str(out), "--no-prove"])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert status == 1
        said = capsys.readouterr().err
        assert "File too large" in said and file in said, said
        assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("mistake", ["gate and up exchanged", "query heads in another order"])
def test_a_wrong_mapping_fails_the_proof_and_leaves_nothing(
    mistake: str, write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both mistakes come back bit for bit, since the way back makes them too: only logits can tell."""
    source = write_model()
    if mistake == "gate and up exchanged":
        table = [
            weights.Rule(rule.kind, rule.megatron, rule.huggingface[::-1], rule.shapes) if rule.kind == "stack" else rule
            for rule in weights.TABLES["llama"]
        ]
        monkeypatch.setitem(weights.TABLES, "llama", tuple(table))
    else:
        monkeypatch.setattr(
            "megatron_instruct.conversion.to_megatron.join",
            lambda weight, parts, architecture, rows: weights.join(
                weight, [parts[0].flip(0), *parts[1:]] if weight.kind == "qkv" else parts, architecture, rows=rows
            ),
        )
    with pytest.raises(InputError, match="the proof failed"):
        run(ConvertConfig(load=source, save=tmp_path / "out"))
    assert "FAIL  logits" in capsys.readouterr().out
    assert not list(tmp_path.glob("out*"))


def test_without_a_proof_the_manifest_says_so(write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = run(ConvertConfig(load=write_model(), save=tmp_path / "out", prove=False))
    assert manifest.facts["proof"] == {"proved": False, "reason": "--no-prove"}
    assert "NOT proved" in capsys.readouterr().out


@pytest.fixture
def checkpoint(write_model: WriteModel, tmp_path: Path) -> Path:
    run(ConvertConfig(load=write_model(), save=tmp_path / "checkpoint", prove=False))
    return tmp_path / "checkpoint"


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(checkpoint: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    def refused(message: str, error: type[MegatronInstructError] = InputError, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            run(ConvertConfig(load=checkpoint, save=tmp_path / "out", **settings))
        assert not list(tmp_path.glob("out*"))

    refused("iter_0000007", iteration=7)
    other = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "tokenizer_config.json").write_text('{"eos_token": "a"}')
    other.save(str(tmp_path / "other" / "tokenizer.json"))
    refused("is another tokenizer than the one that .* was trained with", tokenizer=tmp_path / "other")
    manifest = checkpoint / "iter_0000000" / "manifest.json"
    content = json.loads(manifest.read_text())
    architecture = content["facts"]["architecture"]
    for change, message in (
        ({"num_layers": 3}, "has the shape|lacks"),
        ({"hidden_size": 128}, "has the shape .* and its manifest says"),
        ({"tie_embeddings": True}, "holds output_layer.weight"),
        ({"ffn_hidden_size": 100}, "has the shape|cannot be read"),
    ):
        manifest.write_text(json.dumps({**content, "facts": {**content["facts"], "architecture": {**architecture, **change}}}))
        refused(message)
    manifest.write_text(json.dumps(content))
    weights_file = next((checkpoint / "iter_0000000").glob("*.distcp"))
    weights_file.write_bytes(weights_file.read_bytes()[:-10])
    refused(r"bytes where its manifest says")


def test_weights_that_are_stored_as_fp8_are_refused(write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Source.tensor
    with monkeypatch.context() as patch:
        patch.setattr(Source, "tensor", lambda self, name: read(self, name).to(torch.float8_e4m3fn) if name == NORM else read(self, name))
        run(ConvertConfig(load=write_model(), save=tmp_path / "megatron", prove=False))
    with pytest.raises(InputError, match=r"decoder.final_layernorm.weight is stored as float8_e4m3fn; supported: fp32, bf16, fp16"):
        run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "out", prove=False))
    assert not list(tmp_path.glob("out*"))


def test_weights_too_large_for_fp16_are_refused(write_model: WriteModel, tmp_path: Path) -> None:
    source = write_model(change=lambda _, tensors: tensors[DOWN][0].fill_(1e6))
    with pytest.raises(InputError, match=rf"{DOWN} has values up to 1e\+06, too large for fp16; use --dtype bf16 or fp32"):
        run(ConvertConfig(load=source, save=tmp_path / "out", dtype="fp16", prove=False))


def test_the_tool_answers_with_a_status_and_one_message(
    write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_model({**LLAMA, "model_type": "gpt2"})
    assert main(["--load", str(source), "--save", str(tmp_path / "out")]) == 3
    assert "model_type='gpt2'" in capsys.readouterr().err
    assert main(["--load", str(source), "--save", str(tmp_path / "out"), "--prove-text", "x", "--no-prove"]) == 2


def test_a_killed_conversion_leaves_nothing_that_loads_and_runs_again(
    write_model: WriteModel, tmp_path: Path, start: Callable[..., Any]
) -> None:
    source, target, partial = write_model(), tmp_path / "out", tmp_path / "out.partial"
    process = start("convert_checkpoint.py", "--load", source, "--save", target)
    while not (partial / "iter_0000000" / "metadata.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not target.exists()
    assert not (partial / "latest_checkpointed_iteration.txt").exists(), "what names a whole checkpoint comes last"
    with pytest.raises(InputError, match="neither a Hugging Face folder"):
        run(ConvertConfig(load=partial, save=tmp_path / "back"))
    run(ConvertConfig(load=source, save=target))
    assert not partial.exists()
    run(ConvertConfig(load=target, save=tmp_path / "back", prove=False))
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert safetensors.torch.load_file(source / "model.safetensors").keys()
