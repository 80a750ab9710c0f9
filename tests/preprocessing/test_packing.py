"""Order and length of documents: shuffled, packed by best fit, limited; every token accounted for, whatever the workers and parts."""

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_instruct.errors import ConfigError
from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing import merge
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.layout import shuffled
from megatron_instruct.preprocessing.packing import pack
from megatron_instruct.records import ROLE_CODES

Preprocess = Callable[..., dict[str, Manifest]]
Outputs = Callable[[Path], dict[str, bytes]]
PADDING = ROLE_CODES["padding"]


def documents_of(prefix: Path) -> list[tuple[int, ...]]:
    dataset = IndexedDataset(prefix)
    return [tuple(dataset.document(number).tolist()) for number in range(len(dataset))]


def best_fit(lengths: list[int], size: int) -> list[int]:
    """The rooms left by best fit of pieces, longest first, one piece after another."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms[rooms.index(min(fitting))] -= length
        else:
            rooms.append(size - length)
    return sorted(rooms)


def test_packing_is_best_fit_of_the_longest_first() -> None:
    random = np.random.default_rng(1)
    for _ in range(200):
        size = int(random.integers(2, 40))
        lengths = random.integers(1, 3 * size, int(random.integers(0, 120))).astype(np.int32)
        packs = pack(lengths, size)
        pieces = [piece for length in lengths.tolist() for piece in [size] * (length // size) + [length % size] * (length % size > 0)]
        used = np.bincount(packs.packs, weights=packs.lengths, minlength=packs.count).astype(int)
        assert sorted((size - used).tolist()) == best_fit(pieces, size)
        assert Counter(packs.lengths.tolist()) == Counter(pieces)
        assert packs.cut == int((lengths > size).sum())
        covered = np.bincount(packs.documents, weights=packs.lengths, minlength=len(lengths))
        assert covered.tolist() == lengths.tolist()
        firsts = [int(packs.documents[packs.packs == number].min()) for number in range(packs.count)]
        assert firsts == sorted(firsts), "packs come in the order of their first documents"


def test_a_million_documents_are_packed_in_seconds() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 1.2, 1_000_000), 1, 100_000).astype(np.int32)
    start = time.monotonic()
    packs = pack(lengths, 4096)
    assert time.monotonic() - start < 20
    assert int(packs.lengths.sum()) / (packs.count * 4096) > 0.999


def test_documents_that_fit_stay_whole_and_only_ends_are_padded(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, preprocess: Preprocess, capsys: pytest.CaptureFixture[str]
) -> None:
    size = 150
    preprocess(corpus, tmp_path / "plain" / "a", tokenizer_folder, append_eod=True)
    manifest = preprocess(corpus, tmp_path / "packed" / "a", tokenizer_folder, append_eod=True, pack_sequence_length=size)["text"]
    before, packs = documents_of(tmp_path / "plain" / "a_text_document"), documents_of(tmp_path / "packed" / "a_text_document")
    assert {len(one) for one in packs} == {size}
    roles = np.fromfile(tmp_path / "packed" / "a_text_document.roles", dtype=np.uint8).reshape(-1, size)
    padding = roles == PADDING
    assert (np.diff(padding.astype(int), axis=1) >= 0).all(), "padding is at the end of a pack"
    assert all(token == 0 for tokens, pads in zip(packs, padding, strict=True) for token in itertools.compress(tokens, pads))
    pieces: Counter[tuple[int, ...]] = Counter()
    for tokens, pads in zip(packs, padding, strict=True):
        text = tokens[: size - int(pads.sum())]
        ends = [place + 1 for place, token in enumerate(text) if token == 0]
        pieces.update(text[left:right] for left, right in itertools.pairwise([0, *ends, *([len(text)] if text[-1] else [])]))
    assert pieces == Counter(one[start : start + size] for one in before for start in range(0, len(one), size))
    packing = manifest.facts["packing"]
    assert packing["cut_documents"] == sum(len(one) > size for one in before) > 0
    assert packing["fill_percent"] == round(100 * sum(map(len, before)) / (size * len(packs)), 3) > 95
    assert packing["padding_tokens"] == int(padding.sum()) == manifest.facts["roles"]["tokens"]["padding"]
    assert (
        f"Packed 400 documents into {len(packs):,} sequences of 150 tokens: {packing['fill_percent']} % filled" in capsys.readouterr().out
    )


@pytest.mark.filterwarnings("ignore")  # torch 2.13 and megatron-core 0.19 while they are imported
def test_sample_i_of_megatrons_gpt_dataset_is_pack_i(tmp_path: Path, corpus: Path, tokenizer_folder: Path, preprocess: Preprocess) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset as CoreDataset
    from megatron.core.datasets.utils import Split

    size = 64
    preprocess(corpus, tmp_path / "a", tokenizer_folder, append_eod=True, pack_sequence_length=size)
    prefix = str(tmp_path / "a_text_document")
    (tmp_path / "cache").mkdir()
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=size,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=str(tmp_path / "cache"),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        tokenizer=type("Ids", (), {"eod": 0, "pad": -1, "vocab_size": 500, "unique_identifiers": {}})(),
        mid_level_dataset_surplus=0.005,
    )
    packs = CoreDataset(prefix)
    dataset = GPTDataset(packs, prefix, np.arange(len(packs), dtype=np.int32), len(packs) - 1, Split.train, config)
    assert dataset.sample_index[:, 1].max() == 0, "every sample starts where a pack starts"
    for number in range(len(packs) - 1):
        place = int(dataset.shuffle_index[number])
        own, following = packs[dataset.document_index[place]], packs[dataset.document_index[place + 1]]
        sample = dataset[number]
        assert sample["tokens"].tolist() == own.tolist()
        assert sample["labels"].tolist() == [*own[1:].tolist(), int(following[0])], "the last label is the next pack's first token"
    assert isinstance(sample["tokens"], torch.Tensor)


@pytest.mark.parametrize("settings", [{"shuffle_seed": 5}, {"pack_sequence_length": 100}, {"shuffle_seed": 5, "pack_sequence_length": 100}])
def test_order_and_packs_depend_neither_on_workers_nor_on_parts(
    tmp_path: Path, corpus: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess, outputs: Outputs, settings: dict[str, Any]
) -> None:
    inputs = [corpus, examples]
    preprocess(inputs, tmp_path / "one" / "a", tokenizer_folder, append_eod=True, partitions=1, **settings)
    preprocess(inputs, tmp_path / "many" / "a", tokenizer_folder, append_eod=True, partitions=13, workers=2, **settings)
    assert outputs(tmp_path / "one") == outputs(tmp_path / "many")


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000, 10**6])
@pytest.mark.parametrize("settings", [{"shuffle_seed": 5}, {"pack_sequence_length": 40}, {"shuffle_seed": 6, "pack_sequence_length": 500}])
def test_the_result_does_not_depend_on_how_much_is_moved_at_once(
    tmp_path: Path,
    corpus: Path,
    tokenizer_folder: Path,
    preprocess: Preprocess,
    outputs: Outputs,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    chunk: int,
) -> None:
    preprocess(corpus, tmp_path / "usual" / "a", tokenizer_folder, append_eod=True, **settings)
    monkeypatch.setattr(merge, "_CHUNK_TOKENS", chunk)
    preprocess(corpus, tmp_path / "other" / "a", tokenizer_folder, append_eod=True, **settings)
    assert outputs(tmp_path / "usual") == outputs(tmp_path / "other")


def test_shuffling_moves_whole_documents_with_their_roles_and_keeps_keys_together(
    tmp_path: Path, corpus: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess
) -> None:
    preprocess([corpus, examples], tmp_path / "plain" / "a", tokenizer_folder, append_eod=True)
    preprocess([corpus, examples], tmp_path / "mixed" / "a", tokenizer_folder, append_eod=True, shuffle_seed=3, partitions=7)

    def with_roles(prefix: Path) -> list[tuple[tuple[int, ...], bytes]]:
        ends = np.cumsum(IndexedDataset(prefix).sequence_lengths)
        roles = prefix.with_name(prefix.name + ".roles").read_bytes()
        return [(one, roles[end - len(one) : end]) for one, end in zip(documents_of(prefix), ends.tolist(), strict=True)]

    before, after = with_roles(tmp_path / "plain" / "a_text_document"), with_roles(tmp_path / "mixed" / "a_text_document")
    assert after != before
    assert sorted(after) == sorted(before)
    preprocess(corpus, tmp_path / "keys" / "a", tokenizer_folder, json_keys=("text", "title"), shuffle_seed=3)
    preprocess(corpus, tmp_path / "title" / "a", tokenizer_folder, json_keys=("title",), shuffle_seed=3)
    assert documents_of(tmp_path / "keys" / "a_title_document") == documents_of(tmp_path / "title" / "a_title_document")


def test_the_order_is_a_fair_draw_and_another_seed_draws_another() -> None:
    assert sorted(shuffled(10_000, 1)) == list(range(10_000))
    assert shuffled(10, 1).tolist() == [9, 2, 4, 8, 0, 5, 3, 6, 1, 7], "the order of a seed never changes"
    assert shuffled(10, 2).tolist() != shuffled(10, 1).tolist()
    firsts = Counter(int(shuffled(5, seed)[0]) for seed in range(5_000))
    assert all(900 < firsts[number] < 1_100 for number in range(5))


def test_documents_that_are_too_short_or_too_long_are_set_aside(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, preprocess: Preprocess, outputs: Outputs
) -> None:
    preprocess(corpus, tmp_path / "all" / "a", tokenizer_folder)
    before = documents_of(tmp_path / "all" / "a_text_document")
    limits = {"min_document_tokens": 60, "max_document_tokens": 200, "long_documents": "reject", "append_eod": True}
    manifest = preprocess(corpus, tmp_path / "limited" / "a", tokenizer_folder, **limits)["text"]
    kept = [one for one in before if 60 <= len(one) <= 200]
    assert documents_of(tmp_path / "limited" / "a_text_document") == [(*one, 0) for one in kept]
    short, long = sum(len(one) < 60 for one in before), sum(len(one) > 200 for one in before)
    assert min(short, long) > 0
    assert manifest.rejected == {"too long": long, "too short": short}
    assert manifest.counts["documents_in"] == 400 == manifest.counts["documents"] + short + long
    rejects = [json.loads(line) for line in outputs(tmp_path / "limited")["a_text_document.rejects.jsonl"].splitlines()]
    assert [row["line"] for row in rejects] == [number for number, one in enumerate(before, 1) if not 60 <= len(one) <= 200]
    assert json.loads(rejects[0]["raw"])["id"] == "0"
    preprocess(corpus, tmp_path / "parts" / "a", tokenizer_folder, partitions=11, **limits)
    assert outputs(tmp_path / "parts") == outputs(tmp_path / "limited")


def test_long_documents_are_split_into_the_fewest_nearly_equal_ones(
    tmp_path: Path, corpus: Path, examples: Path, tokenizer_folder: Path, preprocess: Preprocess
) -> None:
    inputs = [corpus, examples]
    preprocess(inputs, tmp_path / "all" / "a", tokenizer_folder)
    manifest = preprocess(inputs, tmp_path / "split" / "a", tokenizer_folder, max_document_tokens=100)["text"]
    expected: list[tuple[int, ...]] = []
    for one in documents_of(tmp_path / "all" / "a_text_document"):
        count = -(-len(one) // 100)
        lengths = [len(one) // count + (place < len(one) % count) for place in range(count)]
        ends = list(itertools.accumulate(lengths))
        expected += [one[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    assert documents_of(tmp_path / "split" / "a_text_document") == expected
    assert (manifest.counts["documents_kept"], manifest.counts["documents"], manifest.rejected) == (520, len(expected), {})
    for suffix in ("bin", "roles"):
        name = f"a_text_document.{suffix}"
        assert (tmp_path / "split" / name).read_bytes() == (tmp_path / "all" / name).read_bytes(), "only bounds were added"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"min_document_tokens": 0}, "min_document_tokens=0 must be at least 1"),
        ({"max_document_tokens": 0}, "max_document_tokens=0 must be at least 1"),
        ({"min_document_tokens": 9, "max_document_tokens": 8}, "no document would be left"),
        ({"long_documents": "reject"}, "long_documents=reject needs max_document_tokens"),
        ({"lang": "german"}, "lang=german is that of sentences to be split; add --split-sentences"),
        ({"pack_sequence_length": 1}, "pack_sequence_length=1 must be at least 2"),
        ({"shuffle_seed": -1}, "shuffle_seed=-1 must be at least 0"),
        ({"split_sentences": True, "pack_sequence_length": 8}, "give one"),
        ({"split_sentences": True, "max_document_tokens": 8}, "long-documents reject"),
    ],
)
def test_settings_that_contradict_are_refused(
    tmp_path: Path, corpus: Path, tokenizer_folder: Path, preprocess: Preprocess, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        preprocess(corpus, tmp_path / "a", tokenizer_folder, **settings)
