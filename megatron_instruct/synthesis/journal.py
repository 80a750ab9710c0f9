"""The finished requests of a shard that is not finished: a file that only grows, so that no answer is asked for twice.

One JSON object a line, written as soon as a request is finished, so that it outlives the process; flushed to the disk now and then, so that
a machine that loses power loses a second's work. A last line that was cut short is ignored. Held by one process at a time.
Does not know: what is asked, or why.
"""

import fcntl
import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_instruct.synthesis.engines.engine import Completion, Request

_SECONDS = 1.0
"""Between two flushes to the disk."""
_FIELDS = ("text", "tokens", "stopped", "error", "cached", "attempts")


class Journal:
    """What is known of a shard's requests."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        """Read what an earlier run wrote; waits where another process still holds the file, such as a worker whose run was killed."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        self._stream = open(path, "a+b", buffering=0)  # noqa: SIM115  kept open until the shard is finished
        _hold(self._stream.fileno(), path)
        self._known: dict[str, dict[str, Any]] = {}
        self._flushed = clock()
        self.answers: dict[int, list[int]] = {}
        """Requests finished, and tokens generated, in each second of the clock in which there were any."""
        self._read()

    def _read(self) -> None:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        for line in content[:whole].splitlines():
            try:
                entry = json.loads(line)
                self._known[entry["id"]] = entry
                self._note(entry)
            except (ValueError, KeyError, TypeError):
                continue  # a machine that lost power may have left anything; such a request is asked again
        if whole < len(content):
            self._stream.truncate(whole)

    def __len__(self) -> int:
        """Count the answers of an earlier run that were not taken yet."""
        return len(self._known)

    def take(self, request: Request) -> Completion | None:
        """Return the answer to this very request, or None when it is to be asked."""
        entry = self._known.pop(request.id, None)
        if entry is None or entry.get("prompt") != _digest(request):
            return None
        return Completion(**{name: entry[name] for name in _FIELDS if name in entry})

    def write(self, request: Request, completion: Completion) -> None:
        """Keep the answer to a request for good."""
        entry: dict[str, Any] = {"id": request.id, "prompt": _digest(request), "at": round(self._clock(), 3)}
        entry |= {name: getattr(completion, name) for name in _FIELDS}
        self._stream.write(json.dumps(entry, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._note(entry)
        if self._clock() - self._flushed >= _SECONDS:
            os.fsync(self._stream.fileno())
            self._flushed = self._clock()

    def _note(self, entry: Mapping[str, Any]) -> None:
        answers = self.answers.setdefault(int(entry["at"]), [0, 0])
        answers[0] += 1
        answers[1] += entry["tokens"]

    def close(self) -> None:
        """Flush what is there, and let the file go."""
        if not self._stream.closed:
            os.fsync(self._stream.fileno())
            self._stream.close()

    def remove(self) -> None:
        """The shard is finished: its own files hold all that was said."""
        self._path.unlink(missing_ok=True)
        self._stream.close()


def _digest(request: Request) -> str:
    """Return what tells this prompt from another one for the same text."""
    digest = hashlib.blake2b(array("q", request.prompt).tobytes(), digest_size=8)
    digest.update(f"{request.max_new_tokens}:{request.grammar}".encode())
    return digest.hexdigest()


def _hold(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"A worker of an earlier run still holds {path}; waiting for it to end.", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
