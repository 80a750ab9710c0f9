"""What a checkpoint folder says of itself. Does not know: torch.

A checkpoint is a folder DIR/iter_0000000 that holds the weights (and, from training, the optimizer), committed by its
manifest; DIR/latest_checkpointed_iteration.txt names the newest; DIR/tokenizer holds the tokenizer's files.
"""

import re
from pathlib import Path

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
