"""Faults on purpose, to see what a run does about them: the one place that can make them, and it is told so by name.

Comes in: the environment variable MEGATRON_INSTRUCT_REHEARSE, faults separated by ';', each a kind and NAME=VALUE words:

    nan-output module=decoder.layers.1.mlp step=5      the output of a module becomes NaN
    nan-gradient parameter=decoder.final_layernorm.weight step=5
    nan-weight parameter=… step=5                      once; the weight stays so
    spike factor=100 step=5                            the loss is multiplied
    slow seconds=0.01 step=5                           each call of core attention takes longer, from that step on
    signal name=SIGTERM step=5                         to the process itself, before the step

step=5 or step=5-7; rank=1 for one process alone (default: all); tries=1 for so many tries of a step (default: every one, so that it looks
like the batch's own fault). Everything is done from outside through torch's hooks: the code of the step knows nothing of it.
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_instruct.errors import ConfigError, did_you_mean

VARIABLE = "MEGATRON_INSTRUCT_REHEARSE"
_WORDS = {
    "nan-output": {"module"},
    "nan-gradient": {"parameter"},
    "nan-weight": {"parameter"},
    "spike": {"factor"},
    "slow": {"seconds"},
    "signal": {"name"},
}


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """One fault."""

    kind: str
    first: int
    last: int
    rank: int | None
    tries: int | None
    value: str

    def hits(self, iteration: int, attempt: int) -> bool:
        """Say whether a try of a step (from 1) has it on this rank."""
        mine = self.rank is None or self.rank == torch.distributed.get_rank()
        through = iteration >= self.first if self.kind == "slow" else self.first <= iteration <= self.last
        return mine and through and (self.tries is None or attempt <= self.tries)


def rehearsed() -> tuple[Rehearsed, ...]:
    """Return the faults that the environment asks for. Raises ConfigError for what it cannot mean."""
    return tuple(_parse(text) for text in os.environ.get(VARIABLE, "").split(";") if text.strip())


def _parse(text: str) -> Rehearsed:
    kind, *pairs = text.split()
    if kind not in _WORDS:
        raise ConfigError(f"{VARIABLE}: no fault {kind!r}{did_you_mean(kind, _WORDS)}")
    words = dict(pair.partition("=")[::2] for pair in pairs)
    (own,) = _WORDS[kind]
    if not {own, "step"} <= words.keys() <= {own, "step", "rank", "tries"}:
        raise ConfigError(f"{VARIABLE}: {text.strip()!r} needs {own}= and step=, and may have rank= and tries=.")
    first, _, last = words["step"].partition("-")
    try:
        rank, tries = (int(words[name]) if name in words else None for name in ("rank", "tries"))
        return Rehearsed(kind=kind, first=int(first), last=int(last or first), rank=rank, tries=tries, value=words[own])
    except ValueError as error:
        raise ConfigError(f"{VARIABLE}: {text.strip()!r}: {error}.") from error


@contextlib.contextmanager
def happening(faults: Sequence[Rehearsed], models: Sequence[torch.nn.Module], iteration: int, attempt: int) -> Iterator[None]:
    """Let the faults of this try of this step happen in this block."""
    with contextlib.ExitStack() as hooks:
        for fault in faults:
            if fault.hits(iteration, attempt):
                _arm(fault, models, hooks, attempt)
        yield


def _arm(fault: Rehearsed, models: Sequence[torch.nn.Module], hooks: contextlib.ExitStack, attempt: int) -> None:
    if fault.kind == "signal" and attempt == 1:
        os.kill(os.getpid(), signal.Signals[fault.value])
    for model in models:
        if fault.kind == "spike" and getattr(model, "post_process", True):
            hooks.callback(model.register_forward_hook(_times(float(fault.value))).remove)
        for name, module in model.named_modules():
            if fault.kind == "nan-output" and name == fault.value:
                hooks.callback(module.register_forward_hook(_times(float("nan"))).remove)
            if fault.kind == "slow" and name.endswith("core_attention"):
                hooks.callback(module.register_forward_pre_hook(lambda *_: time.sleep(float(fault.value))).remove)
        for name, parameter in model.named_parameters():
            if fault.kind == "nan-gradient" and name == fault.value:
                whole = getattr(parameter, "orig_param", parameter)  # Megatron-FSDP shows its shards between steps
                hooks.callback(whole.register_hook(_spoiled_gradient(whole)).remove)
            if fault.kind == "nan-weight" and name == fault.value and attempt == 1:
                parameter.detach().view(-1)[0] = float("nan")


def _spoiled_gradient(parameter: Any) -> Any:
    from megatron_instruct.training.first_fault import is_added_up  # here, since it loads megatron-core

    def hook(gradient: torch.Tensor) -> torch.Tensor | None:
        if not is_added_up(parameter):
            return gradient * float("nan")
        parameter.main_grad.fill_(float("nan"))
        return None

    return hook


def _times(factor: float) -> Any:
    def hook(_module: Any, _inputs: Any, output: Any) -> Any:
        return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

    return hook
