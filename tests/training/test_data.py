"""Blends, splits, the order of samples, and data that are not what they were."""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_instruct.config import parse
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.models.batches import BatchPlan
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.settings.data import DataOptions

from .conftest import PRETRAIN, ROOT, preprocess, read_metrics

pytestmark = pytest.mark.filterwarnings("ignore")
"""megatron-core's imports warn about packages that a CPU has no use for."""


def flatten(plan: BatchPlan, iteration: int) -> list[int]:
    """The samples of one step over all data-parallel ranks, sorted."""
    ranks = [list(plan.microbatches(rank, start_iteration=iteration, iterations=1)) for rank in range(plan.data_parallel)]
    return sorted(sample for rank in ranks for microbatch in rank for sample in microbatch)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("data_parallel", [1, 2])
def test_a_step_holds_the_same_samples_whatever_the_layout_and_the_micro_batch(micro_batch_size: int, data_parallel: int) -> None:
    plan = BatchPlan(global_batch_size=8, micro_batch_size=micro_batch_size, data_parallel=data_parallel, train_iters=5)
    assert flatten(plan, 3) == list(range(24, 32))
    assert plan.num_microbatches == 8 // (micro_batch_size * data_parallel)


def test_a_resumed_run_goes_on_with_the_next_sample() -> None:
    plan = BatchPlan(global_batch_size=4, micro_batch_size=2, data_parallel=1, train_iters=5)
    whole = list(plan.microbatches(0, start_iteration=0, iterations=5))
    assert whole[6:] == list(plan.microbatches(0, start_iteration=3, iterations=2))


def test_blends_are_read_as_megatron_writes_them() -> None:
    from megatron_instruct.training.sources import parse_blend

    assert parse_blend(["a"], field="data_path") == (["a"], None)
    assert parse_blend(["a", "b"], field="data_path") == (["a", "b"], None)
    assert parse_blend(["0.3", "a", "7", "b"], field="data_path") == (["a", "b"], [0.3, 7.0])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["0.3", "a", "b"], "3 words"),
        (["0.3", "a", "x0", "b"], "the weight 'x0' of b"),
        (["0.3", "a", "0", "b"], "the weight '0' of b"),
        (["0.3", "a", "nan", "b"], "the weight 'nan' of b"),
        (["0.3", "a", "inf", "b"], "the weight 'inf' of b"),
        (["0.3", "0.4", "0.5", "b"], "'0.4' stands where a prefix must"),
        (["x0.3", "a", "x0.7", "b"], "'x0.3' is neither a number nor a data set"),
        (["0,3", "a", "0,7", "b"], "'0,3' is neither a number nor a data set"),
    ],
)
def test_a_broken_blend_is_an_error_that_names_the_word(words: list[str], message: str) -> None:
    from megatron_instruct.training.sources import parse_blend

    with pytest.raises(ConfigError, match=message):
        parse_blend(words, field="data_path")


