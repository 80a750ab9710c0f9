"""Which checkpoint a run goes on from, which are kept, and what a damaged, foreign or half-written one gives: one message."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import locked
from megatron_instruct.manifest import read_manifest, write_manifest
from megatron_instruct.models.checkpoint_folder import damage, read_description, sealed
from megatron_instruct.training.checkpoint_choice import newest_candidate
from megatron_instruct.training.checkpoint_retention import delete, delete_expendable, expendable
from megatron_instruct.training.run import keep_tokenizer

from .test_bad_input import start

pytestmark = pytest.mark.filterwarnings("ignore")
Flags = Callable[..., list[str]]


@pytest.fixture
def saved(one: dict[str, Path], tmp_path: Path) -> Path:
    """A run with checkpoints of iterations 10 and 20 that is not finished."""
    folder = tmp_path / "saved"
    shutil.copytree(one["reference"], folder)
    (folder / "manifest.json").unlink()
    return folder


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_found_and_the_file_is_named(saved: Path) -> None:
    folder = saved / "iter_0000020"
    _, manifest, _ = read_description(saved)
    assert damage(folder, manifest) is None
    assert {output.path for output in manifest.outputs} == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for output in manifest.outputs:
        flip_a_bit(folder / output.path)
        assert f"{folder / output.path} is damaged: its SHA-256 is" in str(damage(folder, manifest))
        assert [damage(folder, manifest, part=part, of=2) is None for part in range(2)].count(False) == 1
        flip_a_bit(folder / output.path)
    assert damage(folder, manifest) is None


def test_a_changed_number_in_the_manifest_is_found(saved: Path) -> None:
    path = saved / "iter_0000020" / "manifest.json"
    path.write_text(path.read_text().replace('"lr": 0.001', '"lr": 0.002'))
    with pytest.raises(InputError, match=r"iter_0000020/manifest\.json is damaged"):
        read_description(saved)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "__0_0.distcp").unlink(), r"__0_0\.distcp has None bytes where its manifest says"),
        (lambda folder: (folder / "__0_0.distcp").write_bytes(b"half"), r"__0_0\.distcp has 4 bytes where its manifest says"),
        (lambda folder: (folder / "manifest.json").unlink(), r"manifest\.json: no such manifest"),
        (lambda folder: (folder / "manifest.json").write_text('{"format": 1, "st'), r"manifest\.json is not valid JSON"),
        (shutil.rmtree, r"manifest\.json: no such manifest"),
    ],
)
def test_the_newest_whole_checkpoint_is_taken_and_the_others_are_named(spoil: Callable[[Path], None], reason: str, saved: Path) -> None:
    spoil(saved / "iter_0000020")
    found = newest_candidate(saved)
    assert found.path == saved / "iter_0000010"
    assert len(found.passed_over) == 1
    known = {20: found.passed_over[0], 10: f"{saved / 'iter_0000010'} has flipped bits."}
    with pytest.raises(InputError, match=rf"no checkpoint in {saved} is whole: .*{reason}.*; .*bits.*Restore one from a copy, or give"):
        newest_candidate(saved, passed_over=known)


def of_a_newer_kind(folder: Path) -> None:
    manifest = read_manifest(folder / "manifest.json")
    newer = dataclasses.replace(manifest, facts={**manifest.facts, "checkpoint_format": 2})
    write_manifest(folder / "manifest.json", sealed(newer))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "manifest.json").write_text('{"format": 2}'), r"is of format 2, .*a newer version wrote it; upgrade"),
        (of_a_newer_kind, r"is a checkpoint of format 2, and this version reads 1: version .* wrote it; upgrade"),
    ],
)
def test_a_checkpoint_of_a_newer_version_is_neither_read_nor_replaced(
    change: Callable[[Path], None], message: str, flags: Flags, saved: Path
) -> None:
    change(saved / "iter_0000020")
    before = {path: path.stat().st_mtime_ns for path in saved.rglob("*")}
    with pytest.raises(InputError, match=rf"{message}.* To go on from an older checkpoint, move that folder away"):
        start(flags(saved))
    assert {path: path.stat().st_mtime_ns for path in saved.rglob("*")} == before
    shutil.rmtree(saved / "iter_0000020")
    assert newest_candidate(saved).path == saved / "iter_0000010"


def test_a_checkpoint_above_the_named_one_does_not_count(saved: Path) -> None:
    (saved / "latest_checkpointed_iteration.txt").write_text("10\n")
    assert newest_candidate(saved).path == saved / "iter_0000010"
    assert newest_candidate(saved).passed_over == ()


def test_where_no_checkpoint_is_named_the_newest_is_gone_on_from(saved: Path) -> None:
    """Its name was lost, or the run was killed before it was written: beginning anew would replace checkpoints that are whole."""
    (saved / "latest_checkpointed_iteration.txt").unlink()
    assert newest_candidate(saved).path == saved / "iter_0000020"
    (saved / "iter_0000020" / "manifest.json").unlink()
    assert newest_candidate(saved).path == saved / "iter_0000010"


@pytest.mark.parametrize("name", ["tokenizer/tokenizer.json", "metrics.jsonl", "settings.yaml"])
def test_what_no_run_left_in_the_folder_is_neither_replaced_nor_removed(name: str, flags: Flags, tmp_path: Path) -> None:
    path = tmp_path / "save" / name
    path.parent.mkdir(parents=True)
    path.write_text("{}\n")
    with pytest.raises(InputError, match=rf"save/{name.split('/')[0]} exists already and has no manifest: it is not this tool's"):
        start(flags(tmp_path / "save"))
    assert path.read_text() == "{}\n"


def test_weights_of_another_tokenizer_are_refused(flags: Flags, saved: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path / "other")
    content = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"other is another tokenizer than the one that .*iter_0000020 was trained with; leave"):
        start(flags(tmp_path / "save", "--load", saved, "--tokenizer-model", tmp_path / "other"))


def test_weights_of_another_model_are_refused(flags: Flags, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_layers asks for num_layers=2, and the model in .* has 4"):
        start(flags(tmp_path / "save", "--load", saved, "--num-layers", 2))


def test_a_folder_in_use_by_another_run_is_refused(flags: Flags, saved: Path) -> None:
    with locked(saved), pytest.raises(ConfigError, match=r"another run is writing to .*; wait for it, or choose another output"):
        start(flags(saved))


def test_a_folder_that_cannot_be_written_is_refused(flags: Flags, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        start(flags(tmp_path / "file" / "save"))


@pytest.mark.parametrize(
    ("keep_last", "retain_interval", "kept"),
    [
        (None, None, [5, 10, 15, 20, 25]),
        (1, None, [25]),
        (2, None, [20, 25]),
        (9, None, [5, 10, 15, 20, 25]),
        (None, 10, [10, 20, 25]),
        (2, 15, [15, 20, 25]),
    ],
)
def test_the_last_ones_and_the_multiples_are_kept(keep_last: int | None, retain_interval: int | None, kept: list[int]) -> None:
    saved = [5, 10, 15, 20, 25]
    gone = expendable(saved, keep_last=keep_last, retain_interval=retain_interval)
    assert [number for number in saved if number not in gone] == kept


def test_deletion_takes_whole_folders_and_finishes_what_a_killed_process_left(saved: Path) -> None:
    (saved / "iter_0000005.deleted").mkdir()
    (saved / "iter_0000005.deleted" / "__0_0.distcp").write_bytes(b"rest")
    removing = delete_expendable(saved, keep_last=1, retain_interval=None)
    assert [path.name for path in saved.glob("iter_*") if not path.name.endswith(".deleted")] == ["iter_0000020"]
    assert removing is not None
    removing.join()
    assert sorted(path.name for path in saved.glob("iter_*")) == ["iter_0000020"]
    delete(saved / "iter_0000020")
    assert not list(saved.glob("iter_*"))


def test_only_what_is_saved_can_be_retained(flags: Flags, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"save_retain_interval=15 must be a multiple of save_interval=10"):
        start(flags(tmp_path / "save", "--save-retain-interval", 15))


@pytest.mark.parametrize("resumes", [False, True])
def test_the_tokenizer_of_a_start_without_checkpoint_gives_way_to_that_of_the_next(
    tokenizer_folder: Path, tmp_path: Path, resumes: bool
) -> None:
    """A run that goes on keeps its own, and the tokenizer that lies there already is not lost where it is the one that is given."""
    kept = tmp_path / "save" / "tokenizer"
    keep_tokenizer(tokenizer_folder, kept, resumes=False)
    other = tmp_path / "other"
    shutil.copytree(tokenizer_folder, other)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    keep_tokenizer(other, kept, resumes=resumes)
    given = tokenizer_folder if resumes else other
    assert (kept / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
    for itself in (kept, kept / "tokenizer.json"):
        keep_tokenizer(itself, kept, resumes=False)
        assert (kept / "tokenizer.json").read_bytes() == (given / "tokenizer.json").read_bytes()
