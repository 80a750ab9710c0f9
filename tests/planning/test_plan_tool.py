"""tools/plan.py as a user starts it: a short table, files that pretrain.py takes, and messages that say what to do."""

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.planning.run import main

ROOT = Path(__file__).resolve().parents[2]
SEVENTY = ("--preset", "70B", "--gpu", "h100", "--num-gpus", "64", "--global-batch-size", "128")


def plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A plan's folder, about the third layout of its table, and what was printed."""
    folder = tmp_path_factory.mktemp("plan") / "a plan"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main([*SEVENTY, "--write", str(folder), "--choose", "3"]) == 0
    return folder, printed.getvalue()


def test_a_user_sees_the_best_layout_in_a_sentence_and_then_ten(written: tuple[Path, str]) -> None:
    lines = written[1].splitlines()
    assert lines[0] == "Best for 70.6 billion parameters on 64 x h100, bf16, 128 x 4,096 tokens a step:"
    assert re.match(r"TP \d .*micro batch \d.* s a step, [\d,]+ tokens/s/GPU, MFU \d+%, \d+ of 80 GiB; 100.0 billion tokens in", lines[1])
    rows = [line for line in lines if re.match(r" ?\d+ ", line)]
    assert 5 < len(rows) <= 10
    assert len(lines) < 25
    assert max(map(len, lines[2:18])) < 170


def test_json_holds_the_parts_that_make_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    cluster = ("--gpu", "h100", "--num-gpus", 16, "--global-batch-size", 64)
    _, out, _ = plan(capsys, "--preset", "13B", *cluster, "--precision", "fp8", "--json", "--top", 3, "--train-tokens", 2e12)
    content = json.loads(out)
    assert (content["gpu"], content["num_gpus"], content["train_tokens"], len(content["layouts"])) == ("h100", 16, 2e12, 3)
    for layout in content["layouts"]:
        for group in ("memory_bytes", "seconds"):
            total = layout[group].pop("total")
            assert sum(layout[group].values()) == pytest.approx(total, rel=1e-6)
        assert layout["memory_bytes"]["fp8_copies"] > 0
        assert layout["tensor"] * layout["context"] * layout["pipeline"] * layout["data"] == 16


def dry_run(start: Callable[..., Any], folder: Path) -> str:
    data = ("--train-data-path", "no", "--save", folder / "s")
    process = start("pretrain.py", "--config", folder / "pretrain.yaml", "--dry-run", *data)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return str(shown)


def test_pretrain_takes_the_settings_and_prints_the_same_estimate(written: tuple[Path, str], start: Callable[..., Any]) -> None:
    folder, _ = written
    assert sorted(path.name for path in folder.iterdir()) == ["plan.json", "plan.png", "pretrain.yaml", "run.sh"]
    assert (folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    shown = dry_run(start, folder)
    planned = json.loads((folder / "plan.json").read_text())["layouts"][2]
    assert f"Memory of the fullest GPU, GiB: {planned['memory_bytes']['total'] / 2**30:.1f} = " in shown
    assert f": {planned['seconds']['total']:,.2f} s a step, {planned['tokens_per_second_per_gpu']:,.0f} tokens/s/GPU" in shown
    assert f"tensor {planned['tensor']} x context {planned['context']} x pipeline {planned['pipeline']} x data {planned['data']}" in shown


@pytest.mark.slow
@pytest.mark.parametrize("rank", range(1, 6))
@pytest.mark.parametrize(
    "flags",
    [
        ("--preset", "8B", "--gpu", "b200", "--num-gpus", 16, "--global-batch-size", 32, "--precision", "fp8", "--fp8-recipe", "mxfp8"),
        ("--preset", "8x7B", "--gpu", "h200", "--num-gpus", 64, "--global-batch-size", 64),
        ("--preset", "13B", "--gpu", "a100-80", "--num-gpus", 24, "--global-batch-size", 96),
        ("--preset", "500M", "--gpu", "l40s", "--num-gpus", 3, "--global-batch-size", 33, "--seq-length", 2048),
    ],
)
def test_so_it_does_for_other_models_and_machines(
    flags: tuple[object, ...], rank: int, capsys: pytest.CaptureFixture[str], tmp_path: Path, start: Callable[..., Any]
) -> None:
    status, _, errors = plan(capsys, *flags, "--write", tmp_path / "plan", "--choose", rank)
    if status == 2 and "the table has" in errors:
        pytest.skip("fewer layouts fit")
    assert status == 0, errors
    planned = json.loads((tmp_path / "plan" / "plan.json").read_text())["layouts"][rank - 1]
    assert f"{planned['seconds']['total']:,.2f} s a step" in dry_run(start, tmp_path / "plan")


def test_the_script_starts_torchrun_with_the_settings(written: tuple[Path, str], tmp_path: Path) -> None:
    """A torchrun in its place says what it was given."""
    folder, _ = written
    (tmp_path / "torchrun").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "HEAD_NODE": "first", "DATA": "my/data"}
    done = subprocess.run(
        ["bash", str(folder / "run.sh"), "--seed", "7"], capture_output=True, text=True, env=environment, check=True, cwd=ROOT
    )
    words = done.stdout.splitlines()
    given = {"--nnodes": "8", "--nproc-per-node": "8", "--rdzv-endpoint": "first:29500", "--train-data-path": "my/data"}
    assert {flag: words[words.index(flag) + 1] for flag in given} == given
    assert words[words.index("--config") + 1] == str(folder / "pretrain.yaml")
    assert words[-2:] == ["--seed", "7"]


