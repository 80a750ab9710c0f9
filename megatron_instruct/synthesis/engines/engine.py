"""The seam between synthesis and whatever generates text.

An engine is loaded once, is told where a shard begins, and answers whole batches. A request that fails is an answer with its error: only an
engine that is dead raises.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_instruct.errors import ConfigError, did_you_mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt."""

    id: str
    """The raw text's id; an engine that samples derives its seed from it."""
    prompt: tuple[int, ...]
    """Token ids."""
    max_new_tokens: int
    grammar: str | None = None
    """What the completion must follow, in llguidance's Lark form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What became of a request."""

    text: str = ""
    tokens: int = 0
    """Generated tokens."""
    stopped: bool = False
    """The model ended by itself; False at the limit of new tokens."""
    error: str | None = None
    """Why the request failed; None when it did not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """What an engine is loaded with. Names as in vLLM."""

    model: Path
    tokenizer: Path
    max_model_len: int
    temperature: float
    repetition_penalty: float
    seed: int
    dtype: str
    structured: bool
    """Requests will have grammars."""
    tensor_parallel_size: int
    gpu_memory_utilization: float | None
    max_num_seqs: int | None
    kv_cache_gib: float
    """GiB for the KV cache on CPU."""
    threads: int | None
    """Threads on CPU."""
    enforce_eager: bool
    script: Path | None


class Engine(Protocol):
    """Generates completions."""

    def begin_shard(self) -> None:
        """Forget what earlier requests left, so that a shard gives the same bytes in whatever run it is made."""
        ...

    def generate(self, requests: Sequence[Request], report: Callable[[int, int], None]) -> list[Completion]:
        """Answer all requests, in their order.

        report: called with the requests finished and the tokens generated since the last call. Raises EngineError when the engine is dead.
        """
        ...


ENGINES = {
    "vllm": "megatron_instruct.synthesis.engines.vllm:VllmEngine",
    "scripted": "megatron_instruct.synthesis.engines.scripted:ScriptedEngine",
}


def load_engine(name: str, settings: EngineSettings) -> Engine:
    """Load an engine by name; raises ConfigError, MissingPackageError or EngineError."""
    if name not in ENGINES:
        raise ConfigError(f"engine={name!r} is unknown{did_you_mean(name, ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)(settings)
    return engine
