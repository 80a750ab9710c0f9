"""An engine that answers from a file: for tests of what stands around an engine, and to try a prompt format without a model.

The file is YAML: `completion` for every text (with {id} replaced by its id), `completions` by text id, `failures` by text id (how many
times its request fails first), `dead_after` (requests after which the engine dies), `seconds` that each request takes.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
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
        self._failed: Counter[str] = Counter()
        self._answered = 0

    def begin_shard(self) -> None:
        self._failed.clear()

    def generate(self, requests: Sequence[Request], report: Callable[[int, int], None]) -> list[Completion]:
        completions = []
        for request in requests:
            completions.append(self._answer(request))
            report(1, completions[-1].tokens)
        return completions

    def _answer(self, request: Request) -> Completion:
        time.sleep(self._script.get("seconds", 0))
        self._answered += 1
        if self._answered > self._script.get("dead_after", self._answered):
            raise EngineError("the scripted engine died, as its script says.")
        if self._failed[request.id] < self._script.get("failures", {}).get(request.id, 0):
            self._failed[request.id] += 1
            return Completion(error="the script lets this request fail")
        text = self._script.get("completions", {}).get(request.id, self._script.get("completion", ""))
        return Completion(text=text.replace("{id}", request.id), tokens=len(text.split()), stopped=True)
