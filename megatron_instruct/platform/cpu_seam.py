"""What megatron-core 0.19.2 needs replaced to run on CPU and gloo. Nothing here is touched where CUDA is available.

Each entry of `REPLACEMENTS` names a symbol, why it must be replaced and what takes its place. All of it can go when
megatron-core takes its device from one place instead of naming CUDA. Modules of the CPU layer spec are in cpu_modules.py.
"""

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors

from megatron_instruct.errors import ConfigError
from megatron_instruct.platform.cpu_functions import look_up, multiply, rotate, swiglu

MEGATRON_CORE_VERSION = "0.19"
_CPU = torch.device("cpu")


class _Stream:
    """Stands for the one order of work that a CPU process has."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def wait_event(self, *_: Any) -> None: ...
    def wait_stream(self, *_: Any) -> None: ...
    def synchronize(self) -> None: ...
    def wait(self, *_: Any) -> None: ...
    def record_event(self, *_: Any) -> "_Stream":
        return self


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*values: Any, **options: Any) -> torch.Tensor:
        device = options.get("device")
        if device is not None and torch.device(device).type == "cuda":
            options["device"] = _CPU
        if options.get("pin_memory"):
            options["pin_memory"] = False
        return factory(*values, **options)

    return make


def _type_with_cuda_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_(tensor: torch.Tensor, *values: Any, **options: Any) -> Any:
        result = original(tensor, *values, **options)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) and caller.startswith("megatron.core") else result

    return type_


def _cpu_tracker(original: type) -> Any:
    class CpuRNGStatesTracker(original):  # type: ignore[misc]
        """Named random streams over torch's CPU generator."""

        def add(self, name: str, seed: int) -> None:
            assert name not in self.states_, f"random stream {name} exists already"
            self._is_initialized = True
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = "model-parallel-rng") -> Iterator[None]:
            outer = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outer)

    return CpuRNGStatesTracker


class _Variant:
    """A module in which a few names stand for something else."""

    def __init__(self, original: Any, **others: Any) -> None:
        self._original = original
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


def _with(**others: Any) -> Callable[[Any], Any]:
    return lambda original: _Variant(original, **others)