def test_the_chosen_row_of_the_table_is_written(written: tuple[Path, str]) -> None:
    folder, _ = written
    chosen = json.loads((folder / "plan.json").read_text())["layouts"][2]
    settings = (folder / "pretrain.yaml").read_text()
    assert f"tensor_model_parallel_size: {chosen['tensor']}\n" in settings
    assert f"pipeline_model_parallel_size: {chosen['pipeline']}\n" in settings


def test_a_hugging_face_folder_is_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path, start: Callable[..., Any]) -> None:
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
        "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000,
        "max_position_embeddings": 2048, "rope_theta": 10000.0, "rms_norm_eps": 1e-05, "tie_word_embeddings": False,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    cluster = ("--gpu", "a100-40", "--num-gpus", 4, "--global-batch-size", 64, "--seq-length", 2048)
    status, out, errors = plan(capsys, "--hf-folder", tmp_path, *cluster, "--write", tmp_path / "plan")
    assert status == 0, errors
    assert out.startswith("Best for 1.1 billion parameters on 4 x a100-40")
    assert "Model: 1.100 billion parameters" in dry_run(start, tmp_path / "plan")


BASE = {"--preset": "8B", "--gpu": "h100", "--num-gpus": "8", "--global-batch-size": "32"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--gpu": "h10"}, "gpu='h10' is unknown; did you mean 'h100'?"),
        ({"--gpu": "tpu-v5"}, "known: a100-40, a100-80, b200, gb200, gb300, h100, h200, l40s"),
        (
            {"--num-gpus": "7", "--preset": "tiny", "--seq-length": "2048"},
            "Usable near it: 4 or 8; or change global_batch_size.",
        ),
        ({"--num-gpus": "12"}, "num_gpus=12 is not a multiple of the 8 GPUs of a machine; take 8 or 16, or set gpus_per_node."),
        ({"--num-gpus": "0"}, "num_gpus=0 must be above 0"),
        ({"--preset": "9B"}, "preset='9B' is unknown"),
        ({"--gpu": "a100-80", "--precision": "fp8"}, "a100-80 has no fp8 units; take precision=bf16, or a kind that has: b200"),
        ({"--precision": "fp8", "--fp8-recipe": "mxfp8"}, "fp8_recipe=mxfp8 needs a Blackwell GPU, and h100 is none"),
        ({"--seq-length": "16384"}, "seq_length=16384 is longer than the model's max_position_embeddings=8192"),
        ({"--choose": "11"}, "choose=11 must be one of the top=10 layouts"),
        ({"--gpu": "l40s", "--precision": "fp8", "--fp8-recipe": "blockwise"}, "needs a Hopper or Blackwell GPU, and l40s is none"),
        ({"--hf-folder": "no/where"}, "two models; give one of them"),
        ({"--preset": None, "--hf-folder": "no/where", "--num-layers": "4"}, "num_layers=4 does not go with hf_folder=no/where"),
    ],
)
def test_what_cannot_be_planned_says_what_to_do(changes: dict[str, str | None], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for pair in {**BASE, **changes}.items() if pair[1] is not None for word in pair]
    status, out, errors = plan(capsys, *words)
    assert (status, out) == (2, "")
    assert message in errors


def test_a_model_that_fits_nowhere_is_told_with_the_closest_layout(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, errors = plan(capsys, "--preset", "70B", "--gpu", "l40s", "--num-gpus", 8, "--global-batch-size", 64)
    assert status == 2
    assert "no layout of 70.6 billion parameters fits 8 x l40s" in errors
    assert re.search(r"The closest, TP 8 x .*full recomputation.*, misses [\d.]+ GiB a GPU\.", errors)
    enough = int(re.search(r"on (\d+) GPUs it fits", errors)[1])  # type: ignore[index]
    status, _, _ = plan(capsys, "--preset", "70B", "--gpu", "l40s", "--num-gpus", enough, "--global-batch-size", 64)
    assert status == 0


def test_a_plan_is_not_written_over_another(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = [word for pair in BASE.items() for word in pair]
    (tmp_path / "plan").mkdir()
    status, _, errors = plan(capsys, *words, "--write", tmp_path / "plan")
    assert status == 3
    assert "exists already" in errors


def test_planning_needs_no_torch() -> None:
    code = "import sys; import megatron_instruct.planning.run; assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
