"""gigatoken in place of a tokenizer's own library, once it is proved to give the same ids.

Comes in: a loaded tokenizer, texts of the very input. Goes out: a `Tokenizer` whose encode_flat runs in gigatoken, on the calling thread
alone; everything else stays with the library. The proof compares the ids of every text of the sample, and of texts that spell the
tokenizer's special tokens or hold what tokenizers differ in. Does not know: files of the input, workers.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.tokenizer.fast_engine import NoFastFormError, fast_form
from megatron_instruct.tokenizer.flat import Ends, FlatTokens, token_dtype
from megatron_instruct.tokenizer.protocol import Tokenizer
from megatron_instruct.tokenizer.segments import Cuts, SegmentTable, compiled, safe_cuts

FastChoice = Literal["auto", "gigatoken", "none"]
_BATCH_CHARACTERS = 1 << 18
_SHOWN_IDS = 12
_MANY, _SHORT = 1024, 256
"""Texts, and their characters on average: so many so short ones are encoded at once."""
_RENEWED_AFTER = 3 << 23
"""Characters after which gigatoken is loaded anew: what it remembers of words makes it faster, and would otherwise grow without end."""
_NEW_SEGMENTS = 1 << 21
"""The same where it encodes new segments alone, so that it need not remember them."""
_PROBES = (
    "",
    " ",
    "  two  spaces \t tab\r\nline \n\n end ",
    "\0 nul \x07\ufeff\u200b\u2028\u0085",
    "cafe\u0301 ﬁ ½ Ａ ▁ ▁▁",
    "漢字カタカナ 한국어 العربية ไทย 😀👩‍👩‍👧𝄞",
    "</s><s><unk> <|endoftext|> [INST] <0x0A> <|im_start|>",
    "don't I'LL 1234567 3.14 -- ======== ........ \\n {{x}} https://a.b/c?d=e&f",
)
"""Texts that are compared beside the sample."""


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
            content=content,
            cuts=safe_cuts(json.loads(content)),
            kind=tokenizer.kind,
            vocab_size=tokenizer.vocab_size,
            eod=tokenizer.eod,
            bos=tokenizer.bos,
            fingerprint=tokenizer.fingerprint,
        )


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The tokenizer to encode with, and what a manifest should say of it."""

    tokenizer: Tokenizer
    form: "FastForm | None"
    """For other processes; None where the library encodes."""
    facts: dict[str, Any]
    """backend: "gigatoken 0.10.0" or "library"; with gigatoken the size of the proof, else the reason why it is not used."""


