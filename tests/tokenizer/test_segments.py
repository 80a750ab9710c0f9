"""Segments that are encoded once: the ids of whole texts, whatever the text; the table under pressure; tokenizers that allow no cuts."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_instruct.errors import ConfigError
from megatron_instruct.tokenizer import Tokenizer, fast, fast_tokenizer, load_tokenizer, with_fast_backend
from megatron_instruct.tokenizer.fast_engine import fast_form
from megatron_instruct.tokenizer.flat import NO_TEXT
from megatron_instruct.tokenizer.segments import Cuts, SegmentTable, compiled, safe_cuts
from tests.tokenizer.test_fast import NASTY, mistral_v1

pytestmark = pytest.mark.skipif(
    compiled() is None and shutil.which("cc") is None,
    reason="no C compiler: the table of segments is not compiled, texts are encoded whole",
)
SMALLEST = 1 << 16
PARTS = [
    "a",
    "the",
    " ",
    "  ",
    "▁",
    "\n",
    "\t",
    "\x01",
    "\x00",
    "0",
    "42",
    "...",
    "</s>",
    "é",
    "e\u0301",
    "漢",
    "字",
    "😀",
    "Ω",
    "_x",
    "=" * 20,
]


@pytest.fixture(scope="module")
def library() -> Tokenizer:
    return load_tokenizer(mistral_v1())


@pytest.fixture(scope="module")
def content(library: Tokenizer) -> dict[str, Any]:
    return fast_form(library)


@pytest.fixture(scope="module")
def cuts(content: dict[str, Any]) -> Cuts:
    found = safe_cuts(content)
    assert found is not None
    return found


def table_of(cuts: Cuts, library: Tokenizer, slots: int = SMALLEST) -> SegmentTable:
    compiled_part = compiled()
    assert compiled_part is not None, "make setup compiles it"
    return SegmentTable(compiled_part, cuts, lambda text: np.array(library.encode(text)), slots=slots)


@pytest.fixture(scope="module")
def table(cuts: Cuts, library: Tokenizer) -> SegmentTable:
    return table_of(cuts, library)


def encode(table: SegmentTable, texts: list[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    return table.encode(texts, list(map(str.encode, texts)))


def assert_same(table: SegmentTable, library: Tokenizer, texts: list[str]) -> None:
    expected = library.encode_flat(texts)
    ids, lengths = encode(table, texts)
    assert lengths.tolist() == expected.lengths.tolist()
    assert np.array_equal(ids, expected.ids)


def test_gigatoken_encodes_by_segments_where_it_may(library: Tokenizer, tokenizer_folder: Path) -> None:
    assert fast_tokenizer(library)._segments is not None
    assert fast_tokenizer(load_tokenizer(tokenizer_folder))._segments is None


@settings(max_examples=500, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(PARTS) | st.text(max_size=8), max_size=30).map("".join), max_size=4))
def test_any_texts_get_the_ids_of_sentencepiece(table: SegmentTable, library: Tokenizer, texts: list[str]) -> None:
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]  # no lone surrogates: they are refused before
    assert_same(table, library, texts)


def test_texts_of_a_corpus_get_the_ids_of_sentencepiece(table: SegmentTable, library: Tokenizer, jargon: list[dict[str, str]]) -> None:
    for _ in range(2):  # with segments that are new, and with known ones
        assert_same(table, library, [*NASTY, *(row["text"] for row in jargon[::5])])


def test_no_piece_of_the_vocabulary_is_ever_cut(cuts: Cuts, library: Any) -> None:
    joins = np.frombuffer(cuts.joins, dtype=np.bool_).reshape(256, 256)
    for piece in library.spelling.pieces:
        if piece != NO_TEXT:
            content = np.frombuffer(piece, dtype=np.uint8)
            assert joins[content[:-1], content[1:]].all(), piece
    assert not joins[ord("e"), ord(" ")], "words are cut apart"


def test_the_form_says_how_many_bytes_each_id_spells_as_the_library_does(library: Any) -> None:
    fast_one = fast_tokenizer(library)
    assert fast_one._spelling.prefix == library.spelling.prefix
    told = [place for place, piece in enumerate(library.spelling.pieces) if piece != NO_TEXT]
    assert len(told) > 31_000 and len(fast_one._spelling.sizes) == library.vocab_size
    assert np.array_equal(fast_one._spelling.sizes[told], library.spelling.sizes[told])


def test_a_table_that_is_full_begins_anew(cuts: Cuts, library: Tokenizer) -> None:
    table = table_of(cuts, library)
    random = np.random.default_rng(0)
    for size in (3, 9, 30):  # in the slot, in the slot with its ids in a record, all in a record
        words = ["".join(map(chr, row)) for row in random.integers(0x61, 0x7B, (40_000, size))]
        for start in range(0, len(words), 10_000):
            assert_same(table, library, [" ".join(words[start : start + 10_000]), " ".join(words[:100])])


@pytest.mark.parametrize("text", ["a" * 100_000, " " * 5000 + "x", "漢字" * 3000, "ab\u0301" * 3000, "x" * 4096 + " y", "x" * 4095 + " y"])
def test_segments_longer_than_what_is_looked_at_together(table: SegmentTable, library: Tokenizer, text: str) -> None:
    for _ in range(2):
        assert_same(table, library, [text, "", text[1:] + "."])


def test_a_segment_longer_than_the_table(cuts: Cuts, library: Tokenizer) -> None:
    table = table_of(cuts, library)
    text = "z" * 1_000_000
    for _ in range(3):
        ids, lengths = encode(table, [text, "end"])
        assert lengths.tolist() == [len(library.encode(text)), len(library.encode("end"))]
        assert ids[-1] == library.encode("end")[-1]


@pytest.mark.parametrize("wrong", [[], [5], [1, 2, 3]])
def test_an_engine_that_does_not_keep_segments_apart_is_noticed(cuts: Cuts, library: Tokenizer, wrong: list[int]) -> None:
    calls = 0

    def counted(text: str) -> npt.NDArray[Any]:
        nonlocal calls
        calls += 1
        return np.array(library.encode(text) if calls == 1 else wrong)

    compiled_part = compiled()
    assert compiled_part is not None
    table = SegmentTable(compiled_part, cuts, counted, slots=SMALLEST)
    with pytest.raises(RuntimeError, match="--fast-tokenizer none"):
        encode(table, ["two words"])
    calls = 0
    assert encode(table, ["two words"])[0].tolist() == library.encode("two words"), "a table goes on after that"


def test_an_engine_that_does_not_keep_segments_apart_is_not_used(
    library: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = fast.FastTokenizer._encode
    monkeypatch.setattr(fast.FastTokenizer, "_encode", lambda self, text: found(self, text) if len(text) == 1 else found(self, text)[:3])
    backend = with_fast_backend(library, ["some words"])
    assert backend.tokenizer is library
    assert "gigatoken is not used, the slower library is: the engine's ids are not those of as many segments" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="is refused: the engine's ids"):
        with_fast_backend(library, ["some words"], choice="gigatoken")


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"added_tokens": [{"id": 5, "content": "x"}]},
        {"normalizer": {"type": "NFC"}},
        {"normalizer": None},
        *(
            {"model": {key: value}}
            for key, value in (("ignore_merges", True), ("dropout", 0.1), ("byte_fallback", False), ("type", "Unigram"))
        ),
        {"model": {"vocab": {"a": 0}}},
    ],
    ids=str,
)
def test_other_kinds_of_tokenizers_are_not_cut(content: dict[str, Any], change: dict[str, Any]) -> None:
    changed = {**content, **change, "model": {**content["model"], **change.get("model", {})}}
    assert safe_cuts(changed) is None


def test_a_vocabulary_that_joins_every_control_character_leaves_no_separator(content: dict[str, Any]) -> None:
    joined = {f"{chr(byte)}x": 40_000 + byte for byte in range(1, 0x20)}
    changed = {**content, "model": {**content["model"], "vocab": content["model"]["vocab"] | joined}}
    assert safe_cuts(changed) is None


def test_without_a_compiler_the_ids_are_the_same_and_the_remedy_is_said(
    library: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fast, "compiled", lambda: None)
    backend = with_fast_backend(library, NASTY, choice="gigatoken")
    assert "_segments.c is not compiled; run make setup" in capsys.readouterr().out
    assert np.array_equal(backend.tokenizer.encode_flat(NASTY).ids, library.encode_flat(NASTY).ids)
