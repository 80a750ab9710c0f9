"""An engine that answers from a YAML file, a `Script`: for tests of what stands around an engine, and to try a format without a model."""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import yaml
from msgspec import Meta, Struct

from megatron_instruct.errors import ConfigError, EngineError, InputError
from megatron_instruct.synthesis.engines.engine import Completion, EngineSettings, Request


class Faults(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What goes wrong, drawn for each request and attempt; each with a probability."""

    seed: int
    memory: str | None = None
    """File of the deaths and kills that happened, since each happens once."""
    failure: float = 0.0
    garbage: float = 0.0
    """A completion cut and turned around."""
    death: float = 0.0
    """Of the engine."""
    kill: float = 0.0
    """Of the whole process."""

    def __post_init__(self) -> None:
        if self.memory is None and (self.death or self.kill):
            raise ValueError("`death` and `kill` need `memory`, a file")


class Script(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is answered."""

    completion: str = ""
    """For every text, with {id} replaced by its id."""
    completions: dict[str, str] = {}
    """By text id."""
    failures: dict[str, int] = {}
    """Times that a text's request fails first, by its id."""
    dead_after: int | None = None
    """Requests after which the engine dies."""
    seconds: Annotated[float, Meta(ge=0)] = 0.0
    """That each request takes."""
    log: str | None = None
    """File to which the id of every request is appended."""
    shuffle: bool = False
    """What is in work is finished in an order drawn from the ids."""
    faults: Faults | None = None


class ScriptedEngine:
    """Answers from a script."""

    def __init__(self, settings: EngineSettings) -> None:
        if settings.script is None:
            raise ConfigError("engine=scripted answers from a file; name it with --script.")
        if not settings.script.is_file():
            raise InputError(f"script {settings.script}: no such file.")
        try:
            self._script = msgspec.convert(yaml.safe_load(settings.script.read_text(encoding="utf-8")) or {}, Script)
        except (yaml.YAMLError, ValueError) as error:
            raise InputError(f"script {settings.script}: {error}; it is YAML with {', '.join(Script.__struct_fields__)}.") from error
        self._asked = 0
        self._failed: Counter[str] = Counter()
        """Times that each request which has not been answered yet failed."""
        self._in_work: list[Request] = []
        self.capacity = settings.in_flight or 64

    def submit(self, request: Request) -> None:
        if self._script.log is not None:
            with open(self._script.log, "a", encoding="utf-8") as log:
                log.write(f"{request.id}\n")
        self._in_work.append(request)

    def poll(self) -> Sequence[tuple[Request, Completion]]:
        """Finish one request: the earliest, or one that is drawn."""
        order = random.Random("".join(request.id for request in self._in_work)) if self._script.shuffle else None
        request = self._in_work.pop(order.randrange(len(self._in_work)) if order else 0)
        return [(request, self._answer(request))]

    def close(self) -> None:
        self._in_work.clear()

    def _answer(self, request: Request) -> Completion:
        time.sleep(self._script.seconds)
        self._asked += 1
        if self._script.dead_after is not None and self._asked > self._script.dead_after:
            raise EngineError("the scripted engine died, as its script says.")
        attempt = self._failed[request.id]
        completion = self._attempt(request, attempt)
        if completion.error is None:
            del self._failed[request.id]
        else:
            self._failed[request.id] += 1
        return completion

    def _attempt(self, request: Request, attempt: int) -> Completion:
        if attempt < self._script.failures.get(request.id, 0):
            return Completion(error="the script lets this request fail")
        text = self._script.completions.get(request.id, self._script.completion).replace("{id}", request.id)
        faulty = text if self._script.faults is None else _faulty(text, f"{request.id}:{attempt}", self._script.faults)
        if faulty is None:
            return Completion(error="an injected failure")
        return Completion(text=faulty, tokens=len(faulty.split()), stopped=True)


def _faulty(text: str, what: str, faults: Faults) -> str | None:
    """Return the text, another one, or None for a failure; or die."""
    draw = random.Random(f"{faults.seed}:{what}")
    if draw.random() < faults.kill and _first_time(what, faults):
        os.kill(os.getpid(), signal.SIGKILL)
    if draw.random() < faults.death and _first_time(what, faults):
        raise EngineError("an injected death of the engine")
    if draw.random() < faults.failure:
        return None
    return text[: draw.randrange(len(text) + 1)][::-1] if draw.random() < faults.garbage else text


def _first_time(what: str, faults: Faults) -> bool:
    """Whether this fault has not happened yet; what killed a process once must not kill every one after it."""
    assert faults.memory is not None, "checked with the script"
    happened = Path(faults.memory)
    if happened.is_file() and what in happened.read_text(encoding="utf-8").splitlines():
        return False
    with open(happened, "a", encoding="utf-8") as memory:
        memory.write(f"{what}\n")
    return True
