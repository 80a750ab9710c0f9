"""One part of the corpus -> a folder with its tokens. The work of one worker process.

Comes in: a `Part`. Goes out: a folder, whole or absent: KEY.bin (tokens) and KEY.lengths (int32, tokens per document) for each
JSON key, rejects.jsonl, and summary.json. Does not know: other parts, other workers.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal

import numpy as np

from megatron_instruct.corpora.parts import Part, read_part
from megatron_instruct.corpora.read import BrokenRecord, Record, raw_text
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.preprocessing.indexed_dataset import token_dtype
from megatron_instruct.tokenizer import Tokenizer

BATCH_DOCUMENTS = 256
BATCH_CHARACTERS = 1 << 19
SUMMARY, REJECTS = "summary.json", "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class EncodeOptions:
    """What decides the tokens, beside the tokenizer."""

    json_keys: tuple[str, ...]
    append_eod: bool
    on_error: Literal["stop", "reject"]


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """What a finished part says of itself. documents_in = documents + the sum of rejected."""

    documents_in: int
    documents: int
    tokens: dict[str, int]
    """By JSON key."""
    rejected: dict[str, int]
    """By reason."""


def encode_part(part: Part, folder: Path, tokenizer: Tokenizer, options: EncodeOptions, report: Callable[[int], None]) -> PartSummary:
    """Encode `part` into `folder`, which must not exist. report: called with the number of documents done since the last call.

    Raises InputError with file and line for what cannot be read or encoded, unless options.on_error is "reject".
    """
    with atomic_folder(folder) as unfinished:
        with ExitStack() as stack:
            writer = _Writer(
                bins={key: stack.enter_context(open(unfinished / bin_name(key), "wb")) for key in options.json_keys},
                lengths={key: stack.enter_context(open(unfinished / lengths_name(key), "wb")) for key in options.json_keys},
                rejects=stack.enter_context(open(unfinished / REJECTS, "w", encoding="utf-8")),
                tokenizer=tokenizer,
                options=options,
            )
            for batch in _batches(_texts(item, options.json_keys) for item in read_part(part)):
                writer.write(batch)
                report(len(batch))
        summary = writer.summary()
        write_json(unfinished / SUMMARY, asdict(summary))
    return summary


def read_summary(folder: Path) -> PartSummary | None:
    """Return what the part in `folder` says of itself, or None when it is not finished."""
    return PartSummary(**read_json(folder / SUMMARY)) if (folder / SUMMARY).is_file() else None


def bin_name(key: str) -> str:
    return f"{key}.bin"


def lengths_name(key: str) -> str:
    return f"{key}.lengths"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Texts:
    record: Record
    texts: tuple[str, ...]
    """One for each JSON key."""


def _texts(item: Record | BrokenRecord, keys: tuple[str, ...]) -> _Texts | BrokenRecord:
    if isinstance(item, BrokenRecord):
        return item
    texts = []
    for key in keys:
        text = raw_text(item, text_key=key)
        if isinstance(text, BrokenRecord):
            return text
        texts.append(text.text)
    return _Texts(record=item, texts=tuple(texts))


def _batches(items: Iterable[_Texts | BrokenRecord]) -> Iterator[list[_Texts | BrokenRecord]]:
    batch: list[_Texts | BrokenRecord] = []
    characters = 0
    for item in items:
        batch.append(item)
        characters += sum(map(len, item.texts)) if isinstance(item, _Texts) else 0
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class _Writer:
    """Encodes into the open files of one part, and counts. Everything is written in the order of the input."""

    def __init__(
        self,
        *,
        bins: Mapping[str, IO[bytes]],
        lengths: Mapping[str, IO[bytes]],
        rejects: IO[str],
        tokenizer: Tokenizer,
        options: EncodeOptions,
    ) -> None:
        self._bins, self._lengths, self._rejects = bins, lengths, rejects
        self._tokenizer, self._options = tokenizer, options
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._documents = 0
        self._tokens: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()

    def write(self, batch: list[_Texts | BrokenRecord]) -> None:
        rows = [item for item in batch if isinstance(item, _Texts)]
        columns = [self._tokenizer.encode_batch([row.texts[i] for row in rows]) for i in range(len(self._options.json_keys))]
        encoded = iter(zip(*columns, strict=True))
        kept: list[tuple[list[int], ...]] = []
        for item in batch:
            if isinstance(item, BrokenRecord):
                self._reject(item)
            elif all(ids := next(encoded)):
                kept.append(ids)
            else:
                self._reject(_without_tokens(item.record))
        self._documents += len(kept)
        for i, key in enumerate(self._options.json_keys):
            self._write_key(key, [ids[i] for ids in kept])

    def _write_key(self, key: str, documents: list[list[int]]) -> None:
        if self._options.append_eod:
            for ids in documents:
                ids.append(self._tokenizer.eod)
        self._bins[key].writelines(np.array(ids, dtype=self._dtype).tobytes() for ids in documents)
        lengths = np.array([len(ids) for ids in documents], dtype="<i4")
        self._lengths[key].write(lengths.tobytes())
        self._tokens[key] += int(lengths.sum(dtype=np.int64))

    def _reject(self, broken: BrokenRecord) -> None:
        """Set aside what cannot become a document, or stop, as on_error says."""
        if self._options.on_error == "stop":
            raise InputError(
                f"{broken.where}: {broken.reason}: {broken.detail}; "
                "mend the file, or pass --on-error reject to set such documents aside in a rejects file."
            )
        self._rejected[broken.reason] += 1
        row = {"path": str(broken.path), "line": broken.line, "reason": broken.reason, "detail": broken.detail, "raw": broken.raw}
        json.dump(row, self._rejects)
        self._rejects.write("\n")

    def summary(self) -> PartSummary:
        return PartSummary(
            documents_in=self._documents + self._rejected.total(),
            documents=self._documents,
            tokens={key: self._tokens[key] for key in self._options.json_keys},
            rejected=dict(sorted(self._rejected.items())),
        )


def _without_tokens(record: Record) -> BrokenRecord:
    detail = "the tokenizer makes no token of the text"
    return BrokenRecord(path=record.path, line=record.line, reason="no tokens", detail=detail, raw=json.dumps(record.value, default=str))
