"""What is written is the memory of the state itself: no copy is made of it before a process is forked, which would stop the training."""

import pytest


@pytest.mark.filterwarnings("ignore")  # megatron-core's, on import
def test_parts_of_a_larger_storage_become_storages_over_the_same_memory() -> None:
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_instruct.models.checkpoint_writing import stand_alone

    buffer = torch.arange(24, dtype=torch.float32)
    parts = {
        "weight": buffer[4:16].view(3, 4),
        "bf16": buffer.bfloat16()[8:12],
        "scalar": buffer[3],
        "columns": buffer.view(6, 4)[:, 1],
        "empty": buffer[:0],
    }
    state = {name: ShardedTensor.from_rank_offsets(name, part.clone()) for name, part in parts.items()}
    for name, part in parts.items():
        state[name].data = part

    stand_alone({"model": state})

    for name, part in parts.items():
        given = state[name].data
        assert given is not None
        assert torch.equal(given, part)
        assert given.dtype == part.dtype
        assert given.shape == part.shape
        assert given.data_ptr() == part.data_ptr()
    alone = {name for name in parts if state[name].data.untyped_storage().nbytes() == state[name].data.nbytes}
    assert alone == {"weight", "bf16", "scalar"}, "what is empty or not contiguous is left to megatron-core"
