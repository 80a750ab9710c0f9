"""An engine that answers from a file: for tests of what stands around an engine, and to try a prompt format without a model.

The file is YAML: `completion` for every text (with {id} replaced by its id), `completions` by text id, `failures` by text id (how many
times its request fails first), `dead_after` (requests after which the engine dies), `seconds` that each request takes, `log` (a file to
which the id of every request is appended), `shuffle` (true: what is in work is finished in an order drawn from the ids).
`faults` draws, for each request and attempt, from `seed`: `failure`, `garbage` (a completion cut and turned around), `death` of the
engine, `kill` of the whole process, each with a probability.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_instruct.errors import ConfigError, EngineError, InputError
from megatron_instruct.synthesis.engines.engine import Completion, EngineSettings, Request


class ScriptedEngine:
    """Answers from a mapping."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.script is None:
            raise ConfigError("engine=scripted answers from a file; name it with --script.")
        if not settings.script.is_file():
            raise InputError(f"script {settings.script}: no such file.")
        self._script: dict[str, Any] = yaml.safe_load(settings.script.read_text(encoding="utf-8"))
        self._asked = 0
        self._failed: Counter[str] = Counter()
        """Times that each request which has not been answered yet failed."""
        self._in_work: list[Request] = []
        self.capacity = settings.in_flight or 64

    def submit(self, request: Request) -> None:
        if "log" in self._script:
            with open(self._script["log"], "a", encoding="utf-8") as log:
                log.write(f"{request.id}\n")
        self._in_work.append(request)

    def poll(self) -> Sequence[tuple[Request, Completion]]:
        """Finish one request: the earliest, or one that is drawn."""
        order = random.Random("".join(request.id for request in self._in_work)) if self._script.get("shuffle") else None
        request = self._in_work.pop(order.randrange(len(self._in_work)) if order else 0)
        return [(request, self._answer(request))]

    def close(self) -> None:
        self._in_work.clear()

    def _answer(self, request: Request) -> Completion:
        time.sleep(self._script.get("seconds", 0))
        self._asked += 1
        if self._asked > self._script.get("dead_after", self._asked):
            raise EngineError("the scripted engine died, as its script says.")
        attempt = self._failed[request.id]
        completion = self._attempt(request, attempt)
        if completion.error is None:
            del self._failed[request.id]
        else:
            self._failed[request.id] += 1
        return completion

    def _attempt(self, request: Request, attempt: int) -> Completion:
        if attempt < self._script.get("failures", {}).get(request.id, 0):
            return Completion(error="the script lets this request fail")
        text = self._script.get("completions", {}).get(request.id, self._script.get("completion", "")).replace("{id}", request.id)
        text = self._faulty(text, f"{request.id}:{attempt}") if "faults" in self._script else text
        return (
            Completion(text=text, tokens=len(text.split()), stopped=True) if text is not None else Completion(error="an injected failure")
        )

    def _faulty(self, text: str, what: str) -> str | None:
        """Return the text, another one, or None for a failure; or die."""
        faults = self._script["faults"]
        draw = random.Random(f"{faults['seed']}:{what}")
        if draw.random() < faults.get("kill", 0) and self._first_time(what):
            os.kill(os.getpid(), signal.SIGKILL)
        if draw.random() < faults.get("death", 0) and self._first_time(what):
            raise EngineError("an injected death of the engine")
        if draw.random() < faults.get("failure", 0):
            return None
        return text[: draw.randrange(len(text) + 1)][::-1] if draw.random() < faults.get("garbage", 0) else text

    def _first_time(self, what: str) -> bool:
        """Whether this fault has not happened yet; what killed a process once must not kill every one after it."""
        happened = Path(self._script["faults"]["memory"])
        if happened.is_file() and what in happened.read_text(encoding="utf-8").splitlines():
            return False
        with open(happened, "a", encoding="utf-8") as memory:
            memory.write(f"{what}\n")
        return True
