"""What a checkpoint folder says of itself. Does not know: torch.

A checkpoint is a folder DIR/iter_0000000 that holds the weights (and, from training, the optimizer), committed by its
manifest; DIR/latest_checkpointed_iteration.txt names the newest; DIR/tokenizer holds the tokenizer's files.
"""

import dataclasses
import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_write, read_json, sha256_of
from megatron_instruct.manifest import FORMAT, FileRecord, Manifest, read_manifest
from megatron_instruct.models.architecture import Architecture

LATEST = "latest_checkpointed_iteration.txt"
CHECKPOINT_FORMAT = 1
"""Of what is inside a checkpoint, in its manifest's facts; to be raised when an older version could no longer read it rightly."""


class NewerVersionError(InputError):
    """A checkpoint that a newer version of this project wrote: whole, as far as this one can tell."""


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


def iterations(folder: Path) -> list[int]:
    """Return the iterations of a folder's checkpoints, newest first; those above the newest that the folder names do not count.

    Where it names none, all that have a manifest count: LATEST was lost, or a run was killed before it named its first one.
    """
    named = latest_iteration(folder)
    found = [path for path in folder.glob("iter_*") if re.fullmatch(r"iter_\d{7,}", path.name)]
    if named is None:
        found = [path for path in found if (path / "manifest.json").is_file()]
    numbers = [int(path.name.removeprefix("iter_")) for path in found]
    return sorted(numbers if named is None else {named, *(number for number in numbers if number <= named)}, reverse=True)


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
    manifest = _read_own_manifest(path / "manifest.json")
    return path, manifest, Architecture.from_json(manifest.facts["architecture"])


def _read_own_manifest(path: Path) -> Manifest:
    content = read_json(path) if path.is_file() else None
    written = content.get("format") if isinstance(content, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise NewerVersionError(
            f"{path} is of format {written}, and this version reads {FORMAT}: a newer version wrote it; upgrade this one."
        )
    manifest = read_manifest(path)
    if "architecture" not in manifest.facts:
        raise InputError(f"{path} describes no architecture; it is not a checkpoint's manifest.")
    if "seal" in manifest.facts and sealed(manifest) != manifest:
        raise InputError(f"{path} is damaged: it does not say what was written into it.")
    inside = manifest.facts.get("checkpoint_format", 1)
    if inside > CHECKPOINT_FORMAT:
        raise NewerVersionError(
            f"{path.parent} is a checkpoint of format {inside}, and this version reads {CHECKPOINT_FORMAT}: version {manifest.version} "
            "wrote it; upgrade this one."
        )
    return manifest


def sealed(manifest: Manifest) -> Manifest:
    """Return the manifest with a SHA-256 of its own content among its facts: what a flipped bit in it would change is refused."""
    facts = {name: value for name, value in manifest.facts.items() if name != "seal"}
    content = dataclasses.asdict(dataclasses.replace(manifest, facts=facts))
    seal = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return dataclasses.replace(manifest, facts={**facts, "seal": seal})


def damage(path: Path, manifest: Manifest, *, part: int = 0, of: int = 1) -> str | None:
    """Read every file of a checkpoint, or one process's part of them, and say what is wrong with the first that is not as written."""
    files = sorted(manifest.outputs, key=lambda output: (-output.bytes, output.path))[part::of]
    with ThreadPoolExecutor(max_workers=max(1, min(8, (os.cpu_count() or 1) // of))) as pool:
        return next((found for found in pool.map(lambda output: _damage_of(path / output.path, output), files) if found), None)


def _damage_of(file: Path, written: FileRecord) -> str | None:
    try:
        found = sha256_of(file)
    except OSError as error:
        return f"{file} cannot be read ({error.strerror})"
    if found != written.sha256:
        return f"{file} is damaged: its SHA-256 is {found[:12]}…, and {written.sha256[:12]}… was written"
    return None
