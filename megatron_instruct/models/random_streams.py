"""What random numbers are drawn from on a rank: torch's generators, and megatron-core's named streams. Seeded, kept, restored."""

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel


def seed_random_streams(seed: int) -> None:
    """Seed what dropout draws from: one stream for what tensor ranks share, others for what they split; as Megatron-LM's a stage."""
    seed += 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def random_states() -> dict[str, Any]:
    """Return the states of torch's generators and of megatron-core's named streams on this rank."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "named": {name: state.clone() for name, state in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on from states that `random_states` returned; they can be gone on from again."""
    torch.set_rng_state(states["cpu"])
    if states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states({name: state.clone() for name, state in states["named"].items()})
