"""merge_datasets.py: megatron-core's bytes, nothing lost, nothing merged that does not belong together."""

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import locked
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file, idx_file, write_index
from megatron_instruct.preprocessing.inspection import main as inspect
from megatron_instruct.preprocessing.merge_datasets import MergeConfig, main, run
from megatron_instruct.preprocessing.run import run as preprocess
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.training.settings.data import DataOptions
from megatron_instruct.training.sources import find_sources

SUFFIXES = (".bin", ".idx", ".roles", ".rejects.jsonl", ".manifest.json")


def make(folder: Path, name: str, rows: Sequence[Any], tokenizer: Path, **settings: Any) -> Path:
    """Preprocess rows; text rows are JSON already. Return the data set's prefix."""
    folder.mkdir(exist_ok=True)
    source = folder / f"{name}.jsonl"
    source.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    options = {"append_eod": True, "workers": 1, "fast_tokenizer": "none", **settings}
    config = PreprocessConfig(input=(str(source),), output_prefix=folder / name, tokenizer_model=tokenizer, **options)
    preprocess(config)
    return config.prefix("text")


def texts(first: int, count: int) -> list[dict[str, str]]:
    return [{"text": f"Document {number}. It has a second sentence. And “a third”."} for number in range(first, first + count)]


def augmented(number: int) -> dict[str, Any]:
    text = f"Context {number}. Question? Answer."
    cut = text.index("Question"), text.index("Answer")
    spans = [[0, cut[0], "context"], [cut[0], cut[1], "instruction"], [cut[1], len(text), "response"]]
    return {"id": str(number), "text": text, "spans": spans, "provenance": {}}


def merge(output: Path, *prefixes: Path, **settings: Any) -> Manifest:
    return run(MergeConfig(output_prefix=output, data_path=tuple(map(str, prefixes)), **settings))


def merged_by_megatron_core(prefixes: Sequence[Path], target: Path) -> None:
    core = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    builder = core.IndexedDatasetBuilder(f"{target}.bin", dtype=core.IndexedDataset(str(prefixes[0])).index.dtype)
    for prefix in prefixes:
        builder.add_index(str(prefix))
    builder.finalize(f"{target}.idx")


def content(prefix: Path) -> dict[str, bytes]:
    return {suffix: file.read_bytes() for suffix in SUFFIXES if (file := Path(f"{prefix}{suffix}")).is_file()}


@pytest.fixture
def two(tmp_path: Path, tokenizer_folder: Path) -> tuple[Path, Path]:
    """Prefixes of two data sets in the folder data."""
    data = tmp_path / "data"
    return make(data, "b", texts(0, 30), tokenizer_folder), make(data, "a", texts(30, 20), tokenizer_folder)


