"""Any running server with OpenAI's completions endpoint, such as vLLM's.

Requests go out side by side, from one thread. One that fails, times out or is answered with garbage fails alone; 429 and 5xx, and what a
connection was lost for while the server answers others, are asked again after a pause; a server that cannot be reached is waited for, and
is dead when it stays away. No answer is believed unseen.
"""

import asyncio
import math
import os
import queue
import threading
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from megatron_instruct.errors import ConfigError, EngineError, MissingPackageError, did_you_mean
from megatron_instruct.synthesis.engines.engine import Completion, EngineSettings, Request, seed_of
from megatron_instruct.tokenizer import load_tokenizer

_CAPACITY = 64
_TRIES = 6
"""Times that a busy or failing server is asked, with pauses of 0.5, 1, 2, 4 and 8 seconds between, or of what it asks for itself."""
_LONGEST_PAUSE = 60.0
"""Seconds."""
_ALL_TOKENS = -1
"""vLLM's top_k that leaves no token out, in every version (0 does so in newer ones)."""


class ServerEngine:
    """A thread with an event loop that has up to `capacity` requests at the server."""

    def __init__(self, settings: EngineSettings) -> None:
        """Raises EngineError where no server answers in time, and ConfigError where it is not one that can do what is asked."""
        try:
            import httpx
            import openai
        except ImportError as error:
            raise MissingPackageError("openai", extra="synthesis", purpose="engine=server") from error
        assert settings.server_url is not None, "checked with the settings"
        self._settings, self._openai, self._url = settings, openai, settings.server_url.rstrip("/")
        self._response = httpx.Response
        key = os.environ.get(settings.server_key_variable) or "none"
        self._client = openai.AsyncOpenAI(base_url=self._url, api_key=key, timeout=None, max_retries=0)  # its timeouts are of single reads
        self._tokenizer = load_tokenizer(settings.tokenizer) if settings.server_prompt == "text" else None
        self.capacity = settings.in_flight or _CAPACITY
        self._answered: queue.SimpleQueue[tuple[Request, Completion | Exception]] = queue.SimpleQueue()
        self._loop, self._turns, self._over = asyncio.new_event_loop(), asyncio.Semaphore(self.capacity), asyncio.Event()
        threading.Thread(target=asyncio.run, args=(self._live(),), kwargs={"loop_factory": lambda: self._loop}, daemon=True).start()
        try:
            self._model = self._started(self._find_model()).result()
            if settings.structured and not self._model.by_vllm:
                raise ConfigError(
                    f"the prompt format forces its form, and server {self._url} is not vLLM's (owned_by in its list of models), which "
                    "alone can do so; use another format."
                )
        except BaseException:
            self.close()
            raise

    def submit(self, request: Request) -> None:
        self._started(self._serve(request))

    def poll(self) -> Sequence[tuple[Request, Completion]]:
        finished: list[tuple[Request, Completion]] = []
        while not finished or not self._answered.empty():
            request, answer = self._answered.get()
            if isinstance(answer, Exception):
                raise answer
            finished.append((request, answer))
        return finished

    def close(self) -> None:
        """Let the thread go; nobody waits for it, or for what is in work."""
        self._loop.call_soon_threadsafe(self._over.set)

    def _started[T](self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _live(self) -> None:
        """Keep the loop until the engine is closed; whoever runs this cancels what is left."""
        await self._over.wait()
        await self._client.close()

    async def _serve(self, request: Request) -> None:
        try:
            async with self._turns:
                self._answered.put((request, await self._ask(request)))
        except Exception as error:  # poll raises it, a mistake of ours too: nobody would hear of it here
            self._answered.put((request, error))

    async def _ask(self, request: Request) -> Completion:
        """Ask until there is an answer, or reason to give up."""
        openai, seconds = self._openai, self._settings.request_timeout
        for pause in _pauses():
            try:
                asked = self._client.post("/completions", cast_to=self._response, body=self._body(request))
                return self._completion(request, await asyncio.wait_for(asked, seconds))
            except TimeoutError:
                return Completion(error=f"no answer within request_timeout={seconds:g} seconds")
            except openai.APIConnectionError as error:
                if not await self._lives():
                    raise EngineError(f"server {self._url} is gone: {_cause(error)}") from error
                if pause is None:
                    return Completion(error=f"the connection was lost {_TRIES} times, at last with: {_cause(error)}")
                await asyncio.sleep(pause)
            except openai.APIStatusError as error:
                if pause is None or not (error.status_code == 429 or error.status_code >= 500):
                    return Completion(error=f"the server answered {error.status_code}: {_shortened(error.message)}")
                await asyncio.sleep(_asked_pause(error) or pause)
            except _Garbage as error:
                return Completion(error=str(error))
        raise AssertionError("the last try returns")

    def _body(self, request: Request) -> dict[str, Any]:
        """Return what is asked, with all that decides the answer: what is left out, a server takes from the model's generation_config.

        (openai's own `completions.create` looks at each token of a prompt in Python: 50 ms for 2,000 of them in 3.57.)
        """
        settings, seed, extra = self._settings, seed_of(self._settings, request), dict[str, Any]()
        if self._model.by_vllm:
            extra = {"top_k": _ALL_TOKENS, "min_p": 0.0}
        if self._model.by_vllm or settings.repetition_penalty != 1:  # other servers may refuse what OpenAI's does not know
            extra["repetition_penalty"] = settings.repetition_penalty
        if request.grammar is not None:
            extra["structured_outputs"] = {"grammar": request.grammar}
        return {
            "model": self._model.name,
            "prompt": list(request.prompt) if self._tokenizer is None else self._text(request.prompt),
            "max_tokens": request.max_new_tokens,
            "temperature": settings.temperature,
            "top_p": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            **extra,
            **({} if seed is None else {"seed": seed}),
        }

    def _text(self, prompt: Sequence[int]) -> str:
        """Return the prompt as text, without the BOS that servers add themselves."""
        assert self._tokenizer is not None, "asked for with server_prompt=text"
        return self._tokenizer.decode(prompt[1:] if prompt and prompt[0] == self._tokenizer.bos else prompt)

    def _completion(self, request: Request, response: Any) -> Completion:
        value = _json(response)
        try:
            (choice,) = value["choices"]
            text, reason, usage = choice["text"], choice["finish_reason"], value.get("usage") or {}
            tokens = int(usage["completion_tokens"])
            cached = int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
        except Exception as error:  # an answer may be anything, and fails its own request alone
            raise _Garbage(f"the server's answer is no completion ({type(error).__name__}: {error}): {_content(response)}") from error
        if not isinstance(text, str) or reason not in ("stop", "length"):
            raise _Garbage(f"the server ended the completion with finish_reason={_shortened(reason)}, text {_shortened(text)}")
        counted = self._model.by_vllm and self._tokenizer is None  # in the tokens that we count in
        if counted and reason == "length" and tokens < request.max_new_tokens:
            raise _Garbage(f"the server ended the completion after {tokens} of max_new_tokens={request.max_new_tokens}; {_SHORT}")
        return Completion(text=text, tokens=tokens, stopped=reason == "stop", cached=cached)

    async def _find_model(self) -> "_Model":
        """Return the model to ask; also the first sign of life."""
        models = {one.name: one for one in await self._models()}
        wanted = self._settings.server_model
        if wanted is None:
            own = str(self._settings.model)
            wanted = own if own in models else next(iter(models)) if len(models) == 1 else None
        if wanted is None:
            raise ConfigError(f"server {self._url} has {len(models)} models: {', '.join(models)}; choose one with --server-model.")
        if wanted not in models:
            raise ConfigError(f"server {self._url} has no model {wanted!r}{did_you_mean(wanted, models)}")
        longest = models[wanted].max_model_len
        if isinstance(longest, int) and longest < self._settings.max_model_len:
            raise ConfigError(
                f"max_model_len={self._settings.max_model_len} is above the {longest} tokens of the server's {wanted}; lower it."
            )
        return models[wanted]

    async def _lives(self) -> bool:
        """Whether the server answers at all."""
        try:
            await self._list()
        except self._openai.APIStatusError:
            return True
        except (self._openai.APIConnectionError, TimeoutError):
            return False
        return True

    async def _list(self) -> Any:
        return await asyncio.wait_for(self._client.get("/models", cast_to=self._response), min(self._settings.request_timeout, 30))

    async def _models(self) -> "list[_Model]":
        """Ask for the server's models, again and again while it cannot be reached, for as long as it is waited for."""
        openai = self._openai
        deadline = time.monotonic() + self._settings.server_patience
        for pause in _pauses(endless=True):
            assert pause is not None, "without end"
            try:
                value = _json(await self._list())
                return [_Model(str(one["id"]), one.get("max_model_len"), one.get("owned_by") == "vllm") for one in value["data"]]
            except openai.APIStatusError as error:
                if error.status_code < 500:
                    raise ConfigError(f"server {self._url} answered {error.status_code}: {_shortened(error.message)}{_HINT}") from error
                reason = f"answered {error.status_code}"
            except (openai.APIConnectionError, TimeoutError) as error:
                reason = f"cannot be reached: {_cause(error)}"
            except (_Garbage, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"server {self._url} does not list its models, so it is none of OpenAI's interface{_HINT}") from error
            if time.monotonic() + pause > deadline:
                raise EngineError(f"server {self._url} {reason}, for {self._settings.server_patience:g} seconds{_HINT}")
            await asyncio.sleep(pause)
        raise AssertionError("pauses do not end")


_SHORT = "its --generation-config or --override-generation-config has a max_new_tokens; leave that out, or lower ours."
_HINT = (
    "; start one, such as `python -m vllm.entrypoints.openai.api_server --model MODEL`, or mend --server-url (it ends with /v1) or the key."
)


@dataclass(frozen=True, slots=True)
class _Model:
    name: str
    max_model_len: int | None
    """Tokens, where the server says it."""
    by_vllm: bool
    """Its server is vLLM's, which names itself as the owner."""


class _Garbage(Exception):
    """An answer that is none, for the reason that it carries."""


def _json(response: Any) -> Any:
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        raise _Garbage(f"the server's answer is no JSON: {_content(response)}") from error


def _content(response: Any) -> str:
    """Return the beginning of an answer, whatever it is."""
    return _shortened(response.content.decode(errors="replace"))


def _pauses(*, endless: bool = False) -> Iterator[float | None]:
    """Yield the seconds to wait after each try; None after the last."""
    pause = 0.5
    for _ in iter(int, 1) if endless else range(_TRIES - 1):
        yield pause
        pause = min(2 * pause, 8.0)
    yield None


def _asked_pause(error: Any) -> float | None:
    """Return the seconds that the server asks to wait, where it says so in a finite number that is not negative."""
    try:
        pause = float(error.response.headers.get("retry-after", ""))
    except ValueError:
        return None
    return min(pause, _LONGEST_PAUSE) if 0.0 <= pause < math.inf else None


def _cause(error: Exception) -> str:
    return "no answer in time" if isinstance(error, TimeoutError) else str(error.__cause__ or error)


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}…"
