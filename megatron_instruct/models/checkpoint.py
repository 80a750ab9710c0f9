"""Model weights in megatron-core's torch_dist format, which any layout can read."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.errors import InputError
from megatron_instruct.models.checkpoint_writing import StateWriting

_FP8_STATE = ".fp8._extra_state"
"""End of the names of what layers that emulate FP8 remember of a run, and no weight."""


def model_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Return the sharded state of a rank's model chunks, under names that do not depend on the layout."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def save_weights(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Write the weights of all ranks below the empty folder `path`. Every rank calls it; the caller commits with a manifest."""
    StateWriting(path, model_state(chunks), beside=False)


def load_weights(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Fill a rank's model chunks from a checkpoint of any layout. Raises InputError where it does not fit the model."""
    parts = model_state(chunks).items()
    wanted = {part: {name: value for name, value in state.items() if not name.endswith(_FP8_STATE)} for part, state in parts}
    state = dist_checkpointing.load(wanted, str(path))
    fill(chunks, state)


def fill(chunks: Sequence[GPTModel], state: dict[str, Any]) -> None:
    """Copy a loaded state into the model chunks."""
    for number, chunk in enumerate(chunks):
        result = chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise InputError(f"the checkpoint does not fit the model: missing {missing}, unexpected {result.unexpected_keys}.")
