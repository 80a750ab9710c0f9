"""Inputs: files, folders, patterns and saved data sets become files, each once, in order."""

import json
import os
import warnings
from pathlib import Path

import pytest

from megatron_instruct.corpora.parts import plan_parts, read_part
from megatron_instruct.corpora.read import Record, find_files, require_outside
from megatron_instruct.errors import ConfigError, InputError


def names(*inputs: Path | str) -> list[str]:
    return [file.name for file in find_files([str(given) for given in inputs])]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b'{"text": "x"}\n')


def test_inputs_are_files_folders_and_patterns(tmp_path: Path) -> None:
    touch(*(tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "b/a.parquet", "c.txt", "rejects.jsonl", "x.rejects.jsonl", "notes.md")))
    assert names(tmp_path) == ["a.jsonl", "a.jsonl.gz", "a.parquet", "c.txt"]
    assert names(tmp_path / "c.txt", tmp_path / "*.jsonl*") == ["c.txt", "a.jsonl", "a.jsonl.gz"]
    assert names(tmp_path / "**" / "*.parquet", tmp_path / "[b]") == ["a.parquet"]
    assert names(tmp_path / "rejects.jsonl") == ["rejects.jsonl"], "what is named itself is taken"
    for absent in ("absent.jsonl", "*.none", "notes.md"):
        with pytest.raises(InputError, match=absent.replace("*", r"\*")):
            find_files([str(tmp_path / absent)])


def test_a_file_is_read_once_however_often_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    (tmp_path / "link.jsonl").symlink_to("a.jsonl")
    monkeypatch.chdir(tmp_path)
    assert names("a.jsonl", "./a.jsonl", tmp_path / "a.jsonl", "link.jsonl", ".", "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert capsys.readouterr().out.startswith(f"Input files named twice are read once: a.jsonl, {tmp_path / 'a.jsonl'} (as a.jsonl), ")
    assert names("link.jsonl") == ["link.jsonl"]
    assert not capsys.readouterr().out


def test_links_to_folders_are_followed_without_end(tmp_path: Path) -> None:
    touch(tmp_path / "real" / "a.jsonl")
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "shard").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to(tmp_path / "corpus")
    assert names(tmp_path / "corpus") == ["a.jsonl"]


def test_a_pattern_takes_a_file_once_and_follows_no_link_to_a_folder_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    touch(*(tmp_path / "in" / name for name in ("a.jsonl", "b.jsonl", "x/a.jsonl", "x/.hidden/c.jsonl", "x/y/d.txt", "docs/README.md")))
    for number in range(12):  # each way through one of them would lead through all others
        (tmp_path / "in" / "x" / f"up{number}").symlink_to("..")
    (tmp_path / "elsewhere").mkdir()
    touch(tmp_path / "elsewhere" / "e.jsonl")
    (tmp_path / "in" / "z").symlink_to(tmp_path / "elsewhere")
    jsonl = ["a.jsonl", "b.jsonl", "a.jsonl", "e.jsonl"]
    assert names(tmp_path / "in" / "**" / "*.jsonl") == names(tmp_path / "i*" / "**" / "**" / "[a-e].jsonl") == jsonl
    assert names(tmp_path / "in" / "**") == names(tmp_path / "in") == names(tmp_path / "i?" / "**" / "**")
    assert names(tmp_path / "in" / "**" / "[yz]") == ["d.txt", "e.jsonl"]
    assert names(tmp_path / "in" / "**" / ".hidden" / "*") == ["c.jsonl"]
    assert not capsys.readouterr().out, "nothing was named twice"


