"""Kinds of GPUs (gpus.yaml) -> a checked value. Does not know: models, layouts."""

import dataclasses
import functools
import importlib.resources
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from megatron_instruct.errors import ConfigError, did_you_mean

Precision = Literal["fp32", "bf16", "fp8"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU in the machine that it is usual in. Bandwidths are of one GPU, in one direction."""

    kind: str
    generation: str
    """Of NVIDIA's architecture: the reached fractions of the peak (constants.yaml) are those of a generation."""
    memory_bytes: float
    peak_flops: dict[str, float]
    """FLOP/s by precision, dense."""
    memory_bandwidth: float
    """Bytes a second."""
    nvlink_bandwidth: float
    """Bytes a second inside a domain."""
    nvlink_gpus: int
    """GPUs of one domain."""
    gpus_per_node: int
    """GPUs of one machine, for torchrun."""
    network_bandwidth: float
    """Bytes a second that leave the domain."""
    source: str

    def group_bandwidth(self, members: int, *, stride: int) -> float:
        """Return the bytes a second of one member in a collective of `members` GPUs, every stride-th one.

        Members in one domain use NVLink. A ring over several domains enters and leaves each through the network cards of all
        members inside it, so it has their sum, at most NVLink's.
        """
        if members * stride <= self.nvlink_gpus:
            return self.nvlink_bandwidth
        return min(self.nvlink_bandwidth, max(1, self.nvlink_gpus // stride) * self.network_bandwidth)

    def is_inside(self, members: int, *, stride: int) -> bool:
        """Whether such a group lies in one domain."""
        return members * stride <= self.nvlink_gpus


@functools.cache
def _kinds() -> dict[str, dict[str, Any]]:
    text = importlib.resources.files("megatron_instruct.planning").joinpath("gpus.yaml").read_text(encoding="utf-8")
    kinds: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return kinds


def kinds() -> list[str]:
    """Return the known kinds."""
    return sorted(_kinds())


def find_gpu(
    kind: str, *, memory_gib: float | None = None, network_gb_per_second: float | None = None, gpus_per_node: int | None = None
) -> Gpu:
    """Return a kind, with what of it is otherwise in the user's machines, or raise ConfigError with the closest name."""
    row = _kinds().get(kind.lower())
    if row is None:
        raise ConfigError(
            f"gpu={kind!r} is unknown"
            + did_you_mean(kind.lower(), _kinds(), more="A kind is an entry of megatron_instruct/planning/gpus.yaml.")
        )
    gpu = Gpu(
        kind=kind.lower(),
        generation=row["generation"],
        memory_bytes=(memory_gib or row["memory"]) * 2**30,
        peak_flops={name: row[name] * 1e12 for name in ("fp32", "bf16", "fp8") if name in row},
        memory_bandwidth=row["hbm"] * 1e9,
        nvlink_bandwidth=row["nvlink"] * 1e9,
        nvlink_gpus=row["nvlink_gpus"],
        gpus_per_node=row["gpus_per_node"],
        network_bandwidth=(network_gb_per_second or row["network"]) * 1e9,
        source=row["source"],
    )
    if gpus_per_node is None:
        return gpu
    own_domain = gpu.nvlink_gpus == gpu.gpus_per_node  # an NVLink domain that spans machines does not shrink with them
    return dataclasses.replace(gpu, gpus_per_node=gpus_per_node, nvlink_gpus=gpus_per_node if own_domain else gpu.nvlink_gpus)


def check_precision(gpu: Gpu, precision: str) -> None:
    """Raise ConfigError for a precision that the kind does not compute in."""
    if precision not in gpu.peak_flops:
        able = ", ".join(kind for kind in kinds() if precision in _kinds()[kind])
        raise ConfigError(f"precision={precision}: {gpu.kind} has no {precision} units; take precision=bf16, or a kind that has: {able}.")
