"""What a user can get wrong: one clear message with the remedy, a non-zero exit, nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.errors import ConfigError, InputError, MegatronInstructError

from .conftest import PRETRAIN, preprocess

pytestmark = pytest.mark.filterwarnings("ignore")
Flags = Callable[..., list[str]]
FSDP = "--use-megatron-fsdp"


def start(words: list[str]) -> None:
    """Do in this process what every process of a run does before it meets the others."""
    from megatron_instruct.config import parse
    from megatron_instruct.training.config import PretrainConfig
    from megatron_instruct.training.run import run

    config = parse(PretrainConfig, words, prog="pretrain.py")
    assert config is not None
    run(config)


@pytest.mark.parametrize(
    ("more", "processes", "message"),
    [
        (["--tensor-model-parallel-size", 3], 3, r"num_attention_heads=8 is not a multiple of tensor_model_parallel_size=3.*1, 2, 4"),
        (["--pipeline-model-parallel-size", 3], 3, r"num_layers=4 is not a multiple of the 3 pipeline stages"),
        (["--tensor-model-parallel-size", 2], 1, r"world_size=1 is not a multiple.*--nproc-per-node 2"),
        (
            ["--global-batch-size", 7],
            1,
            r"global_batch_size=7 is not a multiple of micro_batch_size \* data_parallel_size = 2 \* 1 = 2; use 8",
        ),
        (["--micro-batch-size", 3], 2, r"= 3 \* 2 = 6; use 6 or change"),
        (["--num-layers-per-virtual-pipeline-stage", 2, "--pipeline-model-parallel-size", 2], 2, r"at least twofold"),
        (
            ["--num-layers-per-virtual-pipeline-stage", 1, "--pipeline-model-parallel-size", 2, "--micro-batch-size", 8],
            2,
            r"number of microbatches \(1\)",
        ),
        (["--sequence-parallel"], 1, r"sequence_parallel=True needs tensor_model_parallel_size"),
        (["--sequence-parallel", "--tensor-model-parallel-size", 2, "--seq-length", 33], 2, r"seq_length=33 is not a multiple"),
        (["--seq-length", 4096], 1, r"seq_length=4096 is longer than the model's max_position_embeddings=2048"),
        (["--preset", "tiny-experts", "--expert-model-parallel-size", 3], 3, r"num_experts=4 is not a multiple of .*=3.*1, 2, 4"),
        (["--expert-model-parallel-size", 2], 2, r"the family llama has no experts; drop them"),
        (
            ["--preset", "tiny-experts", "--expert-model-parallel-size", 4],
            2,
            r"world_size=2 is not a multiple of expert_model_parallel_size",
        ),
        (["--context-parallel-size", 2, "--seq-length", 34], 2, r"seq_length=34 is not a multiple of 2 \* context_parallel_size = 4"),
        (
            ["--context-parallel-size", 2, "--reset-attention-mask"],
            2,
            r"reset_attention_mask=True does not go with context_parallel_size=2",
        ),
        (["--decoder-last-pipeline-num-layers", 4, "--pipeline-model-parallel-size", 2], 2, r"needs 2 or more stages, at least one layer"),
        (["--rampup-batch-size", 2, 4, 16], 1, r"does not reach global_batch_size=8"),
        (["--rampup-batch-size", 2, 2, 16], 2, r"has steps of 2 sequences, not a multiple of .* = 2 \* 2 = 4"),
        (["--recompute-num-layers", 1], 1, r"goes with recompute_granularity=full"),
        (
            ["--recompute-granularity", "full", "--recompute-num-layers", 3, "--pipeline-model-parallel-size", 2],
            2,
            r"more than the 2 layers",
        ),
        (["--moe-aux-loss-coeff", -1], 1, r"moe_aux_loss_coeff=-1.0 must be a number that is not negative"),
        (["--overlap-param-gather"], 1, r"needs use_distributed_optimizer=True"),
        (["--optimizer", "muon", "--use-distributed-optimizer"], 2, r"optimizer=muon does not go with use_distributed_optimizer=True"),
        (["--optimizer", "muon", "--fp16"], 1, r"optimizer=muon does not go with fp16=True.*use bf16"),
        (["--data-parallel-sharding-strategy", "optim"], 2, r"data_parallel_sharding_strategy=optim goes with use_megatron_fsdp=True"),
        ([FSDP, "--pipeline-model-parallel-size", 2], 2, r"does not go with pipeline_model_parallel_size=2.*use_distributed_optimizer"),
        ([FSDP, "--optimizer", "muon"], 2, r"use_megatron_fsdp=True does not go with optimizer=muon.*use adam"),
        ([FSDP, "--fp16"], 2, r"use_megatron_fsdp=True does not go with fp16=True.*use bf16"),
        ([FSDP, "--fp8-format", "hybrid", "--fp8-emulation"], 2, r"use_megatron_fsdp=True does not go with fp8_emulation=True"),
        ([FSDP, "--preset", "tiny-experts"], 2, r"use_megatron_fsdp=True does not go with the experts of the family mixtral"),
        (["--sliding-window", 16], 1, r"sliding_window=16 is not possible in the family llama.*mistral, qwen2"),
        (["--transformer-config", "hidden_dropout", "lots"], 1, r"hidden_dropout='lots' must be a number"),
        (["--transformer-config", "num_moe_experts", 3], 1, r"'num_moe_experts' is decided by the model and layout settings"),
        (
            [FSDP, "--transformer-config", "gradient_accumulation_fusion", "true"],
            2,
            r"gradient_accumulation_fusion=True goes with use_megatron_fsdp=True on GPUs alone",
        ),
        (
            ["--transformer-config", "defer_embedding_wgrad_compute", "true", "--pipeline-model-parallel-size", 2],
            2,
            r"does not take these settings: .*gradient accumulation fusion",
        ),
        (
            [
                *("--preset", "tiny-experts", "--tensor-model-parallel-size", 2, "--sequence-parallel"),
                *("--transformer-config", "moe_expert_capacity_factor", "0.6"),
            ],
            2,
            r"moe_expert_capacity_factor=0.6 with expert_tensor_parallel_size=2 does not run on CPUs",
        ),
        (["--reset-position-ids"], 1, r"reset_position_ids=True changes nothing without reset_attention_mask=True"),
        (["--moe-z-loss-coeff", 0.1], 1, r"moe_z_loss_coeff: the family llama has no experts"),
        (["--min-lr", 1], 1, r"0 <= min_lr <= lr"),
        (["--lr-warmup-iters", 20], 1, r"lr_warmup_iters=20 must be below"),
        (["--preset", "1.3b"], 1, r"preset='1.3b' is unknown; did you mean '1\.3B'"),
        (["--split", "1,2"], 1, r"split='1,2' must be three shares"),
        (["--group-query-attention"], 1, r"needs num_query_groups"),
        (["--eval-interval", 0], 1, r"eval_interval=0 must be at least 1"),
    ],
)
def test_a_setting_that_breaks_a_rule(
    more: list[object], processes: int, message: str, flags: Flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(ConfigError, match=message):
        start(flags(tmp_path / "save", *more))
    assert not (tmp_path / "save").exists()


def test_gathering_beside_one_connection_to_the_gpu_is_refused() -> None:
    from megatron_instruct.training.machine_checks import check_connections
    from megatron_instruct.training.settings.parallel import ParallelOptions

    options = ParallelOptions(use_megatron_fsdp=True)
    with pytest.raises(ConfigError, match=r"does not go with CUDA_DEVICE_MAX_CONNECTIONS=1; unset it"):
        check_connections(options, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, is_cuda=True)
    check_connections(options, {"CUDA_DEVICE_MAX_CONNECTIONS": "8"}, is_cuda=True)
    check_connections(ParallelOptions(), {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}, is_cuda=True)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"tensor_model_parallel_size": 2}, "1"),
        ({"context_parallel_size": 2}, "1"),
        ({"tensor_model_parallel_size": 2, "use_megatron_fsdp": True}, None),
        ({}, None),
    ],
)
def test_kernels_keep_their_order_where_ranks_communicate_while_they_compute(settings: dict[str, Any], wanted: str | None) -> None:
    from megatron_instruct.training.run import keep_order_of_kernels
    from megatron_instruct.training.settings.parallel import ParallelOptions

    environment: dict[str, str] = {}
    keep_order_of_kernels(ParallelOptions(**settings), environment)
    assert environment.get("CUDA_DEVICE_MAX_CONNECTIONS") == wanted
    chosen = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
    keep_order_of_kernels(ParallelOptions(**settings), chosen)
    assert chosen == {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}, "the user's own value stays"


def test_data_that_is_missing(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.bin is missing; give the prefix"):
        start(flags(tmp_path / "save", "--data-path", tmp_path / "nowhere"))


def test_unfinished_data_without_a_manifest_is_refused(flags: Flags, data: Path, tmp_path: Path) -> None:
    for suffix in (".bin", ".idx"):
        shutil.copyfile(f"{data}{suffix}", tmp_path / f"copy{suffix}")
    with pytest.raises(InputError, match=r"has no manifest.*unfinished.*--adopt-data"):
        start(flags(tmp_path / "save", "--data-path", tmp_path / "copy"))


def test_data_cut_short_is_refused(flags: Flags, data: Path, tmp_path: Path) -> None:
    for file in data.parent.glob(f"{data.name}*"):
        shutil.copyfile(file, tmp_path / file.name)
    with open(tmp_path / f"{data.name}.bin", "r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(InputError, match=r"\.bin has 1000 bytes where its manifest says"):
        start(flags(tmp_path / "save", "--data-path", tmp_path / data.name))


def test_data_of_another_tokenizer_is_refused(flags: Flags, tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"was made with the tokenizer .* preprocess the data with the model's tokenizer"):
        start(flags(tmp_path / "save", "--tokenizer-model", tmp_path / "other"))


def test_training_from_scratch_asks_for_a_tokenizer(data: Path, tmp_path: Path) -> None:
    batch = ["--train-iters", "1", "--global-batch-size", "1", "--lr", "1"]
    with pytest.raises(ConfigError, match="tokenizer_model is needed"):
        start(["--preset", "tiny", "--data-path", str(data), *batch, "--save", str(tmp_path / "save")])


def test_a_folder_that_holds_no_checkpoint_is_refused(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no checkpoint"):
        start(flags(tmp_path / "save", "--load", tmp_path))


@pytest.fixture
def stopped(one: dict[str, Path], tmp_path: Path) -> Path:
    """A run stopped after its tenth step."""
    folder = tmp_path / "stopped"
    shutil.copytree(one["reference"], folder)
    (folder / "manifest.json").unlink()
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")
    return folder


def test_going_on_with_changed_data_is_refused(flags: Flags, stopped: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"other text {number} " * 50}) + "\n" for number in range(40)))
    other = preprocess(tmp_path / "corpus.jsonl", tmp_path / "other", tokenizer_folder)
    with pytest.raises(ConfigError, match=r"belongs to a run with data="):
        start(flags(stopped, "--data-path", other))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--global-batch-size", 4], "belongs to a run with global_batch_size=8, and this one has global_batch_size=4"),
        (["--seed", 5], "belongs to a run with seed=1234"),
        (["--bf16"], "dtype='fp32', and this one has dtype='bf16'"),
        (["--num-layers", 2], "num_layers asks for num_layers=2, and the model in .* has 4"),
        (["--preset", "31M"], "preset=31M asks for num_layers=8, and the model in .* has 4; drop preset"),
    ],
)
def test_going_on_with_other_settings_is_refused(more: list[object], message: str, flags: Flags, stopped: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        start(flags(stopped, *more))


@pytest.mark.parametrize("part", ["manifest.json", "__0_0.distcp"])
def test_a_checkpoint_with_a_missing_file_is_refused(part: str, flags: Flags, stopped: Path) -> None:
    (stopped / "iter_0000010" / part).unlink()
    with pytest.raises(MegatronInstructError, match=part.replace(".", r"\.")):
        start(flags(stopped))


def test_a_wrong_layout_is_told_once_and_ends_every_process(flags: Flags, tmp_path: Path, torchrun_session: Callable[..., object]) -> None:
    result = torchrun_session(2, PRETRAIN, *flags(tmp_path / "save", "--tensor-model-parallel-size", 2, "--num-attention-heads", 3))
    assert isinstance(result, subprocess.CompletedProcess)
    assert result.returncode != 0
    assert result.stderr.count("pretrain.py: error:") == 1
    assert "num_attention_heads=3" in result.stderr
    assert not (tmp_path / "save").exists()


def test_a_loss_that_is_not_finite_ends_the_run(flags: Flags, tmp_path: Path, torchrun_session: Callable[..., object]) -> None:
    result = torchrun_session(1, PRETRAIN, *flags(tmp_path / "save", "--lr", "1e38", "--lr-warmup-iters", 0, "--clip-grad", 0))
    assert isinstance(result, subprocess.CompletedProcess)
    assert result.returncode == 6, result.stderr
    assert "lower lr or raise lr_warmup_iters. The last checkpoint is untouched." in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "save").glob("iter_*"))


def test_a_full_disk_at_save_leaves_no_checkpoint_that_a_later_run_would_take(flags: Flags, tmp_path: Path) -> None:
    """`ulimit -f` makes writes fail past a file size, as a full disk does in the middle of a file."""
    command = [sys.executable, str(PRETRAIN), *flags(tmp_path / "save", "--save-interval", 2)]
    result = subprocess.run(["bash", "-c", 'ulimit -f 1000; exec "$@"', "-", *command], capture_output=True, text=True, check=False)
    assert result.returncode == 6, result.stderr
    assert "could not be written" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list((tmp_path / "save").glob("iter_*"))
    assert not (tmp_path / "save" / "latest_checkpointed_iteration.txt").exists()


def test_a_disk_too_small_is_noticed_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from megatron_instruct.errors import TrainingError
    from megatron_instruct.models.presets import make_architecture
    from megatron_instruct.training import checkpoint

    size = make_architecture({}, preset_name="70B", vocab_size=128256, seq_length=8192)
    with pytest.raises(TrainingError, match=r"GB free, and a checkpoint of this model takes about 8\d\d\.\d GB"):
        checkpoint._check_disk(tmp_path, size, torch.float32)
