"""Pairs that say nearly what an earlier pair of the corpus says: found by MinHash and locality-sensitive hashing, settled exactly.

Comes in: the M-shot examples of all shards, in the order of the corpus. Goes out: the same without the pairs that are too similar to one
kept before; so the result depends on that order alone, not on shards, batches or workers. Pairs and questions that the corpus gave pass
by: nothing is compared with them. A text that loses its last pair stands alone, to stay raw text. What was kept is looked up in a database
on the disk (about 1 KiB a pair), so memory does not grow with the corpus.
Similarity is Jaccard's, of the sets of four characters in a row, without the words that every question has; what names other numbers is
not similar. Sources: Broder 1997; Leskovec, Rajaraman, Ullman, chapter 3; MinHash is rensa's. Does not know: files.
"""

import re
import sqlite3
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from megatron_instruct.errors import MissingPackageError
from megatron_instruct.records import InstructionPair, MShotExample, OneShotExample
from megatron_instruct.synthesis.content_words import plain_words, words_of
from megatron_instruct.synthesis.filter_rules import Drop
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.filters import dropped_pair
from megatron_instruct.synthesis.intake import GIVEN
from megatron_instruct.synthesis.rejects import Reject

NAME = "near_duplicate"
_PERMUTATIONS, _SEED = 128, 1
_CHARACTERS = 4
_RECALL = 0.995
"""Share of pairs exactly at the threshold that hashing must find."""
_BUCKET = 32
"""Earlier pairs that are remembered for the hash of a band, at most: the first ones, since what very many have in common says little."""
_CANDIDATES = 12
"""Earlier pairs that a pair is compared with, at most: those that have most bands in common."""
_NUMBERS = re.compile(r"\w*\d\w*")
_CACHE_KIB = 1 << 16
_BATCH = 256
"""Examples hashed together; of no effect on the result."""


@dataclass(frozen=True, kw_only=True)
class Sifted:
    """What is left of one M-shot example."""

    examples: list[MShotExample]
    rejects: list[Reject]


def sift(examples: Iterable[MShotExample], database: Path, settings: FilterSettings) -> Iterator[Sifted]:
    """Yield what is left of each example. database: a file that is made, and removed in the end."""
    database.unlink(missing_ok=True)
    with _Kept(database, settings) as kept:
        for batch in batched(examples, _BATCH):
            pairs = (pair for example in batch for shot in example.shots for pair in shot.pairs if GIVEN not in pair.provenance)
            written = [_written(pair, settings) for pair in pairs]
            signatures = iter(zip(written, kept.signatures(written), strict=True))
            for example in batch:
                yield _sifted(example, kept, signatures)


def similarity(first: str, second: str) -> float:
    """Return the Jaccard similarity of the four-character sequences of two texts; 0 where they name different numbers."""
    if set(_NUMBERS.findall(first)) != set(_NUMBERS.findall(second)):
        return 0.0
    one, two = shingles(first), shingles(second)
    return len(one & two) / len(one | two)


def shingles(text: str) -> set[str]:
    """Return the sequences of four characters of a text that has only words and single blanks; a shorter text is one sequence."""
    return {text[start : start + _CHARACTERS] for start in range(max(len(text) - _CHARACTERS + 1, 1))}


def _written(pair: InstructionPair, settings: FilterSettings) -> str:
    """Return the words of a pair that are compared: what a question begins with, and what it is about; perhaps the answer, too."""
    words = words_of(str(pair.provenance.get("language", "")))
    question = plain_words(" ".join((pair.question, *pair.options)))
    told = [*question[:1], *(word for word in question[1:] if word not in words.silent)]
    return " ".join(told) if settings.near_duplicate_of == "question" else f"{' '.join(told)} / {' '.join(plain_words(pair.answer))}"


def _sifted(example: MShotExample, kept: "_Kept", signatures: Iterator[tuple[str, Sequence[int]]]) -> Sifted:
    rejects: list[Reject] = []
    shots: list[OneShotExample] = []
    for shot in example.shots:
        pairs: list[InstructionPair] = []
        for number, pair in enumerate(shot.pairs, 1):
            if GIVEN in pair.provenance:
                pairs.append(pair)
            elif (drop := kept.add(f"{shot.id}, pair {number}", *next(signatures))) is None:
                pairs.append(replace(pair, provenance={**pair.provenance, "filters": [*pair.provenance.get("filters", ()), NAME]}))
            else:
                piece = dropped_pair(pair, drop)
                rejects.append(Reject(where="filter", id=shot.id, reason=piece.reason, content=piece.content, detail=piece.detail))
        shots.append(replace(shot, pairs=tuple(pairs)))
    return Sifted(examples=_rechained(shots), rejects=rejects)