def test_a_link_to_nothing_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    for given in (tmp_path, tmp_path / "b.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(InputError, match=r"b.jsonl is a link to gone.jsonl, which does not exist"):
            find_files([str(given)])


def test_hidden_names_of_a_folder_are_left_out(tmp_path: Path) -> None:
    touch(tmp_path / "a.jsonl", tmp_path / "._a.jsonl", tmp_path / ".cache" / "b.jsonl")
    assert names(tmp_path) == ["a.jsonl"]
    assert names(tmp_path / ".cache" / "b.jsonl", tmp_path / "._a.jsonl") == ["b.jsonl", "._a.jsonl"]


def test_a_folder_with_nothing_usable_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "x.jsonl" / "notes.md", tmp_path / "x.jsonl" / ".hidden.jsonl")
    for given in (tmp_path / "x.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(InputError, match=r"x.jsonl: the folder holds no file of a known suffix"):
            find_files([str(given)])
    touch(tmp_path / "x.jsonl" / "part-0.jsonl")
    assert names(tmp_path / "x.jsonl") == names(tmp_path / "*.jsonl") == ["part-0.jsonl"]


def test_glob_characters_in_names_are_letters_where_such_a_file_exists(tmp_path: Path) -> None:
    touch(tmp_path / "[1].jsonl", tmp_path / "1.jsonl", tmp_path / "a*.jsonl", tmp_path / "ab.jsonl", tmp_path / "[d]" / "x.jsonl")
    assert names(tmp_path / "[1].jsonl") == ["[1].jsonl"]
    assert names(tmp_path / "a*.jsonl") == ["a*.jsonl"]
    assert names(tmp_path / "[d]") == names(tmp_path / "[[]d]") == ["x.jsonl"]
    with pytest.raises(InputError, match=r"in a pattern, \[\[\] stands for a bracket"):
        find_files([str(tmp_path / "[d]" / "*.jsonl")])


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("data", "data"),
        ("data", "data/out"),
        ("data/", "data/deep/out"),
        (".", "out"),
        ("link", "data/out"),
        ("data", "link/out"),
        ("data/*.jsonl", "data"),
        ("link/*.jsonl", "data"),
        ("data/ex*", "data"),
        ("data/*", "data/out"),
        ("data/*", "data/deep/out"),
        ("data/out/*", "data/out"),
        ("data/**/*.jsonl", "data/out"),
        ("data/**/*.jsonl", "data"),
        ("data/**/examples.jsonl", "data/deep/out"),
        ("data/*/*/*.jsonl", "data"),
        ("d[a-b]ta/**", "data/out"),
        ("{root}/data/*", "data/out"),
    ],
)
def test_an_output_within_the_input_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, output: str) -> None:
    touch(tmp_path / "data" / "a.jsonl")
    (tmp_path / "link").symlink_to("data")
    monkeypatch.chdir(tmp_path)
    given = given.format(root=tmp_path)
    for inputs in ([given], ["elsewhere/*.jsonl", given]):
        with pytest.raises(ConfigError) as refusal:
            require_outside(inputs, Path(output), ["examples.jsonl", "shards/intake/texts.jsonl"])
        assert str(refusal.value).startswith(f"output {output} lies in the input {given}, so that ")


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("data", "out"),
        ("data", "data-out"),
        ("data/a.jsonl", "data"),
        ("data/a.jsonl", "data/out"),
        ("data/a*.jsonl", "data"),
        ("data/*.parquet", "data"),
        ("data/*.jsonl", "data/out"),
        ("data/**/a.jsonl", "data/out"),
        ("data/out/*.jsonl", "data"),
        ("data/deep", "data"),
        ("data", "data/.hidden/out"),
        ("data/**/*.jsonl", "data/.hidden/out"),
        ("*/a.jsonl", "data"),
        ("[d].jsonl", "."),
    ],
)
def test_an_output_beside_the_input_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, output: str) -> None:
    touch(tmp_path / "data" / "a.jsonl", tmp_path / "data" / "deep" / "a.jsonl", tmp_path / "[d].jsonl")
    monkeypatch.chdir(tmp_path)
    require_outside([given], Path(output), ["examples.jsonl", "shards/intake/texts.jsonl"])


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(InputError, match=r"a.jsonl is no regular file"):
        find_files([str(tmp_path / "a.jsonl")])


ROWS = [{"text": f"Entry {number}: ‘ü’", "n": number} for number in range(2500)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a data set, and one with two splits, as datasets saves them."""
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # datasets' progress display and its pandas
        data = datasets.Dataset.from_list(ROWS)
        data.save_to_disk(tmp_path / "one", num_shards=3)
        datasets.DatasetDict(train=data, test=data.select(range(5))).save_to_disk(tmp_path / "two")
        datasets.DatasetDict(train=data.select(range(7))).save_to_disk(tmp_path / "single")
    return tmp_path


def test_a_data_set_saved_by_datasets_is_read_in_its_order(saved: Path) -> None:
    (saved / "one" / "cache-0123.arrow").write_bytes(b"what datasets leaves beside its data")
    assert names(saved / "one") == [f"data-0000{shard}-of-00003.arrow" for shard in range(3)]
    for part_bytes in (1, 10_000, 1 << 30):
        parts = plan_parts(find_files([str(saved / "one")]), part_bytes=part_bytes)
        items = [item for part in parts for item in read_part(part)]
        assert [item.value for item in items if isinstance(item, Record)] == ROWS


def test_a_split_must_be_chosen_where_there_are_several(saved: Path) -> None:
    with pytest.raises(InputError, match=r"two holds the splits train, test; name those to be read, such as .*two/train"):
        find_files([str(saved / "two")])
    with pytest.raises(InputError, match=r"two holds the splits"):
        find_files([str(saved)])
    assert len(find_files([str(saved / "two" / "train"), str(saved / "two" / "test")])) == 2
    assert find_files([str(saved / "single")]) == [saved / "single" / "train" / "data-00000-of-00001.arrow"]


def test_a_saved_data_set_that_lacks_a_file_is_refused(saved: Path) -> None:
    (saved / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(InputError, match=r"state.json lists the file 'data-00001-of-00003.arrow', which is not there"):
        find_files([str(saved / "one")])
    (saved / "one" / "state.json").write_text(json.dumps({"_data_files": []}))
    with pytest.raises(InputError, match=r"'_data_files' is missing or empty"):
        find_files([str(saved / "one")])


def test_an_empty_input_and_a_name_that_no_manifest_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="an input is empty, as a variable that is not set would be"):
        require_outside([""], tmp_path / "out")
        find_files([""])
    Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.jsonl")).write_text("{}\n")
    with pytest.raises(InputError, match=r"caf\\udce9\.jsonl': the name is not UTF-8"):
        find_files([str(tmp_path)])


@pytest.mark.parametrize("pattern", ["**/*.jsonl", "*/*.jsonl", "b/*.jsonl", "[b]/a.jsonl"])
def test_a_folder_that_may_not_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str) -> None:
    touch(tmp_path / "a" / "a.jsonl", tmp_path / "b" / "a.jsonl")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b")  # the system manager may read everything
    with pytest.raises(InputError, match=r"the folder .*b may not be read; make it readable, or narrow the pattern"):
        find_files([str(tmp_path / pattern)])
    assert names(tmp_path / "a" / "*.jsonl", tmp_path / "a*" / "a.jsonl") == ["a.jsonl"]