def with_fast_backend(
    tokenizer: Tokenizer,
    sample: Sequence[str],
    *,
    choice: FastChoice = "auto",
    report: Callable[[str], None] = print,
    to_be_proved: Callable[[FastForm], None] = lambda form: None,
) -> Backend:
    """Return `tokenizer` with gigatoken behind encode_flat where that is proved to give the same ids for `sample`.

    choice: "auto" keeps the library, and reports why, where gigatoken is missing, has no form of the tokenizer or gives other ids;
    "gigatoken" raises MissingPackageError or ConfigError then; "none" keeps the library.
    to_be_proved: called before the proof, so that other processes can load the form meanwhile.
    """
    if choice == "none":
        return Backend(tokenizer=tokenizer, form=None, facts={"backend": "library", "reason": "asked for"})
    try:
        form = FastForm.of(tokenizer)
        to_be_proved(form)
        fast = FastTokenizer(form, lambda: tokenizer)
        reason = difference(tokenizer, fast, sample)
    except (NoFastFormError, MissingPackageError) as error:
        if choice == "gigatoken" and isinstance(error, MissingPackageError):
            raise
        reason = str(error)
    if reason is None:
        size = sum(len(text.encode()) for text in sample)
        if fast.why_no_segments is not None:
            report(f"Texts are encoded more slowly than they could be: {fast.why_no_segments}.")
        facts = {"backend": f"gigatoken {metadata.version('gigatoken')}", "proved_texts": len(sample), "proved_bytes": size}
        return Backend(tokenizer=fast, form=form, facts=facts)
    if choice == "gigatoken":
        raise ConfigError(f"fast_tokenizer='gigatoken' is refused: {reason}; use --fast-tokenizer none.")
    report(f"gigatoken is not used, the slower library is: {reason}.")
    return Backend(tokenizer=tokenizer, form=None, facts={"backend": "library", "reason": reason})


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

    def __init__(self, form: FastForm, load: Callable[[], Any]) -> None:
        """load: return the tokenizer with its own library; called when it is first needed."""
        self._form, self._load = form, load
        self._engine, self._encoded = _engine(form.content), 0
        self.kind, self.vocab_size, self.fingerprint = form.kind, form.vocab_size, form.fingerprint
        self.eod, self.bos = form.eod, form.bos
        self._dtype = token_dtype(self.vocab_size)
        self._segments: SegmentTable | None = None
        library_of_segments = compiled()
        self.why_no_segments: str | None = None
        """Set where segments could be used but are not."""
        if form.cuts is not None and library_of_segments is not None:
            self._segments = SegmentTable(library_of_segments, form.cuts, self._encode)
        elif form.cuts is not None:
            self.why_no_segments = "megatron_instruct/tokenizer/_segments.c is not compiled; run make setup where a C compiler (gcc) is"

    @cached_property
    def _library(self) -> Any:
        return self._load()

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._library.encode(text)
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self._library.encode_batch(texts)
        return ids

    def encode_flat(self, texts: Sequence[str], *, ends: bool = False) -> FlatTokens:
        if self._segments is not None:
            found, lengths = self._segments.encode(texts)
            flat = FlatTokens(ids=found.astype(self._dtype), lengths=lengths, ends=None)
        elif len(texts) >= _MANY and sum(map(len, texts)) < _SHORT * len(texts):
            flat = self._at_once(texts)
        else:
            flat = self._one_by_one(texts)
        return self._library.spelling.with_ends(texts, flat, self.ends_of) if ends else flat

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
        return FlatTokens(ids=ids, lengths=np.fromiter(map(len, found), dtype=np.int32, count=len(found)), ends=None)

    def _at_once(self, texts: Sequence[str]) -> FlatTokens:
        engine = self._renewed(sum(map(len, texts)))
        layout = engine.encode_batch(list(texts), parallel=False).layout  # one process, one core
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]].astype(self._dtype)
        return FlatTokens(ids=ids, lengths=np.diff(offsets).astype(np.int32), ends=None)

    def ends_of(self, text: str) -> Ends:
        ends: Ends = self._library.ends_of(text)
        return ends

    def decode(self, ids: Iterable[int]) -> str:
        text: str = self._library.decode(ids)
        return text


def difference(library: Tokenizer, fast: Tokenizer, sample: Sequence[str]) -> str | None:
    """Describe the first text of the sample, or else of the probes, whose ids differ; None where there is none."""
    batches = list(_batches(sample))
    first = 0
    with ThreadPoolExecutor() as pool:  # the libraries let go of the interpreter while they encode
        for batch, expected in zip(batches, pool.map(library.encode_flat, batches), strict=True):
            found = _difference(batch, expected, fast.encode_flat(batch), f"text {{}} of {len(sample)} in the sample", first)
            if found is not None:
                return found
            first += len(batch)
    probes = [*_PROBES, *(f"a {text}b{text} {text}" for text in _special_texts(library))]
    return _difference(probes, library.encode_flat(probes), fast.encode_flat(probes), "text {} of the built-in ones", 0)


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    return sorted({tokenizer.decode([number]) for number in (tokenizer.eod, tokenizer.bos, 0) if number is not None})


def _batches(texts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _difference(texts: Sequence[str], expected: FlatTokens, found: FlatTokens, where: str, first: int) -> str | None:
    if np.array_equal(expected.ids, found.ids) and np.array_equal(expected.lengths, found.lengths):
        return None
    cuts = [np.split(tokens.ids, np.cumsum(tokens.lengths)[:-1]) for tokens in (expected, found)]
    rows = enumerate(zip(texts, *cuts, strict=True))
    place, (text, right, wrong) = next((place, row) for place, row in rows if not np.array_equal(row[1], row[2]))
    return _described(text, right.tolist(), wrong.tolist(), where.format(first + place))


def _described(text: str, right: list[int], wrong: list[int], where: str) -> str:
    """Describe one text's ids, from a few before the first that differs."""
    same = next((i for i, (a, b) in enumerate(zip(right, wrong, strict=False)) if a != b), min(len(right), len(wrong)))
    shown = slice(max(same - 3, 0), same + _SHOWN_IDS)
    return (
        f"gigatoken gives other ids than the tokenizer's library for {where} (counted from 0), from its token {same} on: the library "
        f"{right[shown]}, gigatoken {wrong[shown]}; the text is {text[:400]!r}{' ...' if len(text) > 400 else ''}"
    )
