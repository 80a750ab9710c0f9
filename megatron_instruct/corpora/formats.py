"""The table of suffixes: how a file of each format is read, and how it is cut into slices that can be read apart."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_instruct.corpora.arrow import cut_arrow, read_arrow
from megatron_instruct.corpora.compressed import read_gzip, read_zstandard
from megatron_instruct.corpora.items import BrokenRecord, Record, Slice
from megatron_instruct.corpora.lines import broken, cut_lines, read_lines
from megatron_instruct.corpora.parquet import cut_parquet, read_parquet


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """One format of corpus files."""

    read: Callable[[Slice], Iterator[Record | BrokenRecord]]
    cut: Callable[[Path, int], list[Slice]] | None = None
    """Cuts a file into slices of about so many bytes; None where a file can only be read from its start."""


def read_text(piece: Slice) -> Iterator[Record | BrokenRecord]:
    """A .txt file is one document."""
    content = piece.path.read_bytes()
    if not content:
        return
    try:
        yield Record(piece.path, 1, {"text": content.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        yield broken(piece.path, 1, "invalid UTF-8", str(error), content)


FORMATS: dict[str, Format] = {
    ".jsonl": Format(read=read_lines, cut=cut_lines),
    ".jsonl.gz": Format(read=read_gzip),
    ".jsonl.zst": Format(read=read_zstandard),
    ".parquet": Format(read=read_parquet, cut=cut_parquet),
    ".arrow": Format(read=read_arrow, cut=cut_arrow),
    ".txt": Format(read=read_text),
}


def format_of(path: Path) -> Format | None:
    """Return the format of a file by its name, or None where the suffix is unknown."""
    return next((form for suffix, form in FORMATS.items() if path.name.endswith(suffix)), None)
