"""Model weights in megatron-core's torch_dist format, which any layout can read.

A checkpoint is a folder DIR/iter_0000000 that holds the weights (and, from training, the optimizer), committed by its
manifest; DIR/latest_checkpointed_iteration.txt names the newest; DIR/tokenizer holds the tokenizer's files.
"""

import queue
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_write
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.models.architecture import Architecture

LATEST = "latest_checkpointed_iteration.txt"


def iteration_folder(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> int | None:
    """Return the newest committed iteration of a checkpoint folder, or None where there is none."""
    tracker = folder / LATEST
    if not tracker.is_file():
        return None
    text = tracker.read_text(encoding="utf-8").strip()
    if not re.fullmatch(r"\d+", text):
        raise InputError(f"{tracker} holds {text!r}; it must be an iteration number. Write the number of the newest iter_ folder into it.")
    return int(text)


def write_latest(folder: Path, iteration: int) -> None:
    """Name the newest checkpoint; to be called when it is whole."""
    with atomic_write(folder / LATEST) as stream:
        stream.write(f"{iteration}\n")


def read_description(folder: Path, iteration: int | None = None) -> tuple[Path, Manifest, Architecture]:
    """Return a checkpoint's iteration folder (the newest by default), its manifest and its architecture; InputError otherwise."""
    found = latest_iteration(folder) if iteration is None else iteration
    if found is None:
        raise InputError(f"{folder} holds no checkpoint (no {LATEST}); give a folder that convert_checkpoint.py or pretrain.py wrote.")
    path = iteration_folder(folder, found)
    manifest = read_manifest(path / "manifest.json")
    if "architecture" not in manifest.facts:
        raise InputError(f"{path / 'manifest.json'} describes no architecture; it is not a checkpoint's manifest.")
    return path, manifest, Architecture.from_json(manifest.facts["architecture"])


def model_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    """Return the sharded state of a rank's model chunks, under names that do not depend on the layout."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{number}": chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}


def save_weights(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Write the weights of all ranks below the empty folder `path`. Every rank calls it; the caller commits with a manifest."""
    write_state(path, model_state(chunks))


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a sharded state of all ranks below the empty folder `path`. Every rank calls it.

    megatron-core 0.19.2 sends the results of this synchronous write to itself through a process that it starts for the purpose
    (5 s, and 400 MB a rank); a queue in this process does the same.
    """
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(state, str(path))


def load_weights(path: Path, chunks: Sequence[GPTModel]) -> None:
    """Fill a rank's model chunks from a checkpoint of any layout. Raises InputError where it does not fit the model."""
    state = dist_checkpointing.load(model_state(chunks), str(path))
    fill(chunks, state)


def fill(chunks: Sequence[GPTModel], state: dict[str, Any]) -> None:
    """Copy a loaded state into the model chunks."""
    for number, chunk in enumerate(chunks):
        result = chunk.load_state_dict(state["model" if len(chunks) == 1 else f"model{number}"], strict=False)
        missing = [name for name in result.missing_keys if not name.endswith("_extra_state")]
        if missing or result.unexpected_keys:
            raise InputError(f"the checkpoint does not fit the model: missing {missing}, unexpected {result.unexpected_keys}.")
