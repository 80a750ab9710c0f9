"""Texts of a block -> token arrays: encoded, filtered by length, cut, ended. Arrays all the way; no work per document beyond numpy's.

Comes in: texts of one JSON key, a tokenizer. Goes out: `Tokens`. Does not know: files.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.documents import Spans
from megatron_instruct.preprocessing.roles import CONTEXT, END, Codes, clipped, token_roles
from megatron_instruct.preprocessing.sentences import SplitSentences
from megatron_instruct.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Tokens of some documents, one after another."""

    ids: npt.NDArray[Any]
    """[tokens]"""
    sequences: npt.NDArray[np.int32]
    """Tokens of each sequence, [sequences]."""
    documents: npt.NDArray[np.int32]
    """Sequences of each document, [documents]."""
    codes: Codes | None
    """Roles, [tokens], with the mark STRADDLES on tokens that span several; None where all is context."""

    def document_lengths(self) -> npt.NDArray[np.int64]:
        """Return the tokens of each document."""
        ends = np.concatenate(([0], np.cumsum(self.sequences, dtype=np.int64)))
        bounds = np.concatenate(([0], np.cumsum(self.documents, dtype=np.int64)))
        return np.diff(ends[bounds])


def encode_texts(texts: Sequence[str], spans: Mapping[int, Spans], tokenizer: Tokenizer, split: SplitSentences | None) -> Tokens:
    """Encode texts; each becomes a document of one sequence or, with `split`, of its sentences."""
    if split is None:
        return _encoded(texts, spans, np.ones(len(texts), dtype=np.int32), tokenizer)
    sentences: list[str] = []
    sentence_spans: dict[int, Spans] = {}
    counts = np.zeros(len(texts), dtype=np.int32)
    for place, text in enumerate(texts):
        for start, end in split(text):
            if place in spans:
                sentence_spans[len(sentences)] = clipped(spans[place], start, end)
            sentences.append(text[start:end])
            counts[place] += 1
    return _without_empty_sequences(_encoded(sentences, sentence_spans, counts, tokenizer))


def _encoded(texts: Sequence[str], spans: Mapping[int, Spans], counts: npt.NDArray[np.int32], tokenizer: Tokenizer) -> Tokens:
    flat = tokenizer.encode_flat(texts, ends=bool(spans))
    if not spans:
        return Tokens(ids=flat.ids, sequences=flat.lengths, documents=counts, codes=None)
    return Tokens(ids=flat.ids, sequences=flat.lengths, documents=counts, codes=token_roles(texts, spans, flat))


def _without_empty_sequences(tokens: Tokens) -> Tokens:
    full = tokens.sequences > 0
    if full.all():
        return tokens
    owner = np.repeat(np.arange(len(tokens.documents)), tokens.documents)
    counts = np.bincount(owner[full], minlength=len(tokens.documents)).astype(np.int32)
    return dataclasses.replace(tokens, sequences=tokens.sequences[full], documents=counts)


def keep_documents(tokens: Tokens, kept: npt.NDArray[np.bool_]) -> Tokens:
    """Return the documents where `kept` is true."""
    if kept.all():
        return tokens
    of_sequences = np.repeat(kept, tokens.documents)
    of_tokens = np.repeat(of_sequences, tokens.sequences)
    return dataclasses.replace(
        tokens,
        ids=tokens.ids[of_tokens],
        sequences=tokens.sequences[of_sequences],
        documents=tokens.documents[kept],
        codes=tokens.codes[of_tokens] if tokens.codes is not None else None,
    )


def split_long(tokens: Tokens, largest: int) -> Tokens:
    """Cut each document of more than `largest` tokens into the fewest that fit, their lengths equal or one apart, the longer ones first.

    Every document must be of one sequence.
    """
    if tokens.sequences.max(initial=0) <= largest:
        return tokens
    pieces = -(-tokens.sequences // largest)
    length, longer = np.divmod(tokens.sequences, np.maximum(pieces, 1))
    place = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    cut = (np.repeat(length, pieces) + (place < np.repeat(longer, pieces))).astype(np.int32)
    return dataclasses.replace(tokens, sequences=cut, documents=np.ones(len(cut), dtype=np.int32))


def begin_documents(tokens: Tokens, bos: int) -> Tokens:
    """Put the BOS token in front of each document, into its first sequence."""
    first = np.cumsum(tokens.documents) - tokens.documents
    places = (np.cumsum(tokens.sequences, dtype=np.int64) - tokens.sequences)[first]
    return _with_one_more(tokens, first, places, bos, CONTEXT)


def end_documents(tokens: Tokens, eod: int) -> Tokens:
    """Put the end-of-document token after each document, into its last sequence."""
    last = np.cumsum(tokens.documents) - 1
    places = np.cumsum(tokens.sequences, dtype=np.int64)[last]
    return _with_one_more(tokens, last, places, eod, END)


def _with_one_more(tokens: Tokens, sequences: npt.NDArray[np.integer], places: npt.NDArray[np.int64], id_: int, code: int) -> Tokens:
    """Put one token, of one role, into each of these sequences, before the tokens at `places`."""
    lengths = tokens.sequences.copy()
    lengths[sequences] += 1
    return dataclasses.replace(
        tokens,
        ids=np.insert(tokens.ids, places, id_),
        sequences=lengths,
        codes=np.insert(tokens.codes, places, code) if tokens.codes is not None else None,
    )
