"""gigatoken in place of a tokenizer's own library; that it gives the same ids is for fast_proof.py to prove.

Comes in: a loaded tokenizer, or its FastForm. Goes out: a `Tokenizer` whose encode_flat runs in gigatoken, on the calling thread alone;
everything else stays with the library. Does not know: which texts it was proved on.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.tokenizer.fast_engine import NoFastFormError, fast_form
from megatron_instruct.tokenizer.flat import Ends, FlatTokens, Spelling, token_dtype
from megatron_instruct.tokenizer.protocol import Tokenizer
from megatron_instruct.tokenizer.segments import SLOTS, Cuts, SegmentTable, compiled, safe_cuts

_MANY, _SHORT = 1024, 256
"""Texts, and their characters on average: so many so short ones are encoded at once."""
_RENEWED_AFTER = 3 << 23
"""Characters after which gigatoken is loaded anew: what it remembers of words makes it faster, and would otherwise grow without end."""
_NEW_SEGMENTS = 1 << 21
"""The same where it encodes new segments alone, so that it need not remember them."""


@dataclass(frozen=True, kw_only=True)
class FastForm:
    """All that encoding takes, without the tokenizer's own library."""

    content: str
    """The tokenizer in gigatoken's own form."""
    cuts: Cuts | None
    """Where texts may be cut into segments; None where nothing is known of it."""
    kind: str
    vocab_size: int
    eod: int
    bos: int | None
    fingerprint: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "FastForm":
        """Raises NoFastFormError where gigatoken has no form of the tokenizer."""
        content = fast_form(tokenizer)
        return cls(
            content=json.dumps(content),
            cuts=safe_cuts(content),
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            bos=tokenizer.bos,
            fingerprint=tokenizer.fingerprint,
        )


def fast_tokenizer(tokenizer: Tokenizer) -> "FastTokenizer":
    """Return `tokenizer` with gigatoken behind encode_flat, unproved.

    Raises MissingPackageError, or ConfigError where gigatoken has no form of the tokenizer.
    """
    try:
        return FastTokenizer(FastForm.of(tokenizer), lambda: tokenizer)
    except NoFastFormError as error:
        raise ConfigError(f"fast_tokenizer='gigatoken' is refused: {error}; use --fast-tokenizer none.") from error


def _engine(form: str) -> Any:
    try:
        import gigatoken
    except ImportError as error:
        raise MissingPackageError("gigatoken", extra="fast", purpose="fast_tokenizer") from error
    try:
        return gigatoken.Tokenizer.from_json(form)
    except (ValueError, RuntimeError) as error:
        raise NoFastFormError(f"gigatoken does not take this tokenizer ({str(error).splitlines()[0]})") from error


class FastTokenizer:
    """A tokenizer whose encode_flat runs in gigatoken.

    Where texts may be cut into segments (segments.py), gigatoken encodes each segment once. Else texts are encoded one by one: gigatoken
    then keeps what it found out about words, and its batches need the package awkward, which takes longer to import than everything else
    that a worker needs. Of many short texts a batch is faster nevertheless.
    """

    def __init__(self, form: FastForm, load: Callable[[], Any], *, slots: int = SLOTS) -> None:
        """load: return the tokenizer with its own library; called when it is first needed. slots: of the table of segments."""
        self._form, self._load = form, load
        self._engine, self._encoded = _engine(form.content), 0
        self.kind, self.vocab_size, self.fingerprint = form.kind, form.vocab_size, form.fingerprint
        self.eod, self.bos = form.eod, form.bos
        self._dtype = token_dtype(self.vocab_size)
        self._segments: SegmentTable | None = None
        library_of_segments = compiled()
        if form.cuts is not None and library_of_segments is not None:
            self._segments = SegmentTable(library_of_segments, form.cuts, self._encode, slots=slots)

    @property
    def lacks_segments(self) -> bool:
        """Whether texts could be encoded by segments, and are not."""
        return self._form.cuts is not None and self._segments is None

    @cached_property
    def _library(self) -> Any:
        return self._load()

    @cached_property
    def _spelling(self) -> Spelling:
        """Which bytes each id spells. Where texts may be cut, the form says how many, so that the library need not be loaded."""
        if self._form.cuts is None:
            spelling: Spelling = self._library.spelling
            return spelling
        return Spelling(pieces=(), sizes=np.frombuffer(self._form.cuts.sizes, dtype=np.uint16).astype(np.int64), prefix=1)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._library.encode_batch(texts)
        return ids

    def encode_flat(self, texts: Sequence[str], *, ends: bool = False) -> FlatTokens:
        contents = None
        if self._segments is not None:
            contents = list(map(str.encode, texts))
            found, lengths = self._segments.encode(texts, contents)
            flat = FlatTokens(ids=found.astype(self._dtype), lengths=lengths)
        elif len(texts) >= _MANY and sum(map(len, texts)) < _SHORT * len(texts):
            flat = self._at_once(texts)
        else:
            flat = self._one_by_one(texts)
        return self._spelling.with_places(texts, flat, self.ends_of, contents) if ends else flat

    def _renewed(self, characters: int) -> Any:
        """Return gigatoken's tokenizer, for that many characters more."""
        if self._encoded > (_RENEWED_AFTER if self._segments is None else _NEW_SEGMENTS):
            self._engine = None  # or the memory of two would be needed
            self._engine, self._encoded = _engine(self._form.content), 0
        self._encoded += characters
        return self._engine

    def _encode(self, text: str) -> npt.NDArray[Any]:
        return np.asarray(self._renewed(len(text)).backend.encode(text))

    def _one_by_one(self, texts: Sequence[str]) -> FlatTokens:
        found = list(map(self._encode, texts))
        ids = np.concatenate(found, dtype=self._dtype, casting="unsafe") if found else np.empty(0, self._dtype)
        return FlatTokens(ids=ids, lengths=np.fromiter(map(len, found), dtype=np.int32, count=len(found)))

    def _at_once(self, texts: Sequence[str]) -> FlatTokens:
        engine = self._renewed(sum(map(len, texts)))
        layout = engine.encode_batch(list(texts), parallel=False).layout  # one process, one core
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(self._dtype)
        return FlatTokens(ids=ids, lengths=np.diff(offsets).astype(np.int32))

    def ends_of(self, text: str) -> Ends:
        ends: Ends = self._library.ends_of(text)
        return ends

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._library.decode(ids)
        return text