def _rechained(shots: Sequence[OneShotExample]) -> list[MShotExample]:
    """Return a chain of the texts that have pairs, and each of the others alone, in the order of their first texts."""
    chain = [shot for shot in shots if shot.pairs]
    groups = [chain] if chain else []
    groups += [[shot] for shot in shots if not shot.pairs]
    place = {shot.id: number for number, shot in enumerate(shots)}
    return [MShotExample(id=group[0].id, shots=tuple(group)) for group in sorted(groups, key=lambda group: place[group[0].id])]


class _Kept:
    """The pairs kept so far, by the hashes of bands of their signatures."""

    def __init__(self, path: Path, settings: FilterSettings) -> None:
        try:
            import rensa
        except ImportError as error:
            raise MissingPackageError("rensa", extra="synthesis", purpose=f"the filter {NAME}") from error
        self._minhash: Any = rensa.RMinHash
        self._most = settings.max_similarity
        self._rows = rows_of_a_band(settings.max_similarity)
        self._path, self._database = path, sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "locking_mode=EXCLUSIVE", f"cache_size=-{_CACHE_KIB}"):
            self._database.execute(f"PRAGMA {setting}")
        self._database.execute("CREATE TABLE pairs (number INTEGER PRIMARY KEY, place TEXT, written TEXT)")
        self._database.execute("CREATE TABLE bands (hash INTEGER PRIMARY KEY, numbers BLOB)")
        self._database.execute("BEGIN")
        marks = ",".join("?" * (_PERMUTATIONS // self._rows))
        self._buckets = f"SELECT hash, numbers FROM bands WHERE hash IN ({marks})"
        self._count = 0

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_: object) -> None:
        self._database.close()
        self._path.unlink()

    def signatures(self, texts: Sequence[str]) -> list[Sequence[int]]:
        """Return the MinHash signature of each text: _PERMUTATIONS numbers of 32 bits."""
        sets = [sorted(shingles(text)) for text in texts]
        signatures: list[Sequence[int]] = self._minhash.digests_from_token_sets(sets, num_perm=_PERMUTATIONS, seed=_SEED)
        return signatures

    def add(self, place: str, written: str, signature: Sequence[int]) -> Drop | None:
        """Keep a pair, or return which earlier one it repeats."""
        hashes = self._hashes(signature)
        buckets = {key: array("q", numbers) for key, numbers in self._database.execute(self._buckets, hashes)}
        for earlier_place, earlier in self._candidates(buckets):
            alike = similarity(written, earlier)
            if alike > self._most:
                return Drop("near-duplicate in the corpus", f"similarity {alike:.2f} to {earlier_place}: {earlier}")
        self._count += 1
        self._database.execute("INSERT INTO pairs VALUES (?, ?, ?)", (self._count, place, written))
        empty = array("q")
        rows = [(key, buckets.get(key, empty).tobytes() + array("q", [self._count]).tobytes()) for key in dict.fromkeys(hashes)]
        self._database.executemany("INSERT OR REPLACE INTO bands VALUES (?, ?)", [row for row in rows if len(row[1]) <= 8 * _BUCKET])
        return None

    def _candidates(self, buckets: Mapping[int, Sequence[int]]) -> list[tuple[str, str]]:
        """Return place and words of the earlier pairs that are most in these buckets, the earliest first."""
        matches = Counter(number for numbers in buckets.values() for number in numbers)
        best = sorted(sorted(matches, key=lambda number: (-matches[number], number))[:_CANDIDATES])
        marks = ",".join("?" * len(best))
        return self._database.execute(f"SELECT place, written FROM pairs WHERE number IN ({marks}) ORDER BY number", best).fetchall()

    def _hashes(self, signature: Sequence[int]) -> list[int]:
        """Return a number of 64 bits for each band of a signature."""
        starts = range(0, _PERMUTATIONS - self._rows + 1, self._rows)
        return [_mixed(number, signature[start : start + self._rows]) for number, start in enumerate(starts)]


def rows_of_a_band(threshold: float) -> int:
    """Return how many numbers of a signature make a band: as many as still find _RECALL of the pairs that are just at the threshold."""
    for rows in range(16, 1, -1):
        if 1 - (1 - threshold**rows) ** (_PERMUTATIONS // rows) >= _RECALL:
            return rows
    return 1


def _mixed(band: int, numbers: Sequence[int]) -> int:
    """Hash a band: the tuple hash of whole numbers is the same in every process."""
    return hash((band, *numbers))