def test_blends_in_files_are_those_of_the_command_line(data: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    from megatron_instruct.tokenizer import load_tokenizer
    from megatron_instruct.training.sources import find_sources

    tokenizer = load_tokenizer(tokenizer_folder)
    blend, plain, shares = ("0.3", str(data), "7", str(data)), tmp_path / "blend.txt", tmp_path / "shares.json"
    plain.write_text(f"0.3 {data}\n7\t{data}\n")
    shares.write_text(json.dumps({"train": [0.3, str(data), 7, str(data)], "valid": str(data), "test": f"1 {data}"}))
    of_shares = DataOptions(train_data_path=blend, valid_data_path=(str(data),), test_data_path=("1", str(data)))
    for in_file, given in (
        (DataOptions(data_args_path=plain), DataOptions(data_path=blend)),
        (DataOptions(per_split_data_args_path=shares), of_shares),
    ):
        found, wanted = find_sources(in_file, tokenizer), find_sources(given, tokenizer)
        for part in ("train", "valid", "test", "fingerprint", "test_fingerprint"):
            assert getattr(found, part) == getattr(wanted, part), part
    assert DataOptions(data_args_path=plain).is_divided and not DataOptions(per_split_data_args_path=shares).is_divided


@pytest.mark.parametrize(
    ("setting", "content", "message"),
    [
        ("data_args_path", None, r"data_args_path=.*args cannot be read"),
        ("data_args_path", " \n", r"data_args_path=.*args is empty"),
        ("data_args_path", "x0.3 a x0.7 b", r"data_args_path=.*: 'x0.3' is neither a number nor a data set"),
        ("per_split_data_args_path", "{", r"args is not valid JSON"),
        ("per_split_data_args_path", "[]", r"args must be a mapping with the keys train, valid, test"),
        ("per_split_data_args_path", '{"train": "a", "dev": "b"}', r"args must be a mapping with the keys train, valid, test"),
        ("per_split_data_args_path", '{"valid": "b"}', r"args, 'train' has no data to train on"),
        ("per_split_data_args_path", '{"train": {"a": 1}}', r"args, 'train': \{'a': 1\} is neither a text nor a list"),
        ("per_split_data_args_path", '{"train": ["0.3", "a", "b"]}', r"args, 'train' has 3 words"),
    ],
)
def test_a_file_that_holds_no_blend_is_named(
    setting: str, content: str | None, message: str, tmp_path: Path, tokenizer_folder: Path
) -> None:
    from megatron_instruct.tokenizer import load_tokenizer
    from megatron_instruct.training.sources import find_sources

    if content is not None:
        (tmp_path / "args").write_text(content)
    with pytest.raises((ConfigError, InputError), match=message):
        find_sources(DataOptions(**{setting: tmp_path / "args"}), load_tokenizer(tokenizer_folder))


@pytest.mark.parametrize("split", ["1", "1,2", "a,b,c", "0,0,0", "-1,2,3", "1,2,3,4"])
def test_a_broken_split_is_an_error(split: str) -> None:
    from megatron_instruct.training.index_file import shares_of

    with pytest.raises(ConfigError, match="three shares"):
        shares_of(split)


# What follows builds data sets as a run does, in a process group of one.


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import torch

    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def other_data(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    """A second, smaller data set."""
    folder = tmp_path_factory.mktemp("other-data")
    lines = (ROOT / "examples" / "quickstart" / "jargon.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "corpus.jsonl").write_text("".join(lines[600:700]), encoding="utf-8")
    return preprocess(folder / "corpus.jsonl", folder / "other", tokenizer_folder)


class Fed:
    """The data of a run, as its settings ask for them."""

    def __init__(self, words: list[str], tokenizer: Path) -> None:
        from megatron_instruct.models.batches import BatchPlan
        from megatron_instruct.tokenizer import load_tokenizer
        from megatron_instruct.training.data import build_datasets
        from megatron_instruct.training.sources import sources_of

        config = parse(PretrainConfig, words, prog="pretrain.py")
        assert config is not None
        self.sources = sources_of(config, load_tokenizer(tokenizer))
        batch = config.batch
        plan = BatchPlan(global_batch_size=batch.global_batch_size, micro_batch_size=1, data_parallel=1, train_iters=batch.train_iters)
        self.data = build_datasets(config, self.sources, plan)
        self.train, self.valid = self.data.train, self.data.valid
        self.samples = batch.train_iters * batch.global_batch_size

    def tokens(self, number: int) -> list[int]:
        found: list[int] = self.train[number]["tokens"].tolist()
        return found

    def pieces(self, number: int) -> list[tuple[str, int, int, int]]:
        from megatron_instruct.training.blends import locate

        dataset, place = locate(self.train, number)
        return [(str(dataset.dataset_path), *piece) for piece in dataset.pieces(place)]


Feed = Callable[..., Fed]


@pytest.fixture
def feed(group: None, flags: Callable[..., list[str]], tokenizer_folder: Path, tmp_path: Path) -> Feed:
    def make(*more: object, drop: tuple[str, ...] = ()) -> Fed:
        words = flags(tmp_path / "save", *more)
        for flag in drop:
            place = words.index(flag)
            del words[place : place + 2]
        return Fed(words, tokenizer_folder)

    return make


def tokens_of_documents(prefix: Path) -> Any:
    from megatron_instruct.training.index_file import read_index

    return read_index(str(prefix)).lengths


def test_strict_epochs_take_every_document_exactly_once_an_epoch(feed: Feed, other_data: Path) -> None:
    lengths = tokens_of_documents(other_data)
    total = int(lengths.sum())
    steps = 3 * total // 64 // 8
    fed = feed("--train-data-path", other_data, "--strict-epochs", "--train-iters", steps, drop=("--data-path", "--eval-interval"))
    first, second = math.ceil(total / 64), math.ceil(2 * total / 64)
    begins = np.concatenate([[0], np.cumsum(lengths)])
    for start, stop in ((0, first), (first, second)):
        taken = np.zeros(total, dtype=int)
        for number in range(start, stop):
            inputs = [begins[document] + offset + place for _, document, offset, length in fed.pieces(number) for place in range(length)]
            taken[inputs[:-1]] += 1  # the last token of a sample is there for its label
        # but for less than one sample on either side of the border between two epochs
        assert np.count_nonzero(taken == 1) > total - 2 * 64
        assert taken.max() <= 2
        assert taken.sum() == (stop - start) * 64
    assert [fed.pieces(number) for number in range(first)] != [fed.pieces(number) for number in range(first, 2 * first)]


def test_a_longer_run_of_strict_epochs_begins_with_the_samples_of_the_shorter_one(feed: Feed, data: Path, other_data: Path) -> None:
    blend = ("--data-path", "0.3", data, "0.7", other_data, "--strict-epochs")
    short, long = feed(*blend, "--train-iters", 400), feed(*blend, "--train-iters", 800)
    assert short.samples == 3200
    assert [short.pieces(number) for number in range(short.samples)] == [long.pieces(number) for number in range(short.samples)]
    assert short.tokens(3199) == long.tokens(3199)
    of_other = sum(short.pieces(number)[0][0] == str(other_data) for number in range(short.samples))
    assert of_other == pytest.approx(0.7 * short.samples, abs=1)
    assert of_other * 64 > 2 * tokens_of_documents(other_data).sum(), "the smaller data set goes through more than two epochs"


def test_without_strict_epochs_the_order_is_the_one_of_megatron_core(feed: Feed, data: Path, tokenizer_folder: Path) -> None:
    fed = feed("--train-iters", 90)
    assert type(fed.train).__name__ == "RoleWeightedDataset"


def test_a_phase_goes_on_where_the_phases_before_stopped_in_its_data_sets(feed: Feed, data: Path, other_data: Path) -> None:
    phases = (f"{{until: 10, data_path: {data}}}", f"{{data_path: 0.5 {data} 0.5 {other_data}}}")
    fed = feed("--phases", *phases, "--train-iters", 20, drop=("--data-path", "--eval-interval"))
    seen: dict[str, set[tuple[int, int]]] = {}
    for number in range(160):
        for prefix, document, start, length in fed.pieces(number):
            places = {(document, token) for token in range(start, start + length - 1)}
            assert not places & seen.setdefault(prefix, set()), f"sample {number} repeats tokens of {prefix}"
            seen[prefix] |= places
    of_other = [fed.pieces(number)[0][0] == str(other_data) for number in range(160)]
    assert sum(of_other[:80]) == 0
    assert sum(of_other[80:]) == 40


def test_phases_repeat_nothing_before_a_data_set_is_used_up_and_then_take_all_of_it_again(feed: Feed, other_data: Path) -> None:
    total = int(tokens_of_documents(other_data).sum())
    steps = total // 64 // 8
    phases = (f"{{until: {steps // 2}, data_path: {other_data}}}", f"{{data_path: {other_data}}}")
    once = feed("--phases", *phases, "--train-iters", steps, drop=("--data-path", "--eval-interval"))
    assert len({tuple(once.pieces(number)) for number in range(steps * 8)}) == steps * 8
    more = feed("--phases", *phases, "--train-iters", steps + steps // 2, drop=("--data-path", "--eval-interval"))
    first = math.ceil(total / 64)
    assert len({tuple(more.pieces(number)) for number in range(first)}) == first


def test_a_later_phase_can_change_without_a_trace_in_the_samples_before(feed: Feed, data: Path, other_data: Path) -> None:
    one = (f"{{until: 10, data_path: {data}}}", f"{{data_path: 0.5 {data} 0.5 {other_data}}}")
    other = (one[0], f"{{data_path: 0.1 {data} 0.9 {other_data}}}")
    runs = [feed("--phases", *phases, "--train-iters", 20, drop=("--data-path", "--eval-interval")) for phases in (one, other)]
    before, after = ([[run.pieces(number) for number in numbers] for run in runs] for numbers in (range(80), range(80, 160)))
    assert before[0] == before[1]
    assert after[0] != after[1]


def copy(data: Path, folder: Path) -> Path:
    for file in sorted(data.parent.glob(f"{data.name}*"), key=lambda file: file.name.endswith(".manifest.json")):
        shutil.copyfile(file, folder / file.name)
    return folder / data.name


def test_data_changed_in_place_under_the_same_name_and_size_are_refused_and_their_indices_not_used(
    feed: Feed, data: Path, tmp_path: Path
) -> None:
    prefix = copy(data, tmp_path)
    feed("--data-path", prefix)
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(1000)
        stream.write(b"\1\0")
    status = Path(f"{prefix}.manifest.json").stat()
    os.utime(f"{prefix}.bin", (status.st_atime, status.st_mtime - 100))  # a date that hides it
    with pytest.raises(InputError, match=r"\.bin is not what its manifest says: SHA-256 .* run preprocess_data\.py again, or restore"):
        feed("--data-path", prefix)


def test_foreign_data_rebuilt_at_the_same_prefix_and_size_do_not_meet_stale_indices(feed: Feed, data: Path, tmp_path: Path) -> None:
    prefix = copy(data, tmp_path)
    Path(f"{prefix}.manifest.json").unlink()
    before = feed("--data-path", prefix, "--adopt-data")
    folders = set((tmp_path / "save" / "cache").glob("*/"))
    again = feed("--data-path", prefix, "--adopt-data")
    assert set((tmp_path / "save" / "cache").glob("*/")) == folders
    assert again.sources.fingerprint == before.sources.fingerprint
    with open(f"{prefix}.idx", "r+b") as stream:  # the first two documents change places
        lengths = np.memmap(f"{prefix}.idx", dtype="<i4", mode="r", offset=34, shape=(2,)).copy()
        stream.seek(34)
        stream.write(lengths[::-1].tobytes())
    after = feed("--data-path", prefix, "--adopt-data")
    assert after.sources.fingerprint != before.sources.fingerprint
    assert set((tmp_path / "save" / "cache").glob("*/")) > folders
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.seek(1000)
        stream.write(b"\1\0")
    assert feed("--data-path", prefix, "--adopt-data").sources.fingerprint != after.sources.fingerprint
    with open(f"{prefix}.bin", "r+b") as stream:
        stream.write(b"\xff\xff")
    with pytest.raises(InputError, match=r"holds the token 65,535, and the tokenizer has \d+ ids.*tokenizer_model"):
        feed("--data-path", prefix, "--adopt-data")


def test_a_share_of_the_split_without_documents_is_refused(feed: Feed, data: Path) -> None:
    with pytest.raises(InputError, match=r"has no token in its validation share \(split='100,0,0' of 500 documents\).*valid_data_path"):
        feed("--split", "100,0,0")
    with pytest.raises(InputError, match=r"has no token in its training share \(split='0,1,0'"):
        feed("--split", "0,1,0")


def test_shares_that_nobody_asked_for_may_be_empty(feed: Feed, data: Path, other_data: Path) -> None:
    """Of 100 documents, the last thousandth is none; megatron-core would look for a token of it without end."""
    blend = ("--data-path", 0.5, data, 0.5, other_data)
    fed, usual = feed(*blend, "--split", "899,100,1"), feed(*blend, "--split", "90,10,0")
    assert [fed.tokens(number) for number in range(20)] == [usual.tokens(number) for number in range(20)]
    assert fed.data.test is None and "has no token in its test share (split='899,100,1' of 500 documents)" in str(fed.sources.untested)
    assert usual.data.test is None and usual.sources.untested is None
    alone = feed("--data-path", other_data, "--split", "997,3,0", drop=("--eval-interval",))
    assert alone.valid is None and len(alone.train) >= alone.samples


def test_prefixes_without_weights_that_end_before_the_run_are_refused(feed: Feed, data: Path, other_data: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"train_iters=9000: .*72,000 sequences of 64 tokens.*taken once\. Give weights.*lower train_iters"
    ):
        feed("--data-path", data, other_data, "--train-iters", 9000)
    assert len(feed("--data-path", data, other_data, "--train-iters", 900, "--strict-epochs").train) >= 7200


def test_a_broken_index_is_refused(feed: Feed, data: Path, tmp_path: Path) -> None:
    prefix = copy(data, tmp_path)
    Path(f"{prefix}.manifest.json").unlink()
    for content, message in (
        (b"nothing", "is no index of a Megatron data set"),
        (Path(f"{data}.idx").read_bytes()[:200], "it is cut short"),
    ):
        Path(f"{prefix}.idx").write_bytes(content)
        with pytest.raises(InputError, match=message):
            feed("--data-path", prefix, "--adopt-data")
    shutil.copyfile(f"{data}.idx", f"{prefix}.idx")
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"\0\0")
    with pytest.raises(InputError, match="they do not belong together"):
        feed("--data-path", prefix, "--adopt-data")


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_two_machines_build_one_cache_where_they_share_it_and_else_each_its_own(
    shared: bool, flags: Callable[..., list[str]], one: dict[str, Path], tmp_path: Path
) -> None:
    """Two torchrun nodes on this machine; a relative path is a folder of each node's own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cache = tmp_path / "shared" if shared else Path("cache")
    words = flags(tmp_path / "save", "--data-cache-path", cache)
    nodes = []
    for rank in range(2):
        folder = tmp_path / f"node-{rank}"
        folder.mkdir()
        launcher = ["--nnodes", "2", "--node-rank", str(rank), "--master-addr", "localhost", "--master-port", str(port)]
        command = [sys.executable, "-m", "torch.distributed.run", *launcher, "--nproc-per-node", "1", str(PRETRAIN), *words]
        nodes.append(subprocess.Popen(command, cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True))
    for node in nodes:
        _, errors = node.communicate(timeout=300)
        assert node.returncode == 0, errors[-3000:]
    built = sorted(path.parent.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*train-shuffle_index.npy"))
    assert built == (["shared"] if shared else ["node-0/cache", "node-1/cache"])
    assert not list(tmp_path.rglob(".seen-*"))
    losses, expected = ([row[1] for row in read_metrics(folder).training] for folder in (tmp_path / "save", one["reference"]))
    assert losses == pytest.approx(expected, rel=1e-5)
