"""Where in the model a number first was not finite, over all ranks.

Comes in: the model chunks of a rank, while a step that was bad runs again. Goes out: one sentence that names rank, layer and module or
parameter, and the microbatch. Does not know: what is done about it.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

_WEIGHT, _OUTPUT, _GRADIENT = range(3)


@dataclass(frozen=True, order=True)
class Fault:
    """Something that is not finite; the least of several came first."""

    kind: int
    microbatch: int
    """From 0; of a weight, and of a gradient where all were at fault, 0."""
    place: int
    """In the order in which stages work: forward for outputs, backward for gradients."""
    order: int
    rank: int
    data_rank: int
    text: str

    @property
    def names_microbatch(self) -> bool:
        """Whether it is known which microbatch is at fault."""
        return self.kind == _OUTPUT

    @property
    def of_weights(self) -> bool:
        """Whether the weights are not finite themselves, so that no batch is to blame."""
        return self.kind == _WEIGHT


class Faults:
    """The first faults of this rank; `watching` looks for them."""

    def __init__(self, models: Sequence[torch.nn.Module]) -> None:
        self._models = models
        self._output: Fault | None = None
        self._gradient: Fault | None = None
        self._forwards = [0] * len(models)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Look at every module's output and every parameter's gradient in this block."""
        with contextlib.ExitStack() as hooks:
            for number, model in enumerate(self._models):
                hooks.callback(model.register_forward_pre_hook(self._count(number)).remove)
                for name, module in model.named_modules():
                    hooks.callback(module.register_forward_hook(self._look_at_output(number, name)).remove)
                for name, shown in model.named_parameters():
                    parameter = getattr(shown, "orig_param", shown)  # Megatron-FSDP shows its shards between steps
                    if parameter.requires_grad:
                        handle = parameter.register_hook(self._look_at_gradient(number, name, parameter))
                        hooks.callback(handle.remove)
            yield

    def first(self) -> Fault | None:
        """Return the first fault of all ranks, the same on each; None where everything is finite. Collective."""
        mine = min((fault for fault in (self._weight(), self._output, self._gradient) if fault is not None), default=None)
        found: list[Fault | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, mine)
        return min((fault for fault in found if fault is not None), default=None)

    def _weight(self) -> Fault | None:
        for number, model in enumerate(self._models):
            for name, parameter in model.named_parameters():
                if not _finite(getattr(parameter, "_local_tensor", parameter)):  # a rank looks at its own shard
                    return self._fault(_WEIGHT, number, name, "the weight", microbatch=0)
        return None

    def _count(self, number: int) -> Any:
        def hook(*_: Any) -> None:
            self._forwards[number] += 1

        return hook

    def _look_at_output(self, number: int, name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple | list) else (output,)
            if self._output is None and not all(_finite(tensor) for tensor in tensors):
                self._output = self._fault(_OUTPUT, number, name, "the output of", microbatch=self._forwards[number] - 1)

        return hook

    def _look_at_gradient(self, number: int, name: str, parameter: Any) -> Any:
        def hook(gradient: torch.Tensor) -> None:
            if self._gradient is None and not _finite(parameter.main_grad if is_added_up(parameter) else gradient):
                self._gradient = self._fault(_GRADIENT, number, name, "the gradient of", microbatch=0)

        return hook

    def _fault(self, kind: int, number: int, name: str, what: str, *, microbatch: int) -> Fault:
        rank, stage = torch.distributed.get_rank(), parallel_state.get_pipeline_model_parallel_rank()
        tensor, data = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_data_parallel_rank()
        place = number * parallel_state.get_pipeline_model_parallel_world_size() + stage
        which = f", microbatch {microbatch}" if kind == _OUTPUT else ""
        return Fault(
            kind=kind,
            microbatch=microbatch,
            place=-place if kind == _GRADIENT else place,
            order=[name for name, _ in self._models[number].named_modules()].index(name) if kind == _OUTPUT else 0,
            rank=rank,
            data_rank=data,
            text=f"{what} {_layer(self._models[number], name)} on rank {rank} (tensor {tensor}, pipeline {stage}, data {data}){which}",
        )


def is_added_up(parameter: Any) -> bool:
    """Whether what makes its gradient has added it to main_grad already: what a hook of the parameter is given is then no gradient."""
    return bool(getattr(parameter, "grad_added_to_main_grad", False))


def _layer(model: torch.nn.Module, name: str) -> str:
    """Return a module's or parameter's name, with the number of its layer in the whole model, from 1."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        number = getattr(dict(model.named_modules()).get(".".join(parts[:end])), "layer_number", None)
        if isinstance(number, int):
            return f"layer {number}: {name}"
    return name or "the whole model"


def _finite(value: Any) -> bool:
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return True
    return bool(torch.isfinite(value).all())
