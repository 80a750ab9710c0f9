"""A checkpoint of a run, laid out anew with its optimizer: the run goes on from it in any layout as if nothing had been done."""

import io
import json
import pickle
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.conversion.torch_dist import Checkpoint
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import read_manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.run import run as preprocess
from tests.conftest import ROOT

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
SEVERAL_RUNS = ROOT / "tests" / "training" / "several_runs.py"
LAST, STOP = 8, 4
TENSOR, PIPELINE = ("--tensor-model-parallel-size", 2), ("--pipeline-model-parallel-size", 2)
SHARDED, EXPERTS = ("--use-distributed-optimizer",), ("--preset", "tiny-experts")
OVER_EXPERTS = (*EXPERTS, "--expert-model-parallel-size", 2)
Train = Callable[[int, Mapping[str, tuple[object, ...]]], None]


@pytest.fixture
def train(tmp_path: Path, corpus: Path, tokenizer_folder: Path, torchrun: Callable[..., subprocess.CompletedProcess[str]]) -> Train:
    """Train in so many processes, one run after the other, each into the folder of its name: 8 steps, of which the fourth is saved."""
    preprocess(
        PreprocessConfig(
            input=(str(corpus),), output_prefix=tmp_path / "data", tokenizer_model=tokenizer_folder, append_eod=True, workers=1
        )
    )

    def do(processes: int, layouts: Mapping[str, tuple[object, ...]]) -> None:
        common = [
            *(
                "--preset",
                "tiny",
                "--data-path",
                tmp_path / "data_text_document",
                "--tokenizer-model",
                tokenizer_folder,
                "--split",
                "1,0,0",
            ),
            *("--seq-length", 64, "--micro-batch-size", 2, "--global-batch-size", 4, "--train-iters", LAST, "--save-interval", STOP),
            *("--lr", "1e-3", "--min-lr", "1e-4", "--lr-warmup-iters", 2),
        ]
        runs = [
            {"flags": list(map(str, [*common, "--save", tmp_path / name, *layout])), "of": None, "at": 0}
            for name, layout in layouts.items()
        ]
        (tmp_path / "runs.json").write_text(json.dumps(runs))
        done = torchrun(processes, SEVERAL_RUNS, tmp_path / "runs.json")
        assert done.returncode == 0, done.stderr[-3000:]
        assert json.loads((tmp_path / "runs.json.ends").read_text()) == ["done"] * len(runs)

    return do


def lay_out_anew(folder: Path, target: Path) -> None:
    """Lay out the checkpoint of the fourth step; of the run's notes, keep none that could stand for steps which are not run."""
    (folder / "samples.jsonl").write_text('{"iteration": 2, "prompt": "A hacker", "text": " is"}\n')
    manifest = run(ConvertConfig(load=folder, save=target, to="megatron", iteration=STOP))
    assert manifest.facts["proof"]["proved"]
    for note in ("metrics.jsonl", "samples.jsonl"):
        assert (target / note).read_bytes() == (folder / note).read_bytes()
    (target / "metrics.jsonl").unlink()


def losses(folder: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["iteration"], row["loss"]) for row in rows if "loss" in row]


def assert_goes_on(folder: Path, undisturbed: Path) -> None:
    found, wanted = losses(folder), losses(undisturbed)[STOP:]
    assert [iteration for iteration, _ in found] == [iteration for iteration, _ in wanted] == list(range(STOP + 1, LAST + 1))
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in wanted], abs=1e-5)


def test_a_run_goes_on_in_another_layout_from_a_checkpoint_that_was_laid_out_anew(train: Train, tmp_path: Path) -> None:
    train(2, {"undisturbed": (*TENSOR, *SHARDED)})
    lay_out_anew(tmp_path / "undisturbed", tmp_path / "anew")
    before, after = (Checkpoint(tmp_path / name / f"iter_{STOP:07d}") for name in ("undisturbed", "anew"))
    moments = [name for name in after.tensors if name.startswith("optimizer.")]
    assert len(moments) >= 2 * len([name for name in after.tensors if name.startswith("decoder.")])
    fused = "decoder.layers.self_attention.linear_qkv.weight"
    assert len(before.tensors[fused].chunks) == 2 * len(after.tensors[fused].chunks)
    (for_megatron_lm,) = torch.load(io.BytesIO(after.bytes_of("common_state/shard_0_1")), weights_only=False)
    arguments = for_megatron_lm["args"]
    assert (for_megatron_lm["iteration"], arguments.num_layers, arguments.normalization, arguments.bf16) == (STOP, 4, "RMSNorm", False)
    train(1, {"anew": ()})
    assert_goes_on(tmp_path / "anew", tmp_path / "undisturbed")


