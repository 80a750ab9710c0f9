"""A sample of the texts that will be encoded, spread over the input, to compare tokenizers on before one is used.

Comes in: the input's files. Goes out: texts as they will be encoded, examples rendered. It depends on the files alone, not on how the
work is divided. Does not know: tokenizers.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from megatron_instruct.corpora.items import BrokenRecord, Record
from megatron_instruct.corpora.lines import json_lines
from megatron_instruct.corpora.read import read_records
from megatron_instruct.errors import InputError
from megatron_instruct.preprocessing.documents import DocumentMaker

_PLACES = 24
"""Places of the input that are looked at."""
_PLACE_BYTES = range(1 << 13, 1 << 17)
"""Looked at in each: a hundredth of the input over all places, within these bounds."""
_PLACE_RECORDS = 32
_LONGEST = 1 << 14
"""Characters of a text that are compared."""


def sample_texts(files: Sequence[Path], maker: DocumentMaker) -> list[str]:
    """Return about a hundredth of the input, 200 kB to 3 MB, from all over it.

    Faulty records are passed over: reading them all will name them.
    """
    texts: list[str] = []
    try:
        for record in _records(files):
            document = maker.document(record) if isinstance(record, Record) else record
            if not isinstance(document, BrokenRecord):
                texts += [text[:_LONGEST] for text in document.texts]
    except InputError:
        return texts
    return texts


def _records(files: Sequence[Path]) -> Iterator[Record | BrokenRecord]:
    sizes = [file.stat().st_size for file in files]
    total, before = sum(sizes), 0
    place_bytes = min(max(total // (100 * _PLACES), _PLACE_BYTES.start), _PLACE_BYTES.stop)
    places = [total * place // _PLACES for place in range(_PLACES)]
    for file, size in zip(files, sizes, strict=True):
        inside = [place - before for place in places if before <= place < before + size]
        before += size
        if file.suffix == ".jsonl":
            for offset in inside:
                yield from json_lines(_lines_at(file, offset, place_bytes), file)
        elif inside:
            yield from islice(read_records(file), _PLACE_RECORDS * len(inside))


def _lines_at(file: Path, offset: int, size: int) -> list[bytes]:
    """Return the lines that start after `offset`, or at the start of the file, about `size` bytes of them and at least one."""
    with open(file, "rb") as stream:
        if offset:
            stream.seek(offset - 1)
            stream.readline()
        return stream.readlines(size)
