"""Rows of context-based task data -> a context with its questions and answers, checked.

Comes in: objects of any corpus file, in the form of the public collection that the instruction synthesizer was tuned on
(instruction-pretrain/ft-instruction-synthesizer-collection): "context", "QA_list" with {"Q", "A"} each, "rc_name", the data set's name.
Goes out: `TaskRow`, or a `BrokenRecord` with the reason. Does not know: prompt formats, tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.read import BrokenRecord, Record, read_records, text_of
from megatron_instruct.errors import InputError
from megatron_instruct.files import distinct_endings

CONTEXT, PAIRS, QUESTION, ANSWER, NAME = "context", "QA_list", "Q", "A", "rc_name"


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskRow:
    """A context and the pairs that go with it."""

    id: str
    """The data set's name, the file's and the line: "squad/00000.jsonl:17". Files of one name bear folders that tell them apart, too."""
    data_set: str
    context: str
    pairs: tuple[tuple[str, str], ...]
    """Questions and answers, as the row has them; options and requests to think are part of a question."""


def read_rows(files: Sequence[Path], *, on_error: str) -> Iterator[TaskRow | BrokenRecord]:
    """Yield the rows of files in order; raises InputError with file and line for a broken one unless on_error is "reject"."""
    for file, file_name in zip(files, distinct_endings(files) or [file.name for file in files], strict=True):
        for record in read_records(file):
            row = _task_row(record, file_name) if isinstance(record, Record) else record
            if isinstance(row, BrokenRecord) and on_error == "stop":
                raise InputError(
                    f"{row.where}: {row.reason}: {row.detail}; mend the file, or pass --on-error reject to set such rows aside."
                )
            yield row


def _task_row(record: Record, file_name: str) -> TaskRow | BrokenRecord:
    """Take a row out of an object. A row without a data set's name belongs to one named like its file."""
    context = text_of(record, CONTEXT)
    if isinstance(context, BrokenRecord):
        return context
    name = record.value.get(NAME) or file_name[: -len(record.path.name)] + record.path.name.split(".")[0]
    if not isinstance(name, str):
        return record.broken("name is no string", f"{NAME!r} is {name!r}")
    listed = record.value.get(PAIRS)
    if not isinstance(listed, list):
        return record.broken(
            "no pairs", f"{PAIRS!r} is {type(listed).__name__}; it must be a list of objects with {QUESTION!r} and {ANSWER!r}"
        )
    pairs = []
    for number, one in enumerate(listed):
        pair = _pair(one)
        if pair is None:
            return record.broken("broken pair", f"pair {number} is {one!r}; {QUESTION!r} and {ANSWER!r} must be strings")
        pairs.append(pair)
    return TaskRow(id=f"{name}/{file_name}:{record.line}", data_set=name, context=context, pairs=tuple(pairs))


def _pair(value: Any) -> tuple[str, str] | None:
    question, answer = (value.get(QUESTION), value.get(ANSWER)) if isinstance(value, dict) else (None, None)
    return (question, answer) if isinstance(question, str) and isinstance(answer, str) else None
