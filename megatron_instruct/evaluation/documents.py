"""Held-out documents from corpus files.

Comes in: files of a corpus. Goes out: documents with ids that are unique, and the lines that hold none.
"""

from collections.abc import Sequence
from pathlib import Path

from megatron_instruct.corpora.read import BrokenRecord, raw_text, read_records
from megatron_instruct.errors import InputError
from megatron_instruct.evaluation.questions import Document


def read_documents(files: Sequence[Path], *, text_key: str, title_key: str = "title") -> tuple[list[Document], list[BrokenRecord]]:
    """Return the documents in order, and what could not be read. Raises InputError for an id that occurs twice."""
    documents: list[Document] = []
    broken: list[BrokenRecord] = []
    places: dict[str, str] = {}
    for file in files:
        for record in read_records(file):
            text = record if isinstance(record, BrokenRecord) else raw_text(record, text_key=text_key)
            if isinstance(text, BrokenRecord):
                broken.append(text)
                continue
            if text.id in places:
                raise InputError(
                    f"{record.where}: the id {text.id!r} is also at {places[text.id]}; held-out documents need ids of their own."
                )
            places[text.id] = record.where
            title = None if isinstance(record, BrokenRecord) else record.value.get(title_key)
            documents.append(Document(id=text.id, text=text.text, title=title if isinstance(title, str) else None))
    return documents, broken