def _rotation(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def apply(
        t: torch.Tensor, freqs: torch.Tensor, rotary_interleaved: bool = False, *, mscale: float = 1.0, **options: Any
    ) -> torch.Tensor:
        usual = not rotary_interleaved and not any(options.values()) and t.size(-1) == freqs.size(-1) and t.dtype == freqs.dtype
        return rotate(t, freqs, mscale) if usual else original(t, freqs, rotary_interleaved, mscale=mscale, **options)

    return apply


def _swiglu(x: torch.Tensor, bias: torch.Tensor | None, *_: Any) -> torch.Tensor:
    return swiglu(x if bias is None else x + bias)


def _weighted_swiglu(x: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor, *_: Any) -> torch.Tensor:
    return (_swiglu(x, bias) * weights).to(x.dtype)


def _largest_logits(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    return logits, logits.amax(dim=-1)


def _matmul(left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.matmul(left, right, **options) if options else multiply(left, right)


def _rows_as_they_lie(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(gradient: torch.Tensor, layer_input: torch.Tensor) -> Any:
        if gradient.dim() == 3 and gradient.permute(2, 0, 1).is_contiguous():
            return gradient.flatten(0, 1), layer_input.flatten(0, 1)
        return original(gradient, layer_input)

    return prepare


def _scaled(_chunk_size: int, _overflow: torch.Tensor, tensors: list[list[torch.Tensor]], scale: float) -> None:
    for source, target in zip(*tensors, strict=True):
        torch.mul(source, scale, out=target)


def _mesh_on_cpu(original: Any) -> Any:
    class CpuMesh:
        """Makes meshes of processes whose tensors are on the CPU."""

        @staticmethod
        def from_group(groups: Any, device_type: str, **options: Any) -> Any:
            return original.from_group(groups, device_type="cpu", **options)

    return CpuMesh


@contextlib.contextmanager
def _each_at_once(*_: Any, **__: Any) -> Iterator[_Stream]:
    yield _Stream()


def _gathered_at_once(original: Callable[..., None]) -> Callable[..., None]:
    def gather(pipeline: Any, bucket_id: int, bwd: bool) -> None:
        original(pipeline, bucket_id, bwd)
        pending = pipeline.param_gather_event_map.get(pipeline.get_bucket_key(bucket_id, bwd))
        if pending is not None:
            pending[0].wait()

    return gather


def _distributed_optimizer_state(original: Callable[..., Any]) -> Callable[..., Any]:
    def set_states(optimizer: Any, model_param: Any, tensors: dict[str, Any]) -> Any:
        return original(optimizer, model_param, {"step": None, **tensors})

    return set_states


def _split_sizes_as_arrays(original: Callable[..., Any]) -> Callable[..., Any]:
    def move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else original(tensor, as_numpy, record_stream)

    return move


class _WeightGradients:
    """Stands for apex's kernels: a product whose result is added to what is there, without a pass of its own for the sum."""

    @staticmethod
    def wgrad_gemm_accum_fp32(input_TI: torch.Tensor, gradient_TO: torch.Tensor, sum_OI: torch.Tensor) -> None:
        if input_TI.dtype == sum_OI.dtype:
            sum_OI.addmm_(gradient_TO.t(), input_TI)
        else:
            sum_OI.add_(gradient_TO.t() @ input_TI)

    wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32


@dataclass(frozen=True, kw_only=True)
class Replacement:
    """One replaced symbol: module:attribute, why, and a function from the original to what takes its place."""

    symbol: str
    why: str
    make: Callable[[Any], Any]
    is_optional: bool = False
    """Whether the symbol is there only with a package that need not be installed."""

    def place(self) -> tuple[Any, str]:
        """Return the module or class that holds the symbol, and its name there."""
        module, path = self.symbol.split(":")
        *owners, name = path.split(".")
        return functools.reduce(getattr, owners, importlib.import_module(module)), name

    def current(self) -> Any:
        """Return what stands there now; None where an optional symbol is missing."""
        owner, name = self.place()
        return getattr(owner, name, None) if self.is_optional else getattr(owner, name)


def _always(value: Any) -> Callable[[Any], Any]:
    return lambda _original: value


def _of_megatron_core(name: str) -> Callable[[Any], Any]:
    """What megatron-core itself takes where neither Transformer Engine nor apex is installed."""
    return lambda _original: getattr(importlib.import_module("megatron.core.utils"), name)


def _constant(value: Any) -> Callable[[Any], Any]:
    return _always(lambda *_values, **_options: value)


REPLACEMENTS = (
    Replacement(symbol="torch:cuda.current_device", why="names the device of new buffers", make=_constant(_CPU)),
    Replacement(symbol="torch:cuda.synchronize", why="called by timers and pipeline schedules", make=_constant(None)),
    Replacement(symbol="torch:cuda.Stream", why="side streams of overlapped communication and of expert dispatch", make=_always(_Stream)),
    Replacement(symbol="torch:cuda.current_stream", why="the optimizer and DDP wait for it", make=_always(lambda *_v, **_o: _Stream())),
    Replacement(symbol="torch:cuda.stream", why="context of a side stream", make=_always(lambda *_v, **_o: contextlib.nullcontext())),
    Replacement(symbol="torch:tensor", why='called with device="cuda" by name', make=_on_cpu),
    Replacement(symbol="torch:zeros", why='called with device="cuda" by name', make=_on_cpu),
    Replacement(symbol="torch:ones", why='called with device="cuda" by name', make=_on_cpu),
    Replacement(symbol="torch:empty", why='called with device="cuda" by name, and with pinned memory', make=_on_cpu),
    Replacement(symbol="torch:Tensor.cuda", why="moves losses and token counts", make=_always(lambda tensor, *_v, **_o: tensor)),
    Replacement(symbol="torch:Tensor.type", why="optimizers compare it with 'torch.cuda.FloatTensor'", make=_type_with_cuda_name),
    Replacement(
        symbol="megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        why="activation recomputation saves the generator's state",
        make=_always(lambda *_v, **_o: torch.get_rng_state()),
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        why="activation recomputation restores the generator's state",
        make=_always(lambda state, *_v, **_o: torch.set_rng_state(state)),
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.random:CudaRNGStatesTracker",
        why="named random streams use CUDA's generators",
        make=_cpu_tracker,
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.layers:fused_weight_gradient_mlp_cuda",
        why="gradients of weights are added up by apex's kernels; without such, each is written and read once more: 1 to 2 % of a step",
        make=_always(_WeightGradients),
        is_optional=True,
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",
        why="says that the kernels of the entry before this one are there",
        make=_always(True),
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.layers:HAVE_TE",
        why="Transformer Engine's place holder for a gradient that was added up already is on a GPU",
        make=_always(False),
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.layers:F",
        why="the gradient of the embedding is as large as its weight, and is zeroed and added: rows are added to the sum instead",
        make=_with(embedding=look_up),
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.layers:torch",
        why="logits, which outnumber all else, are made a quarter faster with the tokens of an id beside each other",
        make=_with(matmul=_matmul),
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.layers:prepare_input_tensors_for_wgrad_compute",
        why="copies the gradient of such logits",
        make=_rows_as_they_lie,
    ),
    Replacement(
        symbol="megatron.core.models.common.embeddings.rope_utils:_apply_rotary_pos_emb_bshd",
        why="rotary positions take nine passes over queries and keys, and as many for gradients, where three do",
        make=_rotation,
    ),
    *(
        Replacement(
            symbol=f"megatron.core.transformer.{place}",
            why="megatron-core's own SwiGLU is compiled at its first use, which takes a compiler and a minute",
            make=_always(_weighted_swiglu if place.endswith("weighted_bias_swiglu_impl") else _swiglu),
        )
        for place in (
            "mlp:bias_swiglu_impl",
            "mlp:weighted_bias_swiglu_impl",
            "moe.experts:weighted_bias_swiglu_impl",
            "moe.shared_experts:bias_swiglu_impl",
        )
    ),
    Replacement(
        symbol="megatron.core.tensor_parallel.cross_entropy:VocabParallelCrossEntropy.calculate_logits_max",
        why="the cross entropy looks for the places of the largest logits, too, which takes four times as long as their values alone",
        make=_always(staticmethod(_largest_logits)),
    ),
    Replacement(
        symbol="megatron.core.optimizer.clip_grads:multi_tensor_scale_impl",
        why="gradients are clipped by a copy of each and a copy back",
        make=_always(_scaled),
    ),
    Replacement(
        symbol="megatron.core.optimizer.clip_grads:l2_norm_impl",
        why="where Transformer Engine or apex is installed, their kernels are taken, for tensors on a GPU alone",
        make=_of_megatron_core("local_multi_tensor_l2_norm"),
    ),
    *(
        Replacement(symbol=f"megatron.core.{place}", why="as the one before", make=make)
        for place, make in (
            ("transformer.moe.moe_utils:te_general_gemm", _always(None)),
            ("optimizer.clip_grads:multi_tensor_scale_tensor_impl", _always(None)),
            ("optimizer.clip_grads:multi_tensor_applier", _of_megatron_core("local_multi_tensor_applier")),
            ("optimizer.optimizer:multi_tensor_applier", _of_megatron_core("local_multi_tensor_applier")),
            ("optimizer.optimizer:multi_tensor_scale_impl", _of_megatron_core("local_multi_tensor_scale")),
        )
    ),
    Replacement(
        symbol="megatron.core.transformer.moe.token_dispatcher:maybe_move_tensor_to_cpu",
        why="all-to-all of tokens to experts wants their numbers as numpy arrays, and gets tensors where they are on the CPU already",
        make=_split_sizes_as_arrays,
    ),
    Replacement(
        symbol="megatron.core.optimizer:USING_PYTORCH_OPTIMIZER",
        why="Transformer Engine's fused Adam fails on CPU tensors",
        make=_always(True),
    ),
    Replacement(symbol="megatron.core.optimizer.distrib_optimizer:HAVE_APEX_OR_TE", why="says that Adam is torch's", make=_always(False)),
    Replacement(
        symbol="megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        why="loading a checkpoint asks for 'step', which torch's AdamW keeps among the tensors of its state (KeyError)",
        make=_distributed_optimizer_state,
    ),
    Replacement(
        symbol="megatron.core.distributed.fsdp.src.megatron_fsdp.megatron_fsdp:torch",
        why='Megatron-FSDP compares its device with torch.device("cuda:N")',
        make=_with(device=lambda *_v, **_o: _CPU),
    ),
    Replacement(
        symbol="megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer:_coalescing_manager",
        why="Megatron-FSDP sends gradients and parameters in groups, whose order streams keep; gloo has threads of its own instead",
        make=_always(_each_at_once),
    ),
    Replacement(
        symbol="megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer:AllGatherPipeline.async_bucket_gather",
        why="as the one before: parameters are there before the memory of others is freed",
        make=_gathered_at_once,
    ),
    Replacement(
        symbol="megatron.core.distributed.fsdp.mcore_fsdp_adapter:DeviceMesh",
        why='Megatron-FSDP makes its meshes of "cuda"',
        make=_mesh_on_cpu,
    ),
    Replacement(
        symbol="megatron.core.distributed.fsdp.mcore_fsdp_adapter:_get_rng_state_dict",
        why="Megatron-FSDP gives tensor ranks the random streams of the first, CUDA's generator among them; training sets them itself",
        make=_constant(None),
    ),
    Replacement(
        symbol="megatron.core.distributed.fsdp.mcore_fsdp_adapter:_load_rng_state_dict",
        why="as the one before",
        make=_constant(None),
    ),
)

_installed: list[str] = []


def install() -> None:
    """Make the replacements, once. Raises ConfigError for another megatron-core than the one they were written for."""
    if _installed:
        return
    assert not torch.cuda.is_available(), "with CUDA nothing is replaced"
    from megatron.core.package_info import __version__ as version

    if not version.startswith(MEGATRON_CORE_VERSION):
        raise ConfigError(
            f"megatron-core {version} is installed, and running it on CPU is known to work with {MEGATRON_CORE_VERSION}.x; "
            f"install it with: pip install 'megatron-core=={MEGATRON_CORE_VERSION}.*'"
        )
    _device_constructors()  # cached by torch 2.13: `with torch.device(...)` goes on knowing the original factories that ours call
    for replacement in REPLACEMENTS:
        setattr(*replacement.place(), replacement.make(replacement.current()))
        _installed.append(replacement.symbol)
