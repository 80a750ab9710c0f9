"""benchmarks/gpu.py without a GPU: what it plans, what it refuses, and its whole path with the tiny preset on CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .test_gpu import GPUS

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu.py"


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARK), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    import gpu

    return gpu


@pytest.mark.skipif(GPUS > 0, reason="a GPU is here")
def test_without_a_gpu_one_line_says_so(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark.main([]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert "there is no GPU here" in said.err


def test_it_plans_what_fits_and_says_what_does_not(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--seq-length", "2048", "--global-batch-size", "8", "--num-gpus", "1", "--plan")
    assert benchmark.main(["--gpu", "h100", "--presets", "500M,70B", *small]) == 0
    left_out, planned = [], []
    for line in capsys.readouterr().out.splitlines():
        (left_out if line.startswith("left out") else planned).append(line)
    assert [line.split(":")[1].strip() for line in left_out] == ["70B bf16", "70B fp8"]
    assert all("GiB a GPU are missing on 1 x h100" in line for line in left_out)
    bf16, fp8 = (line.split() for line in planned)
    assert "--bf16" in bf16 and "--fp8-recipe" not in bf16
    assert fp8[fp8.index("--fp8-recipe") + 1] == "tensorwise"
    assert "--fp8-emulation" not in fp8
    assert bf16[bf16.index("--nproc-per-node") + 1] == "1"
    assert benchmark.main(["--gpu", "a100-80", "--presets", "500M", *small]) == 0
    assert "500M fp8: a100-80 has no fp8 units" in capsys.readouterr().out


def test_the_planned_command_is_one_that_pretrain_takes(benchmark: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from megatron_instruct.config import parse
    from megatron_instruct.training.config import PretrainConfig
    from megatron_instruct.training.plan import plan_layout
    from megatron_instruct.training.start import architecture_from

    assert benchmark.main(["--gpu", "h100", "--presets", "13B", "--num-gpus", "8", "--global-batch-size", "16", "--plan"]) == 0
    for line in capsys.readouterr().out.splitlines():
        words = line.split()
        config = parse(PretrainConfig, words[words.index("--preset") :], prog="pretrain.py")
        assert config is not None
        architecture = architecture_from(config.model, vocab_size=32000, seq_length=config.batch.seq_length)
        assert plan_layout(config.parallel, architecture, processes=8).world_size == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--num-gpus", "0"), "--num-gpus must be at least 1"),
        (("--precisions", "bf16,int4"), "--precisions: int4 is neither bf16 nor fp8"),
        (("--fp8-recipe", "often"), "invalid choice: 'often'"),
    ],
)
def test_impossible_words_are_refused(
    words: tuple[str, ...], message: str, benchmark: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        benchmark.main([*words])
    assert message in capsys.readouterr().err


def test_the_rates_of_a_run_are_read_after_its_warm_up(benchmark: ModuleType, tmp_path: Path) -> None:
    rows = [{"iteration": i, "loss": 1.0, "tokens_per_second": 100.0 * i} for i in range(1, 8)]
    rows.insert(3, {"iteration": 3, "validation_loss": 2.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert benchmark.read_rates(tmp_path / "metrics.jsonl") == [500.0, 600.0, 700.0]
    result = {"preset": "8B", "precision": "fp8", "tokens_per_second_per_gpu": 6906.0, "mfu": 0.2, "mfu_of_bf16_peak": 0.4, "layout": "TP1"}
    told = "\n".join(benchmark.lines(result, 8))
    assert "13,812 Megatron-LM" in told and "ratio 0.50" in told
    assert "ratio" not in "\n".join(benchmark.lines(result, 1))


@pytest.mark.slow
def test_the_whole_path_runs_on_cpu() -> None:
    words = ("--presets", "tiny", "--precisions", "bf16,fp8", "--num-gpus", 2, "--seq-length", 64, "--global-batch-size", 4, "--steps", 2)
    result = run("--rehearse", *words)
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["machine"] == "rehearsal on CPU"
    assert [(row["preset"], row["precision"]) for row in found["results"]] == [("tiny", "bf16"), ("tiny", "fp8")]
    assert all(row["tokens_per_second_per_gpu"] > 0 and 0 < row["mfu"] < 1 for row in found["results"])
