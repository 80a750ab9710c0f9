"""The seam between synthesis and whatever generates text.

An engine takes requests at any time and gives completions as they are finished, in any order, so that whoever asks never has to wait for a
whole batch. A request that fails is a completion with its error: only an engine that is dead raises.
"""

import hashlib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from megatron_instruct.errors import ConfigError, did_you_mean
from megatron_instruct.files import encodable


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One prompt."""

    id: str
    """Unique among the requests of a run: the raw text's id, or one made from it; an engine that samples derives its seed from it."""
    prompt: tuple[int, ...]
    """Token ids."""
    max_new_tokens: int
    grammar: str | None = None
    """What the completion must follow, in llguidance's Lark form."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What became of a request.

    Half of a surrogate pair in what an engine says, which no file could hold, is replaced by U+FFFD here, for all engines.
    """

    text: str = ""
    tokens: int = 0
    """Generated tokens."""
    stopped: bool = False
    """The model ended by itself; False at the limit of new tokens."""
    error: str | None = None
    """Why the request failed; None when it did not."""
    cached: int = 0
    """Tokens of the prompt that the engine had in its prefix cache."""
    attempts: int = 1
    """Times that it was asked; counted by the schedule, not by the engine."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", encodable(self.text))
        object.__setattr__(self, "error", None if self.error is None else encodable(self.error))


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
    in_flight: int | None
    """Requests in work at once; None leaves it to the engine."""
    tensor_parallel_size: int
    gpu_memory_utilization: float | None
    max_num_seqs: int | None
    kv_cache_gib: float
    """GiB for the KV cache on CPU."""
    threads: int | None
    """Threads on CPU."""
    enforce_eager: bool
    server_url: str | None
    server_model: str | None
    """Name of the model there; None takes the only one, or the one called like `model`."""
    server_prompt: Literal["ids", "text"]
    server_key_variable: str
    """Environment variable with the server's key."""
    request_timeout: float
    """Seconds."""
    server_patience: float
    """Seconds."""
    script: Path | None


class Engine(Protocol):
    """Generates completions."""

    capacity: int
    """Requests that keep it busy; more may be submitted and wait."""

    def submit(self, request: Request) -> None:
        """Take a request and return at once. Raises EngineError when the engine is dead."""
        ...

    def poll(self) -> Sequence[tuple[Request, Completion]]:
        """Wait until at least one request that was submitted is finished; return those that are. To be called with a request in work.

        Raises EngineError when the engine is dead.
        """
        ...

    def close(self) -> None:
        """Give back what the engine holds; what is in work is lost."""
        ...


ENGINES = {
    "vllm": "megatron_instruct.synthesis.engines.vllm:VllmEngine",
    "server": "megatron_instruct.synthesis.engines.server:ServerEngine",
    "scripted": "megatron_instruct.synthesis.engines.scripted:ScriptedEngine",
}


def seed_of(settings: EngineSettings, request: Request) -> int | None:
    """Return the seed of a request's own random stream; None where nothing is drawn."""
    digest = hashlib.sha256(f"{settings.seed}:{request.id}".encode()).digest()
    return int.from_bytes(digest[:4], "little") if settings.temperature > 0 else None


def load_engine(name: str, settings: EngineSettings) -> Engine:
    """Load an engine by name; raises ConfigError, MissingPackageError or EngineError."""
    if name not in ENGINES:
        raise ConfigError(f"engine={name!r} is unknown{did_you_mean(name, ENGINES)}")
    module, _, attribute = ENGINES[name].partition(":")
    engine: Engine = getattr(importlib.import_module(module), attribute)(settings)
    return engine
