"""Documents of a data set for the eye: their text, coloured by role on a terminal, each stretch after its role in brackets elsewhere."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, roles_file
from megatron_instruct.records import ROLE_CODES, TokenRole
from megatron_instruct.tokenizer import Tokenizer

_ROLES: dict[int, TokenRole] = {code: role for role, code in ROLE_CODES.items()}
_COLOURS: dict[TokenRole, str] = {
    "context": "\033[0m",
    "instruction": "\033[34m",
    "response": "\033[1;32m",
    "glue": "\033[35m",
    "end_of_document": "\033[7m",
    "padding": "\033[2m",
}
_RESET = "\033[0m"


def decoded(prefix: Path, number: int, tokenizer: Tokenizer, *, colour: bool) -> str:
    """Return document `number` under a line that says what it is."""
    dataset = IndexedDataset(prefix)
    ids = dataset.document(number).tolist()
    ended = bool(ids) and ids[-1] == tokenizer.eod
    title = f"--- document {number}: {len(ids) - ended:,} tokens{' + end of document' if ended else ''}"
    if not roles_file(prefix).is_file():
        return f"{title}\n{tokenizer.decode(ids[:-1] if ended else ids)}"
    parts = stretches(ids, _roles_of(dataset, number), tokenizer)
    if colour:
        return f"{title}\n" + "".join(f"{_COLOURS[role]}{text}{_RESET}" for role, text in parts)
    return f"{title}\n" + "".join(f"[{role}]{text}" for role, text in parts)


def stretches(ids: Sequence[int], codes: npt.NDArray[np.uint8], tokenizer: Tokenizer) -> Iterator[tuple[TokenRole, str]]:
    """Yield the text of one run of tokens of the same role after another.

    A run's text is what it adds to the text before it, since a tokenizer decodes the first token of a text in another way.
    """
    changes = np.flatnonzero(np.diff(codes)) + 1
    before = ""
    for start, end in zip([0, *changes.tolist()], [*changes.tolist(), len(ids)], strict=True):
        if start == end:
            return
        until = tokenizer.decode(ids[:end])
        yield _ROLES[int(codes[start])], until[len(before) :]
        before = until


def _roles_of(dataset: IndexedDataset, number: int) -> npt.NDArray[np.uint8]:
    first, last = int(dataset.document_bounds[number]), int(dataset.document_bounds[number + 1])
    start = int(dataset.sequence_offsets[first]) // dataset.dtype.itemsize if first < last else 0
    count = int(dataset.sequence_lengths[first:last].sum(dtype=np.int64))
    return np.fromfile(roles_file(dataset.prefix), dtype=np.uint8, offset=start, count=count)
