"""What synthesis sets aside, as lines of rejects.jsonl."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import IO


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record, a request, a piece of a completion or a pair that is not kept."""

    where: str
    """File and line of a record that cannot be read; otherwise corpus, request, completion, or filter."""
    id: str
    """Of the raw text; empty for a record that has none."""
    reason: str
    """Short and countable."""
    content: str
    """What was set aside."""
    detail: str = ""
    """What exactly is wrong, where the reason does not say it."""


def write_rejects(stream: IO[str], rejects: Iterable[Reject]) -> None:
    """Append lines to an open file."""
    stream.writelines(json.dumps(asdict(reject), ensure_ascii=False) + "\n" for reject in rejects)
