"""What evaluation files say, as n-grams of words, so that pairs which repeat it can be found (GPT-3, arXiv:2005.14165, appendix C).

Comes in: files with records (every text in them counts) and YAML files (likewise). Goes out: for a text, the first n-gram that it shares,
and with which file. A text of an evaluation that is shorter than n words counts as a whole, unless it is so short that it says nothing; so
does a line of a .txt file. Takes 12 bytes of memory for each n-gram of the files. Does not know: pairs.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from megatron_instruct.corpora.read import BrokenRecord, find_files, read_records
from megatron_instruct.errors import InputError
from megatron_instruct.synthesis.content_words import plain_words

_SHORTEST = 6
"""Words of the shortest text that counts as a whole; what is shorter, such as an answer, is met by chance."""
_YAML = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Overlap:
    """An n-gram that a text shares with an evaluation file."""

    ngram: str
    file: str


class Contamination:
    """The n-grams of some evaluation files."""

    def __init__(self, files: Sequence[Path], size: int) -> None:
        """size: words of an n-gram. Raises InputError for a file that cannot be read, or that holds no text long enough."""
        self._size, self._names = size, [file.name for file in files]
        hashes: list[NDArray[np.uint64]] = []
        lengths = {size}
        for file in files:
            own: list[int] = []
            for text in _texts_of(file):
                words = plain_words(text)
                if _SHORTEST <= len(words) < size:
                    lengths.add(len(words))
                    own.append(_hash(words))
                own += [_hash(words[start : start + size]) for start in range(len(words) - size + 1)]
            if not own:
                raise InputError(f"decontaminate {file}: no text in it has {min(_SHORTEST, size)} words, so that nothing could be found.")
            hashes.append(np.unique(np.array(own, dtype=np.uint64)))
        everything = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)
        sources = np.repeat(np.arange(len(hashes), dtype=np.uint32), [len(own) for own in hashes])
        order = np.argsort(everything, kind="stable")
        self._hashes, self._sources = everything[order], sources[order]
        self._lengths = sorted(lengths, reverse=True)

    def find(self, text: str) -> Overlap | None:
        """Return the first of the longest n-grams that the text shares with a file."""
        words = plain_words(text)
        for length in self._lengths:
            count = len(words) - length + 1
            if count < 1:
                continue
            wanted = np.array([_hash(words[start : start + length]) for start in range(count)], dtype=np.uint64)
            places = np.minimum(np.searchsorted(self._hashes, wanted), len(self._hashes) - 1)
            hits = np.flatnonzero(self._hashes[places] == wanted)
            if hits.size:
                start = int(hits[0])
                return Overlap(ngram=" ".join(words[start : start + length]), file=self._names[self._sources[places[start]]])
        return None


def evaluation_files(patterns: Sequence[str]) -> list[Path]:
    """Return the files of paths, folders and patterns; YAML files are taken where they are named."""
    named = [Path(pattern) for pattern in patterns if Path(pattern).suffix in _YAML]
    for path in named:
        if not path.is_file():
            raise InputError(f"decontaminate {path}: no such file.")
    others = [pattern for pattern in patterns if Path(pattern).suffix not in _YAML]
    return [*named, *(find_files(others) if others else [])]


def _texts_of(file: Path) -> Iterator[str]:
    if file.suffix in _YAML:
        try:
            yield from _strings(yaml.safe_load(file.read_text(encoding="utf-8")))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"decontaminate {file} is not valid YAML: {error}") from error
        return
    for record in read_records(file):
        if isinstance(record, BrokenRecord):
            raise InputError(f"decontaminate {record.where}: {record.reason}: {record.detail}; mend it: what is left out is not found.")
        for text in _strings(record.value):
            yield text
            if file.suffix == ".txt":
                yield from text.splitlines()


def _strings(value: Any) -> Iterator[str]:
    """Yield every text in a value, however deep."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _hash(words: Iterable[str]) -> int:
    return int.from_bytes(hashlib.blake2b(" ".join(words).encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