@pytest.mark.parametrize("split", [False, True])
def test_bytes_are_those_of_megatron_core(tmp_path: Path, tokenizer_folder: Path, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")  # megatron-core 0.19 warns where it finds none
    sizes = {"x": 30, "y": 1, "z": 7}
    prefixes = [make(tmp_path, name, texts(0, size), tokenizer_folder, split_sentences=split) for name, size in sizes.items()]
    manifest = merge(tmp_path / "ours", *prefixes)
    merged_by_megatron_core(prefixes, tmp_path / "theirs")
    for suffix in (".bin", ".idx"):
        assert Path(f"{tmp_path / 'ours'}{suffix}").read_bytes() == Path(f"{tmp_path / 'theirs'}{suffix}").read_bytes()
    assert (manifest.counts["documents_in"], manifest.counts["documents"]) == (38, 38)
    assert manifest.counts["tokens"] == len(IndexedDataset(tmp_path / "ours").tokens)


def test_a_folder_is_merged_in_the_order_of_names_and_the_result_may_lie_in_it(two: tuple[Path, Path], tmp_path: Path) -> None:
    b, a = two
    output = tmp_path / "data" / "merged"
    assert main(["--input", str(tmp_path / "data"), "--output-prefix", str(output)]) == 0
    assert [item["data_set"] for item in read_manifest(Path(f"{output}.manifest.json")).facts["merged"]] == [str(a), str(b)]
    assert IndexedDataset(output).tokens.tolist() == [*IndexedDataset(a).tokens.tolist(), *IndexedDataset(b).tokens.tolist()]
    assert main(["--input", str(tmp_path / "data"), "--output-prefix", str(output)]) == 0


def test_roles_and_rejects_are_merged_and_counted(tmp_path: Path, tokenizer_folder: Path) -> None:
    first = make(tmp_path, "a", [augmented(0), "{broken", augmented(1)], tokenizer_folder, on_error="reject")
    second = make(tmp_path, "b", [augmented(2), '{"text": ""}', "[]"], tokenizer_folder, on_error="reject")
    manifest = merge(tmp_path / "m", first, second)
    for suffix in (".roles", ".rejects.jsonl"):
        parts = [Path(f"{prefix}{suffix}").read_bytes() for prefix in (first, second)]
        assert Path(f"{tmp_path / 'm'}{suffix}").read_bytes() == b"".join(parts)
        assert all(parts)
    assert (manifest.counts["documents_in"], manifest.counts["documents"], sum(manifest.rejected.values())) == (6, 3, 3)
    assert manifest.facts["roles"]["tokens"]["response"] > 0
    assert sum(manifest.facts["roles"]["tokens"].values()) == manifest.counts["tokens"]
    assert inspect(["--data-path", str(tmp_path / "m"), "--tokenizer-model", str(tokenizer_folder)]) == 0


def test_training_takes_a_merged_data_set(two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: Path) -> None:
    merge(tmp_path / "m", *two)
    options = DataOptions(data_path=(str(tmp_path / "m"),), reset_attention_mask=True)
    sources = find_sources(options, load_tokenizer(tokenizer_folder))
    assert sources.train == ([str(tmp_path / "m")], None)


def test_a_second_run_does_nothing_and_other_inputs_are_refused(
    two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(tmp_path / "m", *two)
    before, stamp = content(tmp_path / "m"), Path(f"{tmp_path / 'm'}.bin").stat().st_mtime_ns
    capsys.readouterr()
    merge(tmp_path / "m", *two)
    assert capsys.readouterr().out == f"Finished already: {tmp_path / 'm'}.\n"
    assert Path(f"{tmp_path / 'm'}.bin").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="holds a result made from the same inputs in another order; choose another output"):
        merge(tmp_path / "m", *reversed(two))
    with pytest.raises(ConfigError, match="holds a result made from other inputs; choose another output"):
        merge(tmp_path / "m", two[0])
    assert content(tmp_path / "m") == before


def test_a_merged_data_set_is_merged_again(two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: Path) -> None:
    third = make(tmp_path, "c", texts(90, 3), tokenizer_folder)
    merge(tmp_path / "m", *two)
    merge(tmp_path / "step", tmp_path / "m", third)
    merge(tmp_path / "once", *two, third)
    assert content(tmp_path / "step")[".bin"] == content(tmp_path / "once")[".bin"]
    assert content(tmp_path / "step")[".idx"] == content(tmp_path / "once")[".idx"]


def test_what_does_not_belong_together_is_refused(
    two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: Path, other_tokenizer: Path
) -> None:
    other = {
        "append_eod=True": make(tmp_path, "noeod", texts(0, 3), tokenizer_folder, append_eod=False),
        "split_sentences": make(tmp_path, "split", texts(0, 3), tokenizer_folder, split_sentences=True),
        "pack_sequence_length": make(tmp_path, "packed", [augmented(0)], tokenizer_folder, pack_sequence_length=64),
        "made with the tokenizer": make(tmp_path, "other_data", texts(0, 3), other_tokenizer),
        "1 of 2 data sets have roles, and not": make(tmp_path, "roles", [augmented(0)], tokenizer_folder),
    }
    for words, prefix in other.items():
        with pytest.raises(InputError, match=words) as told:
            merge(tmp_path / "m", prefix, two[0])
        assert str(two[0]) in str(told.value)
    assert not list(tmp_path.glob("m.*"))


@pytest.fixture
def other_tokenizer(tmp_path: Path, tokenizer_folder: Path) -> Path:
    """The tokenizer with one token more."""
    import tokenizers

    model = tokenizers.Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    model.add_tokens(["<extra>"])
    folder = tmp_path / "other"
    shutil.copytree(tokenizer_folder, folder)
    model.save(str(folder / "tokenizer.json"))
    return folder


def test_data_of_another_tool_are_taken_when_told_so(two: tuple[Path, Path], tmp_path: Path, tokenizer_folder: Path) -> None:
    Path(f"{two[1]}.manifest.json").unlink()
    with pytest.raises(InputError, match="pass --adopt-data"):
        merge(tmp_path / "m", *two)
    manifest = merge(tmp_path / "m", *two, adopt_data=True)
    assert (manifest.settings["append_eod"], manifest.counts["documents_in"]) == (True, 50)
    Path(f"{two[0]}.manifest.json").unlink()
    with pytest.raises(ConfigError, match="give it with tokenizer_model"):
        merge(tmp_path / "n", *two, adopt_data=True)
    assert merge(tmp_path / "n", *two, adopt_data=True, tokenizer_model=tokenizer_folder).facts["tokenizer"] == manifest.facts["tokenizer"]


def test_adopted_data_of_another_dtype_or_with_ids_beyond_the_vocabulary_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    core = pytest.importorskip("megatron.core.datasets.indexed_dataset", reason="megatron-core is not installed")
    for name, dtype, ids, words in (("wide", np.int32, [1, 2], "holds int32 tokens"), ("far", np.uint16, [60_000], "vocabulary has")):
        builder = core.IndexedDatasetBuilder(str(tmp_path / f"{name}.bin"), dtype=dtype)
        builder.add_document(np.array(ids), [len(ids)])
        builder.finalize(str(tmp_path / f"{name}.idx"))
        with pytest.raises(InputError, match=words):
            merge(tmp_path / "m", two[0], tmp_path / name, adopt_data=True)


def test_a_changed_or_incomplete_data_set_is_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    file = Path(f"{two[1]}.bin")
    good = file.read_bytes()
    file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(InputError, match=r"a_text_document.bin was changed"):
        merge(tmp_path / "m", *two)
    file.write_bytes(good[:-2])
    with pytest.raises(InputError, match=r"a_text_document.bin has \d+ bytes"):
        merge(tmp_path / "m", *two)
    file.unlink()
    with pytest.raises(InputError, match=r"a_text_document.bin is missing"):
        run(MergeConfig(output_prefix=tmp_path / "m", input=tmp_path / "data"))


def test_errors_name_what_is_wrong(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a folder of data sets"):
        merge(tmp_path / "m")
    with pytest.raises(ConfigError, match="is named twice"):
        merge(tmp_path / "m", two[0], two[0])
    with pytest.raises(ConfigError, match="is one of the data sets to merge"):
        merge(two[0], *two)
    with pytest.raises(InputError, match="is no folder"):
        run(MergeConfig(output_prefix=tmp_path / "m", input=tmp_path / "absent"))
    (tmp_path / "m.bin").write_bytes(b"precious")
    with pytest.raises(InputError, match="exists already and has no manifest"):
        merge(tmp_path / "m", *two)
    assert (tmp_path / "m.bin").read_bytes() == b"precious"


def test_a_folder_of_another_tool_is_neither_used_nor_removed(two: tuple[Path, Path], tmp_path: Path) -> None:
    (mine := tmp_path / "m.parts").mkdir()
    (mine / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match=r"m.parts holds mine.txt and no plan.json of a run"):
        merge(tmp_path / "m", *two)
    mine.rename(tmp_path / "away")
    done = merge(tmp_path / "m", *two)
    (tmp_path / "away").rename(mine)
    assert merge(tmp_path / "m", *two) == done
    assert [file.name for file in mine.iterdir()] == ["mine.txt"]


def test_two_runs_at_one_prefix_are_refused(two: tuple[Path, Path], tmp_path: Path) -> None:
    with locked(tmp_path / "m.parts"), pytest.raises(ConfigError, match="another run is writing"):
        merge(tmp_path / "m", *two)
    merge(tmp_path / "m", *two)


def test_kill_9_at_several_moments_then_the_same_bytes(
    tmp_path: Path, tokenizer_folder: Path, start: Callable[..., subprocess.Popen[str]]
) -> None:
    large = [tmp_path / "p", tmp_path / "q"]
    for prefix in large:
        lengths = np.full(1000, 16_000, dtype=np.int32)
        (np.arange(16_000_000) % 400 + 1).astype("<u2").tofile(bin_file(prefix))
        with open(idx_file(prefix), "wb") as stream:
            write_index(stream, np.dtype("<u2"), [lengths])
    tool = ["merge_datasets.py", "--data-path", *large, "--adopt-data", "--tokenizer-model", tokenizer_folder, "--output-prefix"]
    _, err = (calm := start(*tool, tmp_path / "calm" / "m")).communicate(timeout=180)
    assert calm.returncode == 0, err
    output = tmp_path / "killed" / "m"
    for seen in (".parts/plan.json", ".bin.partial", ".idx"):
        process = start(*tool, output)
        deadline = time.monotonic() + 180
        while not Path(f"{output}{seen}").exists() and process.poll() is None:
            assert time.monotonic() < deadline, "gave up waiting"
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert not Path(f"{output}.manifest.json").exists(), "killed before the end"
    out, err = (last := start(*tool, output)).communicate(timeout=180)
    assert last.returncode == 0, err
    assert f"{output}: 2,000 documents" in out
    assert content(output) == content(tmp_path / "calm" / "m")
    assert not Path(f"{output}.parts").exists()