@pytest.mark.slow
def test_runs_of_several_families_go_on_between_many_layouts(train: Train, tmp_path: Path) -> None:
    """Slow: four launches. In the layout that it had, a run ends with the same bits."""
    train(2, {"stages": (*PIPELINE, *SHARDED), "experts": (*OVER_EXPERTS, *SHARDED)})
    train(1, {"one": EXPERTS})
    on = {
        "stages again": ("stages", (*PIPELINE, *SHARDED)),
        "stages to tensor": ("stages", (*TENSOR, "--sequence-parallel")),
        "experts to stages": ("experts", (*EXPERTS, *PIPELINE)),
        "one to experts": ("one", (*OVER_EXPERTS, *SHARDED)),
    }
    for name, (source, _) in on.items():
        lay_out_anew(tmp_path / source, tmp_path / name)
    train(2, {name: layout for name, (_, layout) in on.items()})
    for name, (source, _) in on.items():
        assert_goes_on(tmp_path / name, tmp_path / source)
    undisturbed, again = (Checkpoint(tmp_path / name / f"iter_{LAST:07d}") for name in ("stages", "stages again"))
    for name, stored in undisturbed.tensors.items():
        for chunk in stored.chunks:
            piece = piece_of(name, stored, chunk)
            assert torch.equal(undisturbed.read(piece), again.read(piece)), name


def piece_of(name: str, stored: Any, chunk: Any) -> Any:
    from megatron_instruct.conversion.torch_dist import Piece

    return Piece(key=name, shape=stored.shape, offsets=chunk.offsets, sizes=chunk.sizes)


@pytest.fixture
def checkpoint(write_model: Callable[..., Path], tmp_path: Path) -> Path:
    run(ConvertConfig(load=write_model(), save=tmp_path / "checkpoint", prove=False))
    return tmp_path / "checkpoint"


def test_what_is_laid_out_anew_holds_the_same_and_is_exported_to_the_same_bytes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ConvertConfig(load=checkpoint, save=tmp_path / "anew", to="megatron"))
    assert "PASS  weights" in (said := capsys.readouterr().out) and "for megatron, proved" in said
    for name in ("checkpoint", "anew"):
        run(ConvertConfig(load=tmp_path / name, save=tmp_path / f"{name}-back", prove=False))
    assert (tmp_path / "anew-back" / "model.safetensors").read_bytes() == (tmp_path / "source" / "model.safetensors").read_bytes()
    before, after = (pickle.loads((tmp_path / name / "iter_0000000" / ".metadata").read_bytes()) for name in ("checkpoint", "anew"))
    assert before.state_dict_metadata.keys() == after.state_dict_metadata.keys()
    old, new = (read_manifest(tmp_path / name / "iter_0000000" / "manifest.json") for name in ("checkpoint", "anew"))
    assert (old.stage, old.settings) == (new.stage, new.settings)
    capsys.readouterr()
    run(ConvertConfig(load=checkpoint, save=tmp_path / "anew", to="megatron"))
    assert "Finished already" in capsys.readouterr().out


def test_a_checkpoint_that_cannot_be_laid_out_anew_is_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    def refused(message: str, error: type[Exception] = InputError, **settings: Any) -> None:
        with pytest.raises(error, match=message):
            run(ConvertConfig(load=checkpoint, save=tmp_path / "out", to="megatron", **settings))
        assert not list(tmp_path.glob("out*"))

    refused(
        "dtype='bf16' is given, and to='megatron' of a Megatron checkpoint keeps weights .*; drop one of them", ConfigError, dtype="bf16"
    )
    refused("iter_0000003", iteration=3)
    data = checkpoint / "iter_0000000" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    refused("__0_0.distcp was changed or damaged after the stage 'convert' wrote it", prove=False)
    (checkpoint / "tokenizer").rename(tmp_path / "elsewhere")
    refused("tokenizer/config.json has None bytes where its manifest says")
