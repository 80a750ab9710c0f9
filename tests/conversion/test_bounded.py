"""Checkpoints written and read piece by piece, layers compared one at a time, files that changed since they were noted."""

import dataclasses
import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.run import run
from megatron_instruct.errors import InputError
from tests.conversion.conftest import FAMILIES, LLAMA, WriteModel

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_what_is_written_is_what_megatron_core_writes_of_the_same_model(family: str, write_model: WriteModel, tmp_path: Path) -> None:
    """Every name, size and value; megatron-core's own reader reads it, too."""
    run(ConvertConfig(load=write_model(FAMILIES[family]), save=tmp_path / "ours", prove=False))
    from megatron_instruct.conversion import megatron_side
    from megatron_instruct.conversion.torch_dist import Checkpoint
    from megatron_instruct.models.build import BuildOptions, build_model
    from megatron_instruct.models.checkpoint import load_weights, save_weights
    from megatron_instruct.models.checkpoint_folder import read_description
    from megatron_instruct.models.layout import ParallelLayout

    path, _, architecture = read_description(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    with megatron_side.one_process() as machine:
        (model,) = build_model(architecture, ParallelLayout(), machine, BuildOptions(seed=99))
        load_weights(path, [model])
        save_weights(tmp_path / "theirs", [model])
        plan = megatron_side.plan_checkpoint(architecture, machine)
    ours, theirs = (pickle.loads((folder / ".metadata").read_bytes()) for folder in (path, tmp_path / "theirs"))
    assert ours.state_dict_metadata.keys() == theirs.state_dict_metadata.keys()
    first, second = Checkpoint(path), Checkpoint(tmp_path / "theirs")
    assert first.tensors.keys() == second.tensors.keys()
    for name, stored in first.tensors.items():
        assert (stored.shape, stored.dtype) == (second.tensors[name].shape, second.tensors[name].dtype)
    for pieces in plan.pieces.values():
        for piece in pieces:
            assert torch.equal(first.read(piece), second.read(piece)), piece
    for name in first.tensors:  # whole tensors, over all their parts
        whole = dataclasses.replace(piece, key=name, offsets=(0,) * len(first.tensors[name].shape), sizes=first.tensors[name].shape)
        assert torch.equal(first.read(whole), second.read(whole)), name


@pytest.mark.parametrize(
    "family", [family if family in ("qwen2", "mixtral") else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_a_model_that_does_not_fit_the_memory_is_compared_layer_by_layer(
    family: str, write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_instruct.conversion import computation

    monkeypatch.setattr(computation, "_BYTES_PER_PARAMETER", 1e12)
    window: dict[str, Any] = {"sliding_window": 40} if family in ("mistral", "mixtral") else {}
    if family in ("qwen2", "qwen3"):
        window = {"use_sliding_window": True, "sliding_window": 40, "max_window_layers": 2}
    source = write_model({**FAMILIES[family], "num_hidden_layers": 4, **window})
    there = run(ConvertConfig(load=source, save=tmp_path / "megatron"))
    back = run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "back"))
    for manifest in (there, back):
        checks = {check["name"]: check for check in manifest.facts["proof"]["checks"]}
        sample = {"layer 0", "layer 1", "layer 3"} | ({"layer 2"} if "max_window_layers" in window else set())
        assert {name for name in checks if name.startswith("layer")} == sample
        assert all(checks[name]["passed"] and checks[name]["values"]["largest"] > 0.5 for name in sample)
        assert "logits" not in checks


def test_every_layer_of_a_model_that_fits_has_its_line_in_the_manifest(
    write_model: WriteModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = run(ConvertConfig(load=write_model({**LLAMA, "num_hidden_layers": 3}), save=tmp_path / "megatron"))
    layers = [check for check in manifest.facts["proof"]["checks"] if check["name"].startswith("layer")]
    assert [check["values"]["layer"] for check in layers] == [0, 1, 2]
    assert all(0 <= check["values"]["max"] <= check["values"]["tolerance"] for check in layers)
    assert "PASS  layers     3 of 3 compared layers agree" in capsys.readouterr().out


def flip_a_bit(file: Path) -> None:
    """In the last value of the last tensor, where the lowest bit of its mantissa lies."""
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(bytes(content))


def test_a_flipped_bit_is_noticed_where_the_checksum_is_known(write_model: WriteModel, tmp_path: Path) -> None:
    source, out = write_model(), tmp_path / "out"
    weights = source / "model.safetensors"
    note = source / ".cache" / "huggingface" / "download" / "model.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"0123456789abcdef\n{hashlib.sha256(weights.read_bytes()).hexdigest()}\n1700000000.0\n")
    run(ConvertConfig(load=source, save=tmp_path / "megatron", prove=False))
    run(ConvertConfig(load=tmp_path / "megatron", save=tmp_path / "exported", prove=False))
    flip_a_bit(weights)
    with pytest.raises(InputError, match=r"model.safetensors is not what was downloaded: .* download it again"):
        run(ConvertConfig(load=source, save=out, prove=False))
    flip_a_bit(tmp_path / "exported" / "model.safetensors")
    with pytest.raises(InputError, match=r"model.safetensors was changed after the stage 'convert' wrote it"):
        run(ConvertConfig(load=tmp_path / "exported", save=out, prove=False))
    data = tmp_path / "megatron" / "iter_0000000" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(bytes(content))
    with pytest.raises(InputError, match=r"__0_0.distcp was changed or damaged after the stage 'convert' wrote it"):
        run(ConvertConfig(load=tmp_path / "megatron", save=out, prove=False))
    assert not list(tmp_path.glob("out*"))


def test_a_flipped_bit_in_a_header_is_refused_wherever_it_is(write_model: WriteModel, tmp_path: Path) -> None:
    """Each of the first 24 bytes, and some of the names and sizes behind them."""
    source = write_model()
    weights = source / "model.safetensors"
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    refused = 0
    for position in [*range(24), *range(24, length, 97)]:
        changed = bytearray(content)
        changed[position] ^= 0x10
        weights.write_bytes(bytes(changed))
        try:
            run(ConvertConfig(load=source, save=tmp_path / f"out{position}", prove=False))
        except InputError:
            refused += 1
            assert not list(tmp_path.glob(f"out{position}*"))
        else:  # what changed says nothing of a tensor: spaces between, the format's name
            assert changed[position : position + 1] in b"0p" or b"__metadata__" in content[8 : position + 20]
    assert refused > 20


class Harmful:
    """What a pickle could hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm"),))


def test_an_index_that_would_run_code_is_refused(write_model: WriteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_instruct.conversion.torch_dist import Checkpoint

    monkeypatch.chdir(tmp_path)
    for harm in (Harmful(), print, json.loads):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(harm))
        with pytest.raises(InputError, match="which no index of a checkpoint holds"):
            Checkpoint(tmp_path)
    assert not (tmp_path / "harm").exists()
