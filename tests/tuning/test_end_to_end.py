"""Task data -> a tuned synthesizer in a Hugging Face folder, by the commands of examples/tune_synthesizer_7b.sh, on a tiny model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tuning.conftest import lines, row, write_rows

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
preset: tiny
seq_length: 256
micro_batch_size: 2
global_batch_size: 4
train_iters: 1
lr: 5.0e-3
lr_warmup_iters: 2
role_weights: {instruction: 1, response: 1, end_of_document: 1}
log_interval: 1
"""


@pytest.mark.slow
def test_the_script_tunes_a_model_on_the_pairs_of_two_data_sets(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=400,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    for file in synthesizer_tokenizer.iterdir():
        (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    write_rows(tmp_path / "rows" / "bugs.jsonl", [row(number, "bugs") for number in range(60)])
    write_rows(tmp_path / "rows" / "more.jsonl", [row(number, "more") for number in range(60, 90)])
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "MODEL": str(tmp_path / "base"),
        "DATA": str(tmp_path / "rows"),
        "OUT": str(tmp_path / "out"),
        "RECIPE": str(tmp_path / "recipe.yaml"),
        "EPOCHS": "6",
        "LAUNCH": "--standalone --nproc-per-node 1",
        "OMP_NUM_THREADS": "1",
    }
    script = ["bash", str(ROOT / "examples" / "tune_synthesizer_7b.sh")]
    result = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    losses = [line["loss"] for line in lines(tmp_path / "out" / "trained" / "metrics.jsonl") if "loss" in line]
    assert len(losses) >= 40
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    tuned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "synthesizer")
    assert tuned.num_parameters() == transformers.LlamaForCausalLM(config).num_parameters()
    again = subprocess.run(script, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode == 0, "run again, it finds all of it done"
