"""Memory and time of one execution put together: what a run would need and take."""

import functools
from dataclasses import dataclass

from megatron_instruct.planning.constants import Constants
from megatron_instruct.planning.execution import Execution
from megatron_instruct.planning.gpus import Gpu
from megatron_instruct.planning.memory import Memory, fullest_stage
from megatron_instruct.planning.shape import Shape
from megatron_instruct.planning.timing import StepTime, step_time


@dataclass(frozen=True)
class Estimate:
    """What one execution needs and takes on one kind of GPU."""

    shape: Shape
    execution: Execution
    gpu: Gpu
    constants: Constants

    @functools.cached_property
    def memory(self) -> Memory:
        """Bytes on the fullest GPU."""
        return fullest_stage(self.shape, self.execution)

    @property
    def missing_bytes(self) -> float:
        """How much more than the usable memory it needs; not positive where it fits."""
        return self.memory.total - self.constants.usable_bytes(self.gpu)

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0.0

    @functools.cached_property
    def time(self) -> StepTime:
        """Seconds of one step."""
        return step_time(self.shape, self.execution, self.gpu, self.constants)

    @property
    def tokens_per_step(self) -> int:
        return self.execution.global_batch_size * self.execution.seq_length

    @property
    def tokens_per_second_per_gpu(self) -> float:
        return self.tokens_per_step / self.time.total / self.execution.layout.world_size

    @property
    def model_flops_per_second(self) -> float:
        """FLOP/s of one GPU that the model itself needs, without recomputation."""
        return self.tokens_per_second_per_gpu * self.shape.flops_per_token(self.execution.seq_length)

    @property
    def mfu(self) -> float:
        """Fraction of the dense peak of the precision that the model's own operations reach."""
        return self.model_flops_per_second / self.gpu.peak_flops[self.execution.precision]

    @property
    def bubble_fraction(self) -> float:
        """Part of the step in which a stage waits for the pipeline to fill and to empty."""
        return self.time.bubble / self.time.total

    def days(self, tokens: float) -> float:
        """Return the days of training on so many tokens, without interruptions."""
        return tokens / (self.tokens_per_second_per_gpu * self.execution.layout.world_size) / 86400

    def gpu_hours(self, tokens: float) -> float:
        """Return the GPU-hours of training on so many tokens."""
        return tokens / self.tokens_per_second_per_gpu / 3600
