"""Whether gigatoken may take the place of a tokenizer's own library: only where it is proved to give the same ids.

Comes in: a loaded tokenizer, texts of the very input. Goes out: what to encode with. The proof compares the ids of every text of the
sample, and of texts that spell the tokenizer's special tokens or hold what tokenizers differ in. Does not know: files, workers.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from megatron_instruct.errors import ConfigError, MissingPackageError
from megatron_instruct.tokenizer.fast import FastForm, FastTokenizer
from megatron_instruct.tokenizer.fast_engine import NoFastFormError
from megatron_instruct.tokenizer.flat import FlatTokens
from megatron_instruct.tokenizer.protocol import Tokenizer
from megatron_instruct.tokenizer.segments import NotApartError

FastChoice = Literal["auto", "gigatoken", "none"]
_BATCH_CHARACTERS = 1 << 18
_SHOWN_IDS = 12
_SLOTS = 1 << 18
"""Of the table of segments: a sample has few, and a large table takes as long to come by as the sample to encode."""
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
class Backend:
    """The tokenizer to encode with, and what a manifest should say of it."""

    tokenizer: Tokenizer
    form: FastForm | None
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
        fast = FastTokenizer(form, lambda: tokenizer, slots=_SLOTS)
        reason = difference(tokenizer, fast, sample)
    except (NoFastFormError, MissingPackageError, NotApartError) as error:
        if choice == "gigatoken" and isinstance(error, MissingPackageError):
            raise
        reason = str(error)
    if reason is None:
        from importlib import metadata

        size = sum(len(text.encode()) for text in sample)
        if fast.lacks_segments:
            report(
                "Texts are encoded more slowly than they could be: megatron_instruct/tokenizer/_segments.c is not compiled; "
                "run make setup where a C compiler (gcc) is."
            )
        facts = {"backend": f"gigatoken {metadata.version('gigatoken')}", "proved_texts": len(sample), "proved_bytes": size}
        return Backend(tokenizer=fast, form=form, facts=facts)
    if choice == "gigatoken":
        raise ConfigError(f"fast_tokenizer='gigatoken' is refused: {reason}; use --fast-tokenizer none.")
    report(f"gigatoken is not used, the slower library is: {reason}.")
    return Backend(tokenizer=tokenizer, form=None, facts={"backend": "library", "reason": reason})


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
