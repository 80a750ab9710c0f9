"""The manifest says that a stage is finished, and with what; anything else in its place is refused with the reason."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct import __version__
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import LOCK, TEMPORARY_SUFFIX
from megatron_instruct.manifest import FileRecord, Manifest, finished, read_manifest, record, records, write_manifest

SETTINGS: Mapping[str, Any] = {"seed": 1, "keys": ["text"], "limit": None}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"text": "a"}\n')
    return path


@pytest.fixture
def place(tmp_path: Path, source: Path) -> Path:
    """The manifest of a finished stage with one output."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "examples.jsonl").write_text("one\ntwo\n")
    manifest = Manifest(
        stage="render",
        settings=SETTINGS,
        inputs=records([source]),
        outputs=records([folder], relative_to=folder),
        counts={"documents": 2},
        rejected={"too long": 1},
        facts={"proof": {"difference": 1e-6}},
    )
    write_manifest(folder / "manifest.json", manifest)
    return folder / "manifest.json"


def change(place: Path, **values: Any) -> None:
    """Overwrite entries of a manifest; None removes one."""
    content = {**json.loads(place.read_text()), **values}
    place.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_a_manifest_is_read_as_it_was_written(place: Path, source: Path) -> None:
    manifest = read_manifest(place, stage="render")
    assert manifest.settings == SETTINGS
    assert manifest.outputs == (FileRecord(path="examples.jsonl", bytes=8, sha256=record(place.parent / "examples.jsonl").sha256),)
    assert manifest.inputs == (record(source),)
    assert (manifest.counts, manifest.rejected, manifest.facts) == ({"documents": 2}, {"too long": 1}, {"proof": {"difference": 1e-6}})
    assert manifest.version == __version__


def test_the_same_work_is_finished(place: Path, source: Path) -> None:
    manifest = finished(place, stage="render", settings=dict(SETTINGS), inputs=records([source]))
    assert manifest is not None
    assert manifest.counts == {"documents": 2}


def test_the_same_content_under_another_name_is_the_same_input(place: Path, source: Path) -> None:
    moved = source.rename(source.with_name("moved.jsonl"))
    assert finished(place, stage="render", settings=SETTINGS, inputs=records([moved])) is not None


def test_nothing_is_finished_where_there_is_no_manifest(tmp_path: Path) -> None:
    assert finished(tmp_path / "manifest.json", stage="render", settings={}, inputs=()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "seed": 2}, "made with seed=1, and this run asks for seed=2; choose another output or remove"),
        ({**SETTINGS, "keys": ["text", "title"]}, r"made with keys=\['text'\], and this run asks for keys=\['text', 'title'\]"),
        ({**SETTINGS, "extra": True}, "made with extra=None, and this run asks for extra=True"),
        ({"keys": ["text"]}, "made with seed=1, and this run asks for seed=None"),
    ],
)
def test_other_settings_are_refused_by_name(place: Path, source: Path, settings: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finished(place, stage="render", settings=settings, inputs=records([source]))


def test_other_inputs_are_refused(place: Path, source: Path) -> None:
    source.write_text('{"text": "b"}\n')
    with pytest.raises(ConfigError, match="made from other inputs; choose another output or remove"):
        finished(place, stage="render", settings=SETTINGS, inputs=records([source]))
    with pytest.raises(ConfigError, match="made from other inputs"):
        finished(place, stage="render", settings=SETTINGS, inputs=())


def test_the_same_inputs_in_another_order_are_another_result(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    first.write_text("a")
    second.write_text("b")
    place = tmp_path / "manifest.json"
    write_manifest(place, Manifest(stage="render", settings=SETTINGS, inputs=records([first, second])))
    assert finished(place, stage="render", settings=SETTINGS, inputs=records([first, second])) is not None
    with pytest.raises(ConfigError, match="made from the same inputs in another order; choose another output or remove"):
        finished(place, stage="render", settings=SETTINGS, inputs=records([second, first]))


def test_the_result_of_another_stage_is_refused(place: Path) -> None:
    with pytest.raises(InputError, match=r"written by the stage 'render'; a result of 'synthesize' is needed here"):
        read_manifest(place, stage="synthesize")


@pytest.mark.parametrize("content", ["one\n", "one\ntwo\nthree\n", None])
def test_an_output_of_another_size_is_refused(place: Path, content: str | None) -> None:
    output = place.parent / "examples.jsonl"
    output.write_text(content) if content is not None else output.unlink()
    size = None if content is None else len(content)
    with pytest.raises(InputError, match=rf"examples\.jsonl has {size} bytes where its manifest says 8; remove .* and run 'render' again"):
        read_manifest(place)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"inputs": None}, "is damaged .'inputs'."),
        ({"outputs": [{"path": "a"}]}, "is damaged"),
        ({"outputs": "none"}, "is damaged"),
        ({"stage": None}, "is damaged .*stage"),
        ({"surprise": 1}, "is damaged .*surprise"),
        ({"settings": [1]}, "is damaged .settings is no mapping."),
        ({"counts": 3}, "is damaged .counts is no mapping."),
        ({"format": 2}, "is not a manifest of format 1"),
        ({"format": None}, "is not a manifest of format 1"),
    ],
)
def test_a_damaged_manifest_is_refused(place: Path, values: dict[str, Any], message: str) -> None:
    change(place, **values)
    with pytest.raises(InputError, match=message):
        read_manifest(place)


@pytest.mark.parametrize("content", ["", "{", "[]", '"text"', "\0" * 64])
def test_what_is_no_manifest_is_refused(place: Path, content: str) -> None:
    place.write_text(content)
    with pytest.raises(InputError, match=r"manifest\.json is not"):
        finished(place, stage="render", settings=SETTINGS, inputs=())


def test_a_missing_manifest_means_unfinished_or_foreign(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such manifest, so what it should describe is unfinished or foreign"):
        read_manifest(tmp_path / "manifest.json")


def test_a_folder_is_recorded_in_order_without_manifest_lock_and_leftovers(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "a.txt", "manifest.json", f"manifest.json{TEMPORARY_SUFFIX}", f"c.txt{TEMPORARY_SUFFIX}", LOCK):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [item.path for item in records([tmp_path], relative_to=tmp_path)] == ["a.txt", "b/1.txt", "b/2.txt"]


def test_a_missing_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        records([tmp_path / "nowhere.jsonl"])


def test_two_runs_write_the_same_bytes(place: Path) -> None:
    before = place.read_bytes()
    write_manifest(place, read_manifest(place))
    assert place.read_bytes() == before
