"""From a real corpus to a trained model under TP2 x PP2, with the tools as a user starts them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import PRETRAIN, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_model_learns_a_real_corpus_under_tensor_and_pipeline_parallelism(
    tmp_path: Path, data: Path, tokenizer_folder: Path, torchrun_session: Callable[..., object]
) -> None:
    save = tmp_path / "save"
    words = [
        *("--preset", "tiny", "--data-path", data, "--tokenizer-model", tokenizer_folder, "--split", "90,10,0"),
        *("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2, "--seq-length", 64, "--global-batch-size", 8),
        *("--micro-batch-size", 2, "--train-iters", 60, "--lr", "5e-3", "--lr-warmup-iters", 5, "--eval-interval", 60, "--eval-iters", 4),
        *("--log-interval", 5, "--save", save, "--tensorboard-dir", tmp_path / "events"),
    ]
    result = torchrun_session(4, PRETRAIN, *words)
    assert result.returncode == 0, result.stderr  # type: ignore[attr-defined]
    output: str = result.stdout  # type: ignore[attr-defined]
    assert output.count("4 x cpu: tensor 2, context 1, pipeline 2, data 1") == 1
    assert output.count("iteration 60/60") == 1

    found = read_metrics(save)
    assert [row[0] for row in found.training] == list(range(5, 61, 5))
    assert found.training[-1][1] < found.training[0][1] - 1.0
    (_, before), (_, after) = found.validation
    assert after < before - 1.0
    assert list((tmp_path / "events").glob("events.out.tfevents.*"))

    manifest = json.loads((save / "iter_0000060" / "manifest.json").read_text())
    assert manifest["facts"]["iteration"] == 60
    assert (save / "tokenizer" / "tokenizer.json").read_bytes() == (tokenizer_folder / "tokenizer.json").read_bytes()
    assert (save / "manifest.json").is_file()
