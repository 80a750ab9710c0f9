"""Flat encoding: the ids of single texts in one array, and tokens mapped to the bytes of the ORIGINAL text."""

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from megatron_instruct.tokenizer import Tokenizer, load_tokenizer, token_dtype

TEXTS = [
    "The hacker found a bug in the kernel.",
    "Ärger mit 漢字 und 😀👩‍👩‍👧 – “quotes”",
    "cafe\u0301 e\u0323\u0307 \u1e9b\u0323",
    "",
    "  two  spaces \t tab\nline  ",
    "already ▁ here ▁▁x",
    "</s> <s> <|endoftext|> [INST]",
    "ﬁne ﬀ ½ Ⅸ ＡＢＣ",
    "\0null\x07\ufeffbom\u200bzero\u2028",
    "カタカナ ﾊﾝｶｸ 한국어 العربية ไทย",
    "x",
    " ",
    "<0x0A><0xE6><unk>",
] * 3
TRAINING = [text for text in TEXTS if text.strip()] * 20
BYTE_EXACT = {"byte-level", "metaspace", "mistral-v1", "words"}
"""Kinds whose tokens spell all of a text's bytes, white space at its ends aside."""


def save(model: tokenizers.Tokenizer, trainer: object, folder: Path) -> Path:
    model.train_from_iterator(TRAINING, trainer)
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return folder


def bpe(folder: Path, *, normalizer: object = None) -> Path:
    """A byte-level BPE tokenizer."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    if normalizer is not None:
        model.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return save(model, trainers.BpeTrainer(vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False), folder)


def metaspace(folder: Path) -> Path:
    """A BPE tokenizer as converters make it of a sentencepiece model: a prepended "▁", and a token for each byte."""
    model = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    model.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=tokens, limit_alphabet=40, show_progress=False)
    save(model, trainer, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"] = content["added_tokens"][:2]  # bytes are ordinary pieces
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def word_pieces(folder: Path) -> Path:
    """A WordPiece tokenizer that lowers case, strips accents and drops white space, as BERT's does."""
    model = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer()
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return save(model, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]", "</s>"], show_progress=False), folder)


