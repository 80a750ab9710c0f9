"""A dry run refuses what the run itself would refuse, with the value and the remedy, and touches nothing."""

import re
from pathlib import Path

import pytest

from megatron_instruct.config import parse
from megatron_instruct.errors import ConfigError
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.dry_run import describe

pytestmark = pytest.mark.filterwarnings("ignore")
FP8 = ("--fp8-format", "hybrid", "--bf16", "--ffn-hidden-size", 192, "--seq-length", 64)


def described(folder: Path, *more: object) -> str:
    words = ["--preset", "tiny", "--data-path", "x", "--save", folder / "save", "--train-iters", 20, "--lr", 1e-3]
    words += ["--global-batch-size", 8, "--vocab-size", 1000, "--dry-run", *more]
    config = parse(PretrainConfig, list(map(str, words)), prog="pretrain.py")
    assert config is not None
    return describe(config)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--world-size", 3), "global_batch_size=8 is not a multiple of .* = 1 . 3 = 3; use 9"),
        (("--world-size", 3, "--tensor-model-parallel-size", 2), "world_size=3 is not a multiple of"),
        (("--num-query-groups", 2, "--tensor-model-parallel-size", 4, "--world-size", 4), "num_query_groups=2 is not .* allows 1, 2"),
        (("--tensor-model-parallel-size", 0), "tensor_model_parallel_size=0 must be at least 1"),
        (("--hidden-size", 100), "hidden_size=100 is not a multiple of num_attention_heads=8"),
        (("--seq-length", 4096), "seq_length=4096 is longer than the model's max_position_embeddings=2048"),
        ((*FP8, "--gpu", "a100-80"), "a100-80 has no fp8 units; take precision=bf16, or a kind that has: b200"),
        ((*FP8, "--gpu", "h100", "--fp8-recipe", "mxfp8"), r"needs a GPU of compute capability 10.0 .Blackwell. .* this GPU has 9\.0"),
        ((*FP8, "--gpu", "l40s", "--fp8-recipe", "blockwise"), r"needs a GPU of compute capability 9.0 .Hopper."),
        ((*FP8, "--ffn-hidden-size", 176, "--fp8-recipe", "mxfp8", "--gpu", "b200"), "= 176 is not a multiple of 32"),
        (("--gpu", "h10"), r"gpu='h10' is unknown; did you mean 'h100'\? A kind is an entry"),
        (("--data-path", "0,3", "a", "0,7", "b"), "data_path: '0,3' is neither a number nor a data set; weights are numbers such as 0.3"),
        (("--data-path", "nan", "a", "0.7", "b"), "data_path: the weight 'nan' of a is not a positive number"),
        (("--data-path", "--phases", "{data_path: x0.3 a}"), "data_path of phase 1: 'x0.3' is neither a number nor a data set"),
        (("--split", "1,2"), "split='1,2' must be three shares"),
        (("--lr", "inf"), "lr=inf: 0 <= min_lr <= lr and lr > 0 must hold, both finite"),
        (("--weight-decay", "nan"), "weight_decay=nan must be a number that is not negative"),
        (("--clip-grad", -1), "clip_grad=-1.0 must be a number that is not negative"),
        (("--adam-beta2", 1.0), "adam_beta2=1.0 must be at least 0 and below 1"),
        (("--adam-eps", 0), "adam_eps=0.0 must be a positive number"),
        (("--lr-warmup-iters", -1), "lr_warmup_iters=-1 must not be negative"),
        (("--lr-decay-style", "inverse-square-root"), "lr_warmup_iters=0; give lr_warmup_iters of at least 1"),
        (("--lr-decay-iters", 0), "lr_decay_iters=0 must be at least 1; leave it out for train_iters"),
        (("--seed", -1), "seed=-1 must lie between 0 and 2147483647"),
        (("--num-workers", -1), "num_workers=-1 must not be negative"),
        (("--distributed-timeout-minutes", 0), "distributed_timeout_minutes=0.0 must be a positive number"),
        (("--rotary-base", 0), "rotary_base=0.0 must be a positive number"),
        (("--make-vocab-size-divisible-by", 0), "make_vocab_size_divisible_by=0 must be at least 1"),
        (("--moe-aux-loss-coeff", 0.1), "moe_aux_loss_coeff: the family llama has no experts; drop"),
        (("--transformer-config", "hiden_dropout", 0.1), "megatron-core has no field 'hiden_dropout'; did you mean 'hidden_dropout'"),
        (("--transformer-config", "hidden_dropout", "1e-3"), r"hidden_dropout='1e-3' must be a number, such as 0.1 or 1\.0e-3"),
        (("--transformer-config", "moe_grouped_gemm", "3"), "moe_grouped_gemm=3 must be true or false"),
        (("--transformer-config", "num_moe_experts", "3"), "'num_moe_experts' is decided by the model and layout settings"),
        (("--transformer-config", "fp8_param", "true"), "megatron-core does not take these settings: fp8_param must be used together with"),
    ],
)
def test_what_cannot_be_is_refused(more: tuple[object, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        described(tmp_path, *more)
    assert not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    "more",
    [
        ("moe_expert_capacity_factor", "0.6", "--preset", "tiny-experts", "--sequence-parallel", "--tensor-model-parallel-size", 2),
        ("defer_embedding_wgrad_compute", "true", "--pipeline-model-parallel-size", 2),
        ("hidden_dropout", "0.1", *FP8, "--gpu", "h100", "--fp8-recipe", "tensorwise"),
    ],
)
def test_what_a_cpu_or_a_missing_package_alone_forbids_is_left_to_the_gpu(more: tuple[object, ...], tmp_path: Path) -> None:
    assert "Estimate on h100" in described(tmp_path, "--world-size", 2, "--transformer-config", *more)


def test_emulated_fp8_needs_no_fp8_units(tmp_path: Path) -> None:
    assert "Estimate on a100-80" in described(tmp_path, *FP8, "--fp8-emulation", "--gpu", "a100-80")


def test_what_is_sharded_is_counted_in_shards_and_whole_a_layer_at_a_time(tmp_path: Path) -> None:
    def parts(*more: object) -> dict[str, float]:
        told = described(tmp_path, "--preset", "8B", "--seq-length", 2048, "--bf16", "--world-size", 8, *more)
        (line,) = re.findall(r"GiB: .* = (.*) \(usable", told)
        return {name: float(number) for name, number in re.findall(r"([a-z ]+) ([\d.]+)(?: \+ |$)", line)}

    strategy = ("--use-megatron-fsdp", "--data-parallel-sharding-strategy")
    whole, sharded = parts("--use-distributed-optimizer"), parts("--use-megatron-fsdp")
    for name in ("weights", "gradients"):
        assert sharded[name] == pytest.approx(whole[name] / 8, abs=0.1)
    assert 0 < sharded["gathered"] < 0.15 * (whole["weights"] + whole["gradients"])
    assert parts(*strategy, "optim") == whole
    assert parts(*strategy, "optim_grads")["weights"] == whole["weights"]
    assert parts(*strategy, "no_shard")["optimizer"] == pytest.approx(8 * whole["optimizer"], abs=0.5)
    assert "gathered" not in parts("--use-megatron-fsdp", "--world-size", 1)


def test_muon_s_memory_is_said_to_be_estimated_from_above(tmp_path: Path) -> None:
    assert "the estimate counts AdamW's two" in described(tmp_path, "--optimizer", "muon")
    assert "Muon" not in described(tmp_path)


def test_tokens_are_counted_while_the_batch_grows(tmp_path: Path) -> None:
    told = described(tmp_path, "--rampup-batch-size", 2, 2, 2_000_000, "--seq-length", 1000, "--train-iters", 1_000_000)
    batch, estimate = (float(found) for found in re.findall(r"([\d.]+) billion tokens", told))
    assert batch == pytest.approx(estimate, abs=0.05)
    assert batch < 7.9, "of 8 billion without the growth"
