"""vLLM in this process, on CPU or GPU (vLLM 0.32).

Runs without vLLM's separate engine process, since only then is its scheduling the same from run to run, as vLLM's page on reproducibility
says; and compiles grammars before a request is scheduled, for the same reason.
"""

import os
import re
import warnings
from collections.abc import Sequence
from typing import Any

from megatron_instruct.errors import EngineError, MissingPackageError
from megatron_instruct.synthesis.engines.engine import Completion, EngineSettings, Request, seed_of

_CPU_BLOCK = 32
"""Tokens that the prefix cache keeps or forgets together. vLLM takes 128 on CPU, so that of a chain's prompt 64 tokens more were computed
again on average; it wants a multiple of 32 there."""


class VllmEngine:
    """Owns a vllm.LLM and drives it step by step: requests enter between two steps, completions leave after the step that finished them."""

    def __init__(self, settings: EngineSettings) -> None:
        on_cpu = _set_environment(settings)
        warnings.filterwarnings("ignore", message=".*torch.distributed.reduce_op. is deprecated")  # vLLM 0.32 looks through all of torch
        try:
            import vllm
            import vllm.exceptions
        except ImportError as error:
            raise MissingPackageError("vllm", extra="synthesis", purpose="engine=vllm") from error
        self._settings, self._vllm = settings, vllm
        try:
            self.llm: Any = vllm.LLM(**_arguments(settings, on_cpu=on_cpu))
        except (ValueError, RuntimeError, OSError) as error:
            raise EngineError(f"vLLM could not load {settings.model}: {_first_line(error)}") from error
        self._engine: Any = self.llm.llm_engine
        manager = self._engine.engine_core.engine_core.structured_output_manager
        manager._use_async_grammar_compilation = False  # vLLM 0.32: its threads would decide which step a request enters
        self.capacity = settings.in_flight or int(self._engine.vllm_config.scheduler_config.max_num_seqs)
        self._in_work: dict[str, Request] = {}
        self._refused: list[tuple[Request, Completion]] = []

    def submit(self, request: Request) -> None:
        try:
            self._engine.add_request(request.id, {"prompt_token_ids": list(request.prompt)}, self._sampling(request))
        except (ValueError, self._vllm.exceptions.VLLMError) as error:
            self._refused.append((request, Completion(error=_first_line(error))))
        else:
            self._in_work[request.id] = request

    def poll(self) -> Sequence[tuple[Request, Completion]]:
        finished, self._refused = self._refused, []
        try:
            while not finished:
                outputs = (output for output in self._engine.step() if output.finished)
                finished += [(self._in_work.pop(output.request_id), _completion(output)) for output in outputs]
        except Exception as error:  # vLLM raises many kinds here, and none leaves an engine that goes on
            raise EngineError(f"vLLM died: {type(error).__name__}: {_first_line(error)}; finished requests are kept.") from error
        return finished

    def close(self) -> None:
        """Free the memory of the device, so that another engine can be loaded."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._engine.engine_core.shutdown()
        del self.llm, self._engine
        cleanup_dist_env_and_memory()

    def _sampling(self, request: Request) -> Any:
        structured = None
        if request.grammar is not None:
            structured = self._vllm.sampling_params.StructuredOutputsParams(grammar=request.grammar)
        return self._vllm.SamplingParams(
            temperature=self._settings.temperature,
            max_tokens=request.max_new_tokens,
            repetition_penalty=self._settings.repetition_penalty,
            seed=seed_of(self._settings, request),
            structured_outputs=structured,
        )


def _set_environment(settings: EngineSettings) -> bool:
    """Set what vLLM reads when it is imported; return whether there is no CUDA device."""
    import torch

    on_cpu = not torch.cuda.is_available()
    defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        defaults |= {"VLLM_CPU_KVCACHE_SPACE": f"{settings.kv_cache_gib:g}", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
        if settings.threads is not None:
            defaults |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(settings.threads)}
            torch.set_num_threads(settings.threads)
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    return on_cpu


def _arguments(settings: EngineSettings, *, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of vllm.LLM. On CPU: float32, unless a dtype was named, since bf16 is slower there; little memory reserved."""
    utilization = settings.gpu_memory_utilization
    arguments = {
        "model": str(settings.model),
        "tokenizer": str(settings.tokenizer),
        "max_model_len": settings.max_model_len,
        "dtype": "float32" if settings.dtype == "auto" and on_cpu else settings.dtype,
        "seed": settings.seed,
        "tensor_parallel_size": settings.tensor_parallel_size,
        "gpu_memory_utilization": utilization if utilization is not None else (0.3 if on_cpu else 0.9),
        "enforce_eager": settings.enforce_eager or on_cpu,
        "max_num_seqs": settings.max_num_seqs,
        "block_size": _CPU_BLOCK if on_cpu else None,
        "use_tqdm_on_load": False,
        "structured_outputs_config": {"backend": "guidance"} if settings.structured else None,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _completion(output: Any) -> Completion:
    text = output.outputs[0]
    cached = output.num_cached_tokens or 0
    return Completion(text=text.text, tokens=len(text.token_ids), stopped=text.finish_reason == "stop", cached=cached)


def _first_line(error: Exception) -> str:
    """Return the first line that says something: pydantic begins by counting, and names the place."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and re.match(r"\d+ validation errors? for ", lines[0]):
        lines = [line.partition(" [type=")[0] for line in lines[1:] if " [type=" in line]
    return lines[0] if lines else type(error).__name__
