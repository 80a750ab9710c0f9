"""The corpus as the texts that will be asked about: read, checked, split where too long, and kept where shards can find them.

Comes in: files. Goes out: a folder with texts.jsonl (one raw text a line), offsets.bin (where each begins), rejects.jsonl and summary.json,
whole or absent.
"""

import hashlib
import json
import os
import re
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from megatron_instruct.corpora.read import BrokenRecord, Record, raw_text, read_records
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.progress import Progress
from megatron_instruct.records import InstructionPair, RawText
from megatron_instruct.synthesis.rejects import Reject, write_rejects
from megatron_instruct.synthesis.sentences import split_to_fit

TEXTS, OFFSETS, SUMMARY = "texts.jsonl", "offsets.bin", "summary.json"
GIVEN = "given"
"""Key in the provenance of a pair that the corpus gave: "pair", or "question" where only the answer is written. No filter looks at it."""
_OFFSET = struct.Struct("<Q")
_JSON = json.JSONEncoder(ensure_ascii=False)
_SURROGATE = re.compile("[\ud800-\udfff]")
_CACHE_KIB = 1 << 12
"""Memory for the ids."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AskedText(RawText):
    """A raw text, and what is given with it."""

    question: str | None = None
    """The model is asked for the answer to it alone."""
    pairs: tuple[InstructionPair, ...] | None = None
    """Known already: the model is not asked about the text."""

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = {"id": self.id, "text": self.text}
        if self.question is not None:
            found["question"] = self.question
        return found if self.pairs is None else {**found, "pairs": [pair.to_json() for pair in self.pairs]}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "AskedText":
        pairs = value.pop("pairs", None)
        given = None if pairs is None else tuple(InstructionPair.from_json(pair, where=value["id"]) for pair in pairs)
        return cls(**value, pairs=given)


@dataclass(frozen=True, kw_only=True)
class IntakeSummary:
    """What came in. Every record is a text, or split into several, or rejected; a piece of a split one is a text, or rejected."""

    records: int
    """Lines and rows read."""
    split: int
    """Texts that were split."""
    texts: int
    """Texts to ask about, pieces of split ones included."""
    rejected: dict[str, int]
    """Records and pieces set aside, by reason."""


@dataclass(frozen=True, kw_only=True)
class IntakeOptions:
    """How records become texts."""

    text_key: str
    id_key: str
    question_key: str | None
    pairs_key: str | None
    limit: int | None
    """Records to take."""
    on_error: Literal["stop", "reject"]
    long_texts: Literal["split", "reject"]


def take_in(folder: Path, files: Sequence[Path], options: IntakeOptions, fits: Callable[[str], bool]) -> IntakeSummary:
    """Write the intake folder, unless it is there, and return what it says.

    fits: whether a text can be asked about. Raises InputError with file and line for a record that cannot be used, unless
    options.on_error is "reject". Takes the same memory for a corpus of any size.
    """
    if (folder / SUMMARY).is_file():
        return IntakeSummary(**read_json(folder / SUMMARY))
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    with (
        atomic_folder(folder) as unfinished,
        _Ids(unfinished / "ids.sqlite") as ids,
        _Writer(unfinished) as texts,
        open(unfinished / "rejects.jsonl", "w", encoding="utf-8") as rejects,
        Progress("read the corpus", total=None, unit="records") as progress,
    ):
        for item in _limited(files, options, ids):
            counts["records"] += 1
            progress.add()
            for one in _texts(item, options, fits, counts, ids):
                if isinstance(one, Reject):
                    rejected[one.reason] += 1
                    write_rejects(rejects, [one])
                else:
                    counts["texts"] += 1
                    texts.write(one)
        summary = IntakeSummary(
            records=counts["records"], split=counts["split"], texts=counts["texts"], rejected=dict(sorted(rejected.items()))
        )
        texts.close()
        if ids.lost:
            _rename(unfinished, ids)
        write_json(unfinished / SUMMARY, asdict(summary))
    return summary


class _Writer:
    """Writes texts, and where each begins."""

    def __init__(self, folder: Path) -> None:
        self._texts, self._offsets = open(folder / TEXTS, "wb"), open(folder / OFFSETS, "wb")  # noqa: SIM115  open while texts come
        self._end = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, text: AskedText) -> None:
        self._offsets.write(_OFFSET.pack(self._end))
        self._end += self._texts.write(_JSON.encode(text.to_json()).encode() + b"\n")

    def close(self) -> None:
        if not self._texts.closed:
            self._offsets.write(_OFFSET.pack(self._end))
            self._texts.close()
            self._offsets.close()


class Texts:
    """Random access to the texts of an intake folder; where each begins stays on the disk, too."""

    def __init__(self, folder: Path) -> None:
        self._texts, self._offsets = open(folder / TEXTS, "rb"), open(folder / OFFSETS, "rb")  # noqa: SIM115  open while texts are asked for
        self._length = os.fstat(self._offsets.fileno()).st_size // _OFFSET.size - 1

    def __enter__(self) -> "Texts":
        return self

    def __exit__(self, *_: object) -> None:
        self._texts.close()
        self._offsets.close()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> AskedText:
        if not 0 <= index < self._length:
            raise IndexError(f"text {index} of {self._length}")
        start, end = struct.unpack("<QQ", os.pread(self._offsets.fileno(), 2 * _OFFSET.size, index * _OFFSET.size))
        return AskedText.from_json(json.loads(os.pread(self._texts.fileno(), end - start, start)))


class _Ids:
    """The names that were there already, on the disk and not in memory: 16 bytes of a hash each."""

    def __init__(self, path: Path) -> None:
        self.lost: set[str] = set()
        """Names of pieces that were ids of texts, as it turned out."""
        self._path, self._database = path, sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE ids (hash BLOB PRIMARY KEY, piece INTEGER) WITHOUT ROWID")
        self._database.execute("BEGIN")

    def __enter__(self) -> "_Ids":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()
        self._path.unlink()

    def add(self, name: str) -> bool:
        """Take the id of a text, perhaps from a piece; return whether no other text has it."""
        if self._insert(name, piece=False):
            return True
        if self._database.execute("UPDATE ids SET piece = 0 WHERE hash = ? AND piece", (_hash(name),)).rowcount == 0:
            return False
        self.lost.add(name)
        return True

    def name_piece(self, name: str) -> str:
        """Return a name that nothing has: this one, with as many marks behind it as it takes."""
        while not self._insert(name, piece=True):
            name += "#"
        return name

    def _insert(self, name: str, *, piece: bool) -> bool:
        return self._database.execute("INSERT OR IGNORE INTO ids VALUES (?, ?)", (_hash(name), piece)).rowcount == 1


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode(), digest_size=16).digest()


def _rename(folder: Path, ids: _Ids) -> None:
    """Give the pieces whose names were ids of later texts another one, as if those had come first."""
    os.replace(folder / TEXTS, folder / "named.jsonl")
    with open(folder / "named.jsonl", encoding="utf-8") as named, _Writer(folder) as texts:
        for line in named:
            text = AskedText.from_json(json.loads(line))
            if text.id in ids.lost:  # the first of that name is the piece
                ids.lost.remove(text.id)
                text = replace(text, id=ids.name_piece(text.id))
            texts.write(text)
    (folder / "named.jsonl").unlink()


def _limited(files: Sequence[Path], options: IntakeOptions, ids: _Ids) -> Iterator[AskedText | BrokenRecord]:
    """Yield the texts of the first records; an id that is there already cannot name a second text."""
    for count, record in enumerate(record for path in files for record in read_records(path)):
        if count == options.limit:
            return
        text = _asked_text(record, options) if isinstance(record, Record) else record
        if isinstance(text, AskedText) and not ids.add(text.id):
            detail = f"the id {text.id!r} stands for an earlier text"
            text = BrokenRecord(path=record.path, line=record.line, reason="repeated id", detail=detail, raw=text.text)
        yield text


def _asked_text(record: Record, options: IntakeOptions) -> AskedText | BrokenRecord:
    text = raw_text(record, text_key=options.text_key, id_key=options.id_key)
    if isinstance(text, BrokenRecord):
        return text
    if not text.id.strip():
        return record.broken("broken id", f"{options.id_key!r} is {text.id!r}; it must be a name with a visible character, or null")
    question = record.value.get(options.question_key) if options.question_key is not None else None
    if not isinstance(question, str | None) or (question is not None and not question.strip()):
        return record.broken("broken question", f"{options.question_key!r} is {question!r}; it must be a question, or null")
    given = record.value.get(options.pairs_key) if options.pairs_key is not None else None
    asked = AskedText(id=text.id, text=text.text, question=question)
    if given is None:
        return _unwritable(record, {options.id_key: text.id, options.question_key: question}) or asked
    if not isinstance(given, list) or not given:
        return record.broken("broken pairs", f"{options.pairs_key!r} is {given!r}; it must be a list of objects with question and answer")
    try:
        pairs = tuple(_given_pair(pair, record.where) for pair in given)
    except InputError as error:
        return record.broken("broken pairs", str(error).removeprefix(f"{record.where}: "))
    written = [pair.to_json() for pair in pairs]
    return _unwritable(record, {options.id_key: text.id, options.pairs_key: written}) or replace(asked, question=None, pairs=pairs)


def _given_pair(value: Any, where: str) -> InstructionPair:
    pair = InstructionPair.from_json(value, where=where)
    return msgspec.structs.replace(pair, provenance={**pair.provenance, GIVEN: "pair"})


def _unwritable(record: Record, fields: Mapping[str | None, Any]) -> BrokenRecord | None:
    """Return the record as a broken one if what stands in these fields, however deep, holds what no file or no document may hold."""
    for key, value in fields.items():
        written = _JSON.encode(value)
        if "\\u0000" in written.replace("\\\\", ""):
            return record.broken("NUL character", f"{key!r} holds a NUL")
        if _SURROGATE.search(written):
            return record.broken("lone surrogate", f"{key!r} holds half of a surrogate pair, which is no text")
    return None


def _texts(
    item: AskedText | BrokenRecord, options: IntakeOptions, fits: Callable[[str], bool], counts: Counter[str], ids: _Ids
) -> Iterator[AskedText | Reject]:
    if isinstance(item, BrokenRecord):
        if options.on_error == "stop":
            raise InputError(
                f"{item.where}: {item.reason}: {item.detail}; mend the input, or pass --on-error reject to set such records aside."
            )
        yield Reject(where=item.where, id="", reason=item.reason, content=item.raw, detail=item.detail)
    elif fits(item.text):
        yield item
    elif options.long_texts == "reject" or item.question is not None or item.pairs is not None:
        yield Reject(where="corpus", id=item.id, reason="text too long", content=item.text)
    else:
        counts["split"] += 1
        for number, piece in enumerate(split_to_fit(item.text, fits), 1):
            name, text = f"{item.id}#{number}", piece.strip()
            if text and fits(text):
                yield AskedText(id=ids.name_piece(name), text=text)
            elif text:
                yield Reject(where="corpus", id=name, reason="sentence too long", content=text)
