"""Which worker makes which shard, and what they report: the same for processes of one machine and for actors on many."""

from collections.abc import Sequence

from megatron_instruct.synthesis.schedule import Usage
from megatron_instruct.synthesis.worker import NextShard, Report


class Dispatch:
    """Gives out shards one by one, takes back those of workers that are lost, and adds up what is reported."""

    def __init__(self, shards: Sequence[int]) -> None:
        self._left = list(reversed(shards))
        self._held: dict[int, set[int]] = {}
        self._texts, self._usage = 0, Usage()

    def next_shard(self, worker: int) -> NextShard | None:
        """Give a worker a shard, or None when none is left."""
        if not self._left:
            return None
        shard = self._left.pop()
        self._held.setdefault(worker, set()).add(shard)
        return NextShard(number=shard, last=not self._left)

    def report(self, worker: int, report: Report) -> None:
        """Note what a worker did."""
        if report.finished_shard is not None:
            self._held[worker].discard(report.finished_shard)
        self._texts += report.texts
        self._usage += report.usage

    def take_back(self, worker: int) -> int:
        """Give the unfinished shards of a worker that is lost to the others; return how many there are."""
        shards = self._held.pop(worker, set())
        self._left += sorted(shards, reverse=True)
        return len(shards)

    def reported(self) -> Report:
        """Return what was reported since the last call."""
        report = Report(texts=self._texts, usage=self._usage)
        self._texts, self._usage = 0, Usage()
        return report
