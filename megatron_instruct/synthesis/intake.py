"""The corpus as the texts that will be asked about: read, checked, split where too long, and kept where shards can find them.

Comes in: files. Goes out: a folder with texts.jsonl (one raw text a line), rejects.jsonl and summary.json, whole or absent.
"""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_instruct.corpora.read import BrokenRecord, Record, raw_text, read_records
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.records import RawText
from megatron_instruct.synthesis.rejects import Reject, write_rejects
from megatron_instruct.synthesis.sentences import split_to_fit

TEXTS, SUMMARY = "texts.jsonl", "summary.json"


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
    limit: int | None
    """Records to take."""
    on_error: Literal["stop", "reject"]
    long_texts: Literal["split", "reject"]


def take_in(folder: Path, files: Sequence[Path], options: IntakeOptions, fits: Callable[[str], bool]) -> IntakeSummary:
    """Write the intake folder, unless it is there, and return what it says.

    fits: whether a text can be asked about. Raises InputError with file and line for a record that cannot be used, unless
    options.on_error is "reject".
    """
    if (folder / SUMMARY).is_file():
        return IntakeSummary(**read_json(folder / SUMMARY))
    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    with atomic_folder(folder) as unfinished:
        with open(unfinished / TEXTS, "w", encoding="utf-8") as texts, open(unfinished / "rejects.jsonl", "w", encoding="utf-8") as rejects:
            for item in _limited(files, options):
                counts["records"] += 1
                for one in _texts(item, options, fits, counts):
                    if isinstance(one, Reject):
                        rejected[one.reason] += 1
                        write_rejects(rejects, [one])
                    else:
                        counts["texts"] += 1
                        texts.write(json.dumps({"id": one.id, "text": one.text}, ensure_ascii=False) + "\n")
        summary = IntakeSummary(
            records=counts["records"], split=counts["split"], texts=counts["texts"], rejected=dict(sorted(rejected.items()))
        )
        write_json(unfinished / SUMMARY, asdict(summary))
    return summary


class Texts:
    """Random access to the texts of an intake folder; holds 8 bytes a text in memory."""

    def __init__(self, folder: Path) -> None:
        self._stream = open(folder / TEXTS, "rb")  # noqa: SIM115  kept open for as long as texts are asked for
        self._offsets = array("Q", [0])
        for line in self._stream:
            self._offsets.append(self._offsets[-1] + len(line))

    def __enter__(self) -> "Texts":
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> RawText:
        self._stream.seek(self._offsets[index])
        return RawText(**json.loads(self._stream.readline()))


def _limited(files: Sequence[Path], options: IntakeOptions) -> Iterator[RawText | BrokenRecord]:
    """Yield the texts of the first records; an id that is there already cannot name a second text."""
    seen: set[str] = set()
    for count, record in enumerate(record for path in files for record in read_records(path)):
        if count == options.limit:
            return
        text = raw_text(record, text_key=options.text_key, id_key=options.id_key) if isinstance(record, Record) else record
        if isinstance(text, RawText) and text.id in seen:
            detail = f"the id {text.id!r} stands for an earlier text"
            text = BrokenRecord(path=record.path, line=record.line, reason="repeated id", detail=detail, raw=text.text)
        elif isinstance(text, RawText):
            seen.add(text.id)
        yield text


def _texts(
    item: RawText | BrokenRecord, options: IntakeOptions, fits: Callable[[str], bool], counts: Counter[str]
) -> Iterator[RawText | Reject]:
    if isinstance(item, BrokenRecord):
        if options.on_error == "stop":
            raise InputError(
                f"{item.where}: {item.reason}: {item.detail}; mend the input, or pass --on-error reject to set such records aside."
            )
        yield Reject(where=item.where, id="", reason=item.reason, content=item.raw, detail=item.detail)
    elif fits(item.text):
        yield item
    elif options.long_texts == "reject":
        yield Reject(where="corpus", id=item.id, reason="text too long", content=item.text)
    else:
        counts["split"] += 1
        for number, piece in enumerate(split_to_fit(item.text, fits), 1):
            name, text = f"{item.id}#{number}", piece.strip()
            if text:
                yield (
                    RawText(id=name, text=text) if fits(text) else Reject(where="corpus", id=name, reason="sentence too long", content=text)
                )
