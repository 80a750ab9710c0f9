"""Which machine this is, and joining its process group.

Comes in: the environment that torchrun sets (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT); without it, one process.
Does not know: models, data, training.
"""

import ctypes
import datetime
import math
import os
import platform
import resource
import time
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed

from megatron_instruct.errors import ConfigError
from megatron_instruct.platform import cpu_seam

# Dense peak of one GPU in TFLOP/s, from NVIDIA's data sheets, without sparsity: (fp32 through TF32, bf16/fp16, fp8).
_GPU_PEAK_TFLOPS = {
    "GB200": (1250.0, 2500.0, 5000.0),
    "B200": (1125.0, 2250.0, 4500.0),
    "H200": (494.5, 989.0, 1979.0),
    "H100": (494.5, 989.0, 1979.0),
    "A100": (156.0, 312.0, 312.0),
    "L40S": (183.0, 366.0, 733.0),
}

Precision = Literal["fp32", "bf16", "fp16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the processes of a run compute on."""

    kind: Literal["cpu", "cuda"]
    backend: Literal["gloo", "nccl"]
    device: torch.device

    @property
    def is_cuda(self) -> bool:
        return self.kind == "cuda"


def current() -> Machine:
    """Return this process's machine: the GPU of its local rank where there is CUDA, else the CPU."""
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"LOCAL_RANK={local_rank}, and this machine has {torch.cuda.device_count()} GPUs; "
                "start torchrun with at most one process a GPU."
            )
        return Machine(kind="cuda", backend="nccl", device=torch.device("cuda", local_rank))
    return Machine(kind="cpu", backend="gloo", device=torch.device("cpu"))


def initialize(*, timeout_minutes: float = 10.0, threads: int | None = None, keep_freed_memory: bool = True) -> Machine:
    """Join the process group, once, and make megatron-core able to run here.

    threads: CPU threads of this process; by default OMP_NUM_THREADS, else the cores of the machine divided by its processes.
    keep_freed_memory: whether what a step frees is kept for the next one, on the CPU, or given back at once.
    """
    machine = current()
    if machine.is_cuda:
        torch.cuda.set_device(machine.device)
    else:
        torch.set_num_threads(threads or default_threads())
        (_keep_freed_memory if keep_freed_memory else return_freed_memory)()
        cpu_seam.install()
    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            torch.distributed.init_process_group(machine.backend, timeout=timeout)
        else:  # one process needs no address to meet others at
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group(machine.backend, timeout=timeout, store=store, rank=0, world_size=1)
    return machine


def compute_capability(machine: Machine) -> tuple[int, int] | None:
    """Return the compute capability of this process's GPU, such as (9, 0); None on a CPU."""
    return torch.cuda.get_device_capability(machine.device) if machine.is_cuda else None


def default_threads() -> int:
    """Return OMP_NUM_THREADS where the user set it, else this process's share of the machine's cores."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0 and (processes == 1 or given != "1"):  # torchrun itself sets 1 for several processes
        return int(given)
    return max(1, (os.cpu_count() or 1) // processes)


def _keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, instead of returning each large tensor to the kernel.

    Otherwise every large tensor is mapped anew and its pages are zeroed on first touch: 5 to 9 % of a CPU step (man 3 mallopt).
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD: -1 never trims; M_MMAP_MAX: 0 maps nothing apart
    mallopt(trim_threshold, -1)
    mallopt(mmap_max, 0)


def return_freed_memory() -> None:
    """Let glibc return what is freed of 128 KiB and more to the kernel; else it keeps up to 32 MB, once as much was freed at once."""
    if platform.libc_ver()[0] == "glibc":
        mmap_threshold = -3  # M_MMAP_THRESHOLD; setting it ends its growth
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 17)


def peak_flops(machine: Machine, precision: Precision) -> float | None:
    """Return the peak FLOP/s of one process's device: from the data sheet for a known GPU, measured for a CPU, None otherwise."""
    if not machine.is_cuda:
        return _measured_cpu_flops()
    name = torch.cuda.get_device_name(machine.device)
    column = {"fp32": 0, "bf16": 1, "fp16": 1, "fp8": 2}[precision]
    return next((row[column] * 1e12 for known, row in _GPU_PEAK_TFLOPS.items() if known in name), None)


def peak_memory(machine: Machine) -> int:
    """Return the most bytes that this process has held so far: allocated on its GPU, or resident on a CPU."""
    if machine.is_cuda:
        return int(torch.cuda.max_memory_allocated(machine.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def _measured_cpu_flops(size: int = 1024, seconds: float = 0.5) -> float:
    """Measure fp32 matrix products of `size` with this process's threads; every process of the machine does so at the same time.

    The fastest product counts: what else the machine does must not lower the peak.
    """
    left, right = torch.ones(size, size), torch.ones(size, size)
    torch.mm(left, right)
    fastest, end = math.inf, time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        torch.mm(left, right)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest
