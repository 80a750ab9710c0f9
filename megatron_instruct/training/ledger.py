"""faults.jsonl in --save: what went wrong in a run and what was done, one event a line, read again by a run that goes on.

Comes in: events, the same on every rank; the first writes them. Goes out: which steps are left out, and the counts that the progress line
and metrics.jsonl show. Events of a run with other settings in the same folder stay in the file and count for nothing.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_instruct.files import append, atomic_write, read_lines

LEDGER_FILE = "faults.jsonl"


class Ledger:
    """The events of one run. Every rank makes it, since the first one reads for all."""

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        import torch.distributed  # here, so that a page of runs is made without it

        self._path = folder / LEDGER_FILE
        same = {**identity, "phases": None}  # which may change before they begin
        self._run = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:16]
        self._first = torch.distributed.get_rank() == 0
        read: list[Any] = [_read(self._path) if self._first else None]
        torch.distributed.broadcast_object_list(read, src=0)
        self.events: list[dict[str, Any]] = []
        self._left_out: set[int] = set()
        for event in read[0]:
            if event["run"] == self._run:
                self._note(event)

    def add(self, kind: str, iteration: int, text: str, **details: Any) -> None:
        """Record an event, on the disk before anything else is done, and print its text."""
        event = {"kind": kind, "iteration": iteration, "text": text, **details, "run": self._run}
        self._note(event)
        if self._first:
            append(self._path, [json.dumps(event, ensure_ascii=False)])
            print(text, flush=True)

    def _note(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        if event["kind"] in ("skip", "empty"):
            self._left_out.add(event["iteration"])
        elif event["kind"] == "rollback":
            self._left_out.update(range(event["checkpoint"] + 1, event["iteration"] + 1))

    @property
    def skipped(self) -> set[int]:
        """The steps whose batch was bad."""
        return self.steps("skip")

    def steps(self, kind: str) -> set[int]:
        """Return the steps that had an event of a kind."""
        return {event["iteration"] for event in self.events if event["kind"] == kind}

    def leaves_out(self, iteration: int) -> bool:
        """Say whether a step is left out: its batch was bad or counts for nothing, or the run went back to a checkpoint before it."""
        return iteration in self._left_out

    def count(self, kind: str) -> int:
        """Return the events of a kind over the whole run."""
        return sum(event["kind"] == kind for event in self.events)

    def counts(self, iteration: int) -> dict[str, int]:
        """Return the steps up to this one that were left out, and the steps that were run twice and the rollbacks so far."""
        skipped = sum(step <= iteration for step in self._left_out)
        return {"skipped": skipped, "reruns": self.count("rerun"), "rollbacks": self.count("rollback")}


def _read(path: Path) -> list[dict[str, Any]]:
    """Read the events; a line that a kill cut short is dropped."""
    if not path.is_file():
        return []
    lines = read_lines(path)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):
        with atomic_write(path) as stream:
            stream.writelines(whole)
    return [json.loads(line) for line in whole]
