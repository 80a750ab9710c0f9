"""A sentencepiece model, through sentencepiece itself: converters are known to change ids without a word (transformers 5).

Comes in: the .model file. Goes out: a `Tokenizer`. Does not know: other libraries' forms of the same vocabulary.
"""

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_instruct.errors import InputError, MissingPackageError
from megatron_instruct.tokenizer.flat import NO_TEXT, Ends, FlatTokens, Spelling, ends_before_starts, flat_tokens, piece_bytes
from megatron_instruct.tokenizer.special_tokens import eod_id, fingerprint


class SentencePieceTokenizer:
    """A sentencepiece model through sentencepiece itself: converters are known to change ids without a word (transformers 5)."""

    kind = "GPTSentencePieceTokenizer"

    def __init__(self, file: Path, eod_token: str | None) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise MissingPackageError("sentencepiece", extra="data", purpose=f"the tokenizer {file}") from error
        content = file.read_bytes()
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except (RuntimeError, OSError) as error:
            raise InputError(f"{file} is not a readable sentencepiece model: {error}") from error
        self.file = file
        self.vocab_size: int = self._processor.get_piece_size()  # user-defined and control pieces are counted
        pieces = {self._processor.id_to_piece(number): number for number in range(self.vocab_size)}
        eos = self._processor.eos_id()
        self.eod = eod_id(pieces, eod_token or (self._processor.id_to_piece(eos) if eos >= 0 else None), file)
        bos = self._processor.bos_id()
        self.bos: int | None = bos if bos >= 0 else None
        self.fingerprint = fingerprint(content, self.eod)

    @functools.cached_property
    def spelling(self) -> Spelling:
        """Made when it is first asked for, since tokens alone do without."""
        prefix = _prefix(self._processor.serialized_model_proto())
        return Spelling.of([self._bytes_of(number) for number in range(self.vocab_size)], prefix=prefix)

    def _bytes_of(self, number: int) -> bytes:
        processor = self._processor
        if processor.is_control(number) or processor.is_unknown(number) or processor.is_unused(number):
            return NO_TEXT
        return piece_bytes(processor.id_to_piece(number))

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_flat(self, texts: Sequence[str], *, ends: bool = False) -> FlatTokens:
        ids = self._processor.encode(list(texts), return_type="numpy", num_threads=1) if texts else []
        flat = flat_tokens(ids, self.vocab_size)
        return self.spelling.with_places(texts, flat, self.ends_of) if ends else flat

    def ends_of(self, text: str) -> Ends:
        content = text.encode()
        offsets = self._processor.encode(content, return_type="offset_mapping")["offsets"]  # in bytes, since the text is
        return ends_before_starts(np.array([start for start, _ in offsets], dtype=np.int64), len(content))

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._processor.decode(list(ids))
        return text


def _prefix(content: bytes) -> int | None:
    """Return the bytes put before a text that is changed in no other way, None where it is, or where protobuf is not there to tell."""
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        return None
    model: Any = sentencepiece_model_pb2.ModelProto.FromString(content)
    spec = model.normalizer_spec
    if spec.precompiled_charsmap or spec.remove_extra_whitespaces or not spec.escape_whitespaces:
        return None
    return None if model.trainer_spec.treat_whitespace_as_suffix else int(spec.add_dummy_prefix)
