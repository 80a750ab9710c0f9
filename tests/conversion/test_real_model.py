"""SmolLM2-135M both ways with its own tokenizer."""

import json
from pathlib import Path

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run


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
