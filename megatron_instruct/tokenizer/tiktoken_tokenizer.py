"""Tokenizers of the tiktoken family, through tiktoken itself.

Comes in: a `Vocabulary`. Goes out: a `Tokenizer`. Does not know: files.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.errors import InputError, MissingPackageError
from megatron_instruct.tokenizer.flat import NO_TEXT, Ends, FlatTokens, Spelling, flat_tokens
from megatron_instruct.tokenizer.special_tokens import eod_id, fingerprint
from megatron_instruct.tokenizer.tiktoken_files import Vocabulary


class TikTokenizer:
    """Byte-pair encoding by ranks; no special token is ever read from text, since tiktoken is told of none."""

    kind = "TikTokenizer"

    def __init__(self, file: Path, vocabulary: Vocabulary, eod_token: str | None) -> None:
        try:
            import tiktoken
        except ImportError as error:
            raise MissingPackageError("tiktoken", extra="data", purpose=f"the tokenizer {file}") from error
        special = vocabulary.special_tokens
        try:
            self._encoding = tiktoken.Encoding(
                name=file.name, pat_str=vocabulary.pattern, mergeable_ranks=dict(vocabulary.ranks), special_tokens={}
            )
        except ValueError as error:
            raise InputError(f"{file}: tiktoken takes neither its tokens nor its pattern {vocabulary.pattern!r}: {error}") from error
        self.vocab_size = max(*vocabulary.ranks.values(), *special.values(), 0) + 1
        self.eod = eod_id(special, eod_token or vocabulary.eod_token, file)
        self.bos: int | None = special.get(vocabulary.bos_token) if vocabulary.bos_token else None
        pieces = [NO_TEXT] * self.vocab_size
        for token, number in vocabulary.ranks.items():
            pieces[number] = token
        self.spelling = Spelling.of(pieces, prefix=0)
        self._special = {number: name.encode() for name, number in special.items()}
        self.fingerprint = fingerprint(_what_decides_ids(vocabulary), self.eod)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._ids(text).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str], *, ends: bool = False) -> FlatTokens:
        flat = flat_tokens([self._ids(text) for text in texts], self.vocab_size)
        return self.spelling.with_places(texts, flat, _never) if ends else flat

    def _ids(self, text: str) -> npt.NDArray[np.uint32]:
        return self._encoding.encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        pieces = self.spelling.pieces
        return b"".join(self._special.get(number, pieces[number]) for number in ids).decode(errors="replace")


def _never(text: str) -> Ends:
    raise AssertionError(f"tokens of {text[:80]!r} do not spell it, though every token is the bytes of its text")


def _what_decides_ids(vocabulary: Vocabulary) -> bytes:
    tokens = hashlib.sha256()
    for token, number in sorted(vocabulary.ranks.items(), key=lambda item: item[1]):
        tokens.update(f"{number} {token.hex()}\n".encode())
    content: dict[str, Any] = {
        "pattern": vocabulary.pattern,
        "special_tokens": dict(vocabulary.special_tokens),
        "tokens": tokens.hexdigest(),
    }
    return json.dumps(content, sort_keys=True).encode()
