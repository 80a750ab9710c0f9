"""The pieces of documents that a sample of a run is cut from. Comes in: the training samples. Does not know: files, steps."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What a sample holds of one document."""

    prefix: str
    """Of the data set."""
    document: int
    """Its number in the data set, from 0 (a sequence, where documents are split)."""
    start: int
    """First token, from 0."""
    ids: tuple[int, ...]
    """Token ids from there."""

    def __str__(self) -> str:
        return f"{self.prefix} document {self.document:,} tokens {self.start:,} to {self.start + len(self.ids) - 1:,}"


def pieces(samples: Any, number: int) -> Iterator[Piece]:
    """Yield what sample `number` of a run is cut from, in order; the last token is there for its label alone."""
    from megatron_instruct.training.blends import locate

    dataset, place = locate(samples, number)
    for document, start, tokens in dataset.pieces(place):
        ids = dataset.dataset.get(document, offset=start, length=tokens).tolist()
        yield Piece(prefix=str(dataset.dataset_path), document=document, start=start, ids=tuple(ids))
