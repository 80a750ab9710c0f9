"""tokenizer.json of Hugging Face, through the tokenizers library.

Comes in: the file. Goes out: a `Tokenizer`. Does not know: transformers, chat templates.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from megatron_instruct.errors import InputError, MissingPackageError
from megatron_instruct.files import read_json
from megatron_instruct.tokenizer.flat import NO_TEXT, Ends, FlatTokens, Spelling, ends_of_characters, flat_tokens, piece_bytes
from megatron_instruct.tokenizer.segments import PREPENDED
from megatron_instruct.tokenizer.special_tokens import eod_id, fingerprint, generation_eos, special_names


class HuggingFaceTokenizer:
    """tokenizer.json through the tokenizers library."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, file: Path, eod_token: str | None) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise MissingPackageError("tokenizers", extra="data", purpose=f"the tokenizer {file}") from error
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise InputError(f"{file} is not a readable tokenizer: {error}") from error
        self.file = file
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        names = special_names(file.parent)
        from_generation = generation_eos(file.parent)
        token = eod_token or names.get("eos_token")
        if token is None and from_generation is not None:
            token = self._tokenizer.id_to_token(from_generation)
        self.vocab_size = max(vocabulary.values()) + 1
        self.eod = eod_id(vocabulary, token, file)
        bos = names.get("bos_token")
        self.bos: int | None = vocabulary.get(bos) if bos else None
        content: dict[str, Any] = read_json(file)
        unknown = content["model"].get("unk_token")
        self._unknown: str | None = unknown if isinstance(unknown, str) else None
        self._is_byte_level, self._prefix = _is_byte_level(content), _prefix(content)
        self.fingerprint = fingerprint(_what_decides_ids(content), self.eod)

    @cached_property
    def spelling(self) -> Spelling:
        """Which bytes each id spells; made when it is first asked for, since it takes as long as the rest of the loading."""
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        letters = byte_letters() if self._is_byte_level else {}
        pieces = _spelled_pieces(vocabulary, self.vocab_size, letters, unknown=self._unknown)
        return Spelling.of(pieces, prefix=self._prefix)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_flat(self, texts: Sequence[str], *, ends: bool = False) -> FlatTokens:
        flat = flat_tokens(self.encode_batch(texts), self.vocab_size)
        return self.spelling.with_places(texts, flat, self.ends_of) if ends else flat

    def ends_of(self, text: str) -> Ends:
        return ends_of_characters(text, self._tokenizer.encode(text, add_special_tokens=False).offsets)

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text


def _steps(content: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the normalizers or pre-tokenizers of a tokenizer, those of a sequence one by one."""
    step: dict[str, Any] | None = content.get(key)
    if step is None:
        return []
    parts: list[dict[str, Any]] = step[{"normalizer": "normalizers"}.get(key, "pretokenizers")] if step["type"] == "Sequence" else [step]
    return parts


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Say whether the vocabulary writes each byte as one of 256 letters, as GPT-2's does."""
    return '"ByteLevel"' in json.dumps([content.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")])


def _prefix(content: dict[str, Any]) -> int | None:
    """Return the bytes put before a text that is changed in no other way; None where it is not certain that there is no other."""
    if content["model"].get("type") != "BPE":
        return None
    normalizers, cuts = _steps(content, "normalizer"), _steps(content, "pre_tokenizer")
    kinds = [cut["type"] for cut in cuts]
    if not normalizers and kinds[-1:] == ["ByteLevel"] and {*kinds} <= {"ByteLevel", "Split", "Digits"}:
        return None if any(cut.get("add_prefix_space") for cut in cuts) else 0
    added = any(not token["special"] for token in content.get("added_tokens") or ())  # each would begin another prefixed piece of text
    return 1 if normalizers == PREPENDED and not cuts and not added else None


def _spelled_pieces(
    vocabulary: Mapping[str, int], vocab_size: int, letters: Mapping[str, int] = MappingProxyType({}), *, unknown: str | None
) -> list[bytes]:
    """Return the bytes that each id spells, as far as the vocabulary says so. letters: of a byte-level vocabulary; else none."""
    pieces = [NO_TEXT] * vocab_size
    for token, number in vocabulary.items():
        if letters and all(letter in letters for letter in token):
            pieces[number] = bytes(letters[letter] for letter in token)
        else:
            pieces[number] = piece_bytes(token)
    if unknown is not None and unknown in vocabulary:
        pieces[vocabulary[unknown]] = NO_TEXT
    return pieces


def byte_letters() -> dict[str, int]:
    """Return the letter that GPT-2's byte-level vocabulary writes for each byte: itself where it is printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _what_decides_ids(content: dict[str, Any]) -> bytes:
    """Return tokenizer.json in one canonical form, without what is never used here: padding, truncation, special tokens added around.

    Merges are written as "a b" by older and as ["a", "b"] by newer versions of the library; both mean the same.
    """
    content = {key: value for key, value in content.items() if key not in ("version", "truncation", "padding", "post_processor")}
    merges = content["model"].get("merges")
    if merges:
        content["model"] = {**content["model"], "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]}
    return json.dumps(content, sort_keys=True).encode()
