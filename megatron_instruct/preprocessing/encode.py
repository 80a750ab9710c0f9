"""One part of the corpus -> a folder with its tokens (see part_files.py), whole or absent. The work of one worker process.

Does not know: other parts, other workers.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_instruct.corpora.part_folders import write_summary
from megatron_instruct.corpora.parts import Part
from megatron_instruct.corpora.read import BrokenRecord
from megatron_instruct.corpora.workers import DoPart
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder
from megatron_instruct.preprocessing.blocks import Block, BlockReader
from megatron_instruct.preprocessing.documents import DocumentMaker, RenderOptions
from megatron_instruct.preprocessing.part_files import PartSummary
from megatron_instruct.preprocessing.part_writer import PartWriter
from megatron_instruct.preprocessing.sentences import sentence_splitter
from megatron_instruct.preprocessing.tokens import begin_documents, encode_texts, end_documents, keep_documents, split_long
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer, token_dtype
from megatron_instruct.tokenizer.fast import FastForm, FastTokenizer

_TOO_SHORT, _TOO_LONG = "too short", "too long"


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What decides the tokens, beside the tokenizer."""

    json_keys: tuple[str, ...]
    append_eod: bool
    prepend_bos: bool
    split_sentences: str | None
    """Language to split sentences of; None: a document is one sequence."""
    min_document_tokens: int | None
    max_document_tokens: int | None
    long_documents: Literal["split", "reject"]
    render: RenderOptions
    on_error: Literal["stop", "reject"]


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """What every worker needs to encode parts."""

    tokenizer_path: Path
    fingerprint: str
    """That of the tokenizer as the parent process loaded it."""
    fast_form: FastForm | None
    """What the parent process has proved to give the same ids; None: the library encodes."""
    options: EncodeOptions
    log_interval: int
    """Documents between two reports."""

    def encoder(self) -> "PartEncoder":
        """Return what encodes parts. Raises InputError where the tokenizer is another than the parent process loaded."""

        def library() -> Tokenizer:
            tokenizer = load_tokenizer(self.tokenizer_path)
            if tokenizer.fingerprint != self.fingerprint:
                raise InputError(f"tokenizer {self.tokenizer_path} changed while it was in use; run the same command again.")
            return tokenizer

        form = self.fast_form
        return PartEncoder(library() if form is None else FastTokenizer(form, library), self.options)

    def ready(self) -> DoPart:
        return self.encoder().encode


class PartEncoder:
    """Encodes one part after another."""

    def __init__(self, tokenizer: Tokenizer, options: EncodeOptions) -> None:
        self._tokenizer, self._options = tokenizer, options
        self._reader = BlockReader(options.json_keys, DocumentMaker(options.json_keys, options.render))
        self._split = sentence_splitter(options.split_sentences) if options.split_sentences is not None else None

    def encode(self, part: Part, folder: Path, report: Callable[[int], None]) -> PartSummary:
        """Encode `part` into `folder`, which must not exist. report: called with the number of documents done since the last call.

        Raises InputError with file and line for what cannot be read or encoded, unless options.on_error is "reject".
        """
        with atomic_folder(folder) as unfinished:
            with ExitStack() as stack:
                writer = PartWriter(
                    unfinished,
                    stack,
                    json_keys=self._options.json_keys,
                    dtype=token_dtype(self._tokenizer.vocab_size),
                    with_sentences=self._split is not None,
                    ended=self._options.append_eod,
                )
                for block in self._reader.blocks(part):
                    self._encode_block(block, writer)
                    report(len(block) + len(block.broken))
            summary = writer.summary()
            write_summary(unfinished, part, asdict(summary))
        return summary

    def _encode_block(self, block: Block, writer: PartWriter) -> None:
        columns = [encode_texts(texts, block.spans, self._tokenizer, self._split) for texts in block.columns]
        reasons = self._reasons([tokens.document_lengths() for tokens in columns])
        rejected = [*block.broken, *(block.reject(place, *reason) for place, reason in reasons.items())]
        if self._options.on_error == "stop":
            _stop_at_the_first_fault(rejected)
        kept = np.ones(len(block), dtype=np.bool_)
        kept[list(reasons)] = False
        writer.count(block, kept, rejected)
        for key, tokens in zip(self._options.json_keys, columns, strict=True):
            tokens = keep_documents(tokens, kept)
            if self._options.max_document_tokens is not None:
                tokens = split_long(tokens, self._options.max_document_tokens) if self._split is None else tokens
            if self._options.prepend_bos:
                assert self._tokenizer.bos is not None, "a tokenizer without BOS was refused"
                tokens = begin_documents(tokens, self._tokenizer.bos)
            writer.write(key, end_documents(tokens, self._tokenizer.eod) if self._options.append_eod else tokens)

    def _reasons(self, lengths: Sequence[npt.NDArray[np.int64]]) -> dict[int, tuple[str, str]]:
        """Return reason and detail for each document that is set aside, by its place. lengths: tokens per document, by key."""
        least, most = np.minimum.reduce(lengths), np.maximum.reduce(lengths)
        low, high = self._options.min_document_tokens, self._options.max_document_tokens
        found: dict[int, tuple[str, str]] = {}
        if high is not None and self._options.long_documents == "reject":
            found |= {int(place): (_TOO_LONG, f"{most[place]} tokens, above {high}") for place in np.flatnonzero(most > high)}
        if low is not None:
            found |= {int(place): (_TOO_SHORT, f"{least[place]} tokens, below {low}") for place in np.flatnonzero(least < low)}
        found |= {int(place): ("no tokens", "the tokenizer makes no token of the text") for place in np.flatnonzero(least == 0)}
        return found


def _stop_at_the_first_fault(rejected: Sequence[BrokenRecord]) -> None:
    """Raise InputError that names it; a document that is too short or too long is no fault."""
    for broken in sorted(rejected, key=lambda one: one.line):
        if broken.reason not in (_TOO_SHORT, _TOO_LONG):
            raise InputError(
                f"{broken.where}: {broken.reason}: {broken.detail}; "
                "mend the file, or pass --on-error reject to set such documents aside in a rejects file."
            )