def pieces(prefix: Path, **settings: object) -> Path:
    """A sentencepiece model."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING), model_prefix=str(prefix), hard_vocab_limit=False, minloglevel=2, **settings
    )
    return prefix.with_suffix(".model")


def mistral_v1() -> Path:
    spec = importlib.util.find_spec("mistral_common")
    if spec is None or spec.origin is None:
        pytest.skip("mistral-common is not installed")
    return Path(spec.origin).parent / "data" / "tokenizer.model.v1"


MAKERS: dict[str, Callable[[Path], Path]] = {
    "byte-level": lambda folder: bpe(folder / "t"),
    "byte-level nfkc": lambda folder: bpe(folder / "t", normalizer=normalizers.NFKC()),
    "byte-level nfd": lambda folder: bpe(folder / "t", normalizer=normalizers.NFD()),
    "metaspace": lambda folder: metaspace(folder / "t"),
    "word pieces": lambda folder: word_pieces(folder / "t"),
    "words": lambda folder: pieces(
        folder / "m",
        vocab_size=500,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.98,
    ),
    "nfkc, no bytes": lambda folder: pieces(folder / "m", vocab_size=300, model_type="unigram", character_coverage=0.98),
    "lower case": lambda folder: pieces(
        folder / "m", vocab_size=400, model_type="bpe", normalization_rule_name="nfkc_cf", byte_fallback=True
    ),
    "mistral-v1": lambda folder: mistral_v1(),
}


@pytest.fixture(scope="module", params=sorted(MAKERS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def tokenizer(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(MAKERS[kind](tmp_path_factory.mktemp("t")))


@pytest.fixture(scope="module")
def mistral() -> Tokenizer:
    return load_tokenizer(mistral_v1())


def split(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[list[int], list[int]]]:
    """Return the ids and ends of each text."""
    flat = tokenizer.encode_flat(texts, ends=True)
    assert flat.ends is not None and len(flat.ends) == len(flat.ids) and flat.ends.dtype == np.int64
    if not texts:
        return []
    cuts = np.cumsum(flat.lengths)[:-1]
    rows = zip(np.split(flat.ids, cuts), np.split(flat.ends, cuts), strict=True)
    return [(ids.tolist(), ends.tolist()) for ids, ends in rows]


def test_ids_are_those_of_single_texts_in_the_dtype_of_a_data_set(tokenizer: Tokenizer) -> None:
    flat = tokenizer.encode_flat(TEXTS)
    assert flat.ends is None
    assert (flat.ids.dtype, flat.lengths.dtype) == (token_dtype(tokenizer.vocab_size), np.int32)
    assert flat.lengths.tolist() == [len(tokenizer.encode(text)) for text in TEXTS]
    assert flat.ids.tolist() == [number for text in TEXTS for number in tokenizer.encode(text)]
    assert split(tokenizer, TEXTS) == [split(tokenizer, [text])[0] for text in TEXTS], "the neighbours of a text change nothing"


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_no_text_and_empty_texts_give_empty_arrays(tokenizer: Tokenizer, texts: list[str]) -> None:
    flat = tokenizer.encode_flat(texts, ends=True)
    assert flat.lengths.tolist() == [0] * len(texts)
    assert flat.ends is not None and (len(flat.ids), len(flat.ends)) == (0, 0)
    assert (flat.ids.dtype, flat.lengths.dtype, flat.ends.dtype) == (token_dtype(tokenizer.vocab_size), np.int32, np.int64)


def test_tokens_share_out_the_whole_text(tokenizer: Tokenizer) -> None:
    for text, (ids, ends) in zip(TEXTS, split(tokenizer, TEXTS), strict=True):
        assert ends == sorted(ends)
        assert ends[-1:] == ([len(text.encode())] if ids else [])


def test_added_sizes_and_compared_bytes_give_the_same_ends(tokenizer: Tokenizer) -> None:
    """Where a tokenizer is known to leave texts as they are, sizes are added up; the slower way compares every byte."""
    fast = tokenizer.encode_flat(TEXTS, ends=True).ends
    slow_spelling = dataclasses.replace(tokenizer.spelling, prefix=None)  # type: ignore[attr-defined]
    slow = slow_spelling.with_places(TEXTS, tokenizer.encode_flat(TEXTS), tokenizer.ends_of).ends  # type: ignore[attr-defined]
    assert fast is not None and fast.tolist() == slow.tolist()


@pytest.mark.parametrize("kind", sorted(BYTE_EXACT))
def test_unchanged_texts_are_known_to_be_unchanged(kind: str, tmp_path: Path) -> None:
    expected = {"byte-level": 0, "metaspace": 1, "mistral-v1": 1, "words": 1}
    assert load_tokenizer(MAKERS[kind](tmp_path)).spelling.prefix == expected[kind]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", sorted(BYTE_EXACT))
def test_the_bytes_of_a_token_are_the_text_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(MAKERS[kind](tmp_path))
    for text, (ids, ends) in zip(TEXTS, split(tokenizer, TEXTS), strict=True):
        content = text.encode()
        for place in range(len(ids)):
            before = content[: ends[place]]
            if before == before.decode(errors="ignore").encode() and "▁" not in text:  # a whole number of characters
                assert tokenizer.decode(ids[: place + 1]).lstrip(" ") == before.decode().lstrip(" ")


def test_offsets_of_a_normalized_text_are_those_of_the_original(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(bpe(tmp_path / "t", normalizer=normalizers.NFKC()))
    text = "aﬁ½b漢Ａ"  # "ﬁ" becomes two letters, "½" three, "Ａ" one of another width
    ids, ends = split(tokenizer, [text])[0]
    starts = [0, *ends[:-1]]
    of_b = next(ids.index(number) for number in tokenizer.encode("b") if number in ids)
    assert text.encode()[starts[of_b] : ends[of_b]] == b"b"
    assert ends[-1] == len(text.encode())


def test_bytes_of_one_character_are_told_apart(tmp_path: Path) -> None:
    for kind in ("metaspace", "words"):
        (tmp_path / kind).mkdir()
        tokenizer = load_tokenizer(MAKERS[kind](tmp_path / kind))
        ids, ends = split(tokenizer, ["a𝄞"])[0]
        assert ends[-4:] == [2, 3, 4, 5], (kind, ids)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=4))
def test_any_text_is_covered_by_its_tokens(mistral: Tokenizer, texts: list[str]) -> None:
    for text, (ids, ends) in zip(texts, split(mistral, texts), strict=True):
        assert ids == mistral.encode(text)
        assert ends == sorted(ends) and (ends[-1] if ends else 0) == len(text.encode())
