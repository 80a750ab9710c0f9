"""The few measured numbers of the estimates (constants.yaml), each with a physical meaning."""

import functools
import importlib.resources
from dataclasses import dataclass

import yaml

from megatron_instruct.planning.gpus import Gpu

_SAME_AS = {"ada": "ampere"}
"""Generations without a published row, and the one whose fraction is taken instead."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Measured numbers; constants.yaml says what each is."""

    products: dict[str, dict[str, float]]
    attention: float
    tensor_overlap: float
    memory_bandwidth: float
    links: float
    reserved_gib: float
    fragmentation: float

    def product_flops(self, gpu: Gpu, precision: str) -> float:
        """Return the FLOP/s of large matrix products. What no row fits takes the fraction of bf16, Hopper's if need be."""
        fractions = self.products[_SAME_AS.get(gpu.generation, gpu.generation)]
        return gpu.peak_flops[precision] * (fractions.get(precision) or fractions.get("bf16") or self.products["hopper"]["bf16"])

    def usable_bytes(self, gpu: Gpu) -> float:
        """Return the memory that weights, optimizer and activations may fill."""
        return (gpu.memory_bytes - self.reserved_gib * 2**30) * (1.0 - self.fragmentation)


@functools.cache
def load_constants() -> Constants:
    """Return the numbers of constants.yaml."""
    text = importlib.resources.files("megatron_instruct.planning").joinpath("constants.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    return Constants(**content["fitted"], **content["assumed"])
