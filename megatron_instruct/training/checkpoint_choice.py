"""Which checkpoint a run goes on from: the newest that is whole, of this very run.

A checkpoint that a newer version wrote is not passed over: going on from an older one would in time replace a whole one. Comes in: a
checkpoint folder. Sizes and versions are looked at before processes meet; then they share the reading of every file
against the checksums of the manifest. What is passed over is named, with the reason.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import NewerVersionError, damage, iterations, read_description


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A checkpoint that looks whole."""

    path: Path
    manifest: Manifest
    architecture: Architecture
    passed_over: tuple[str, ...]
    """What is wrong with newer ones, one sentence each."""


def newest_candidate(folder: Path, *, passed_over: Mapping[int, str] | None = None) -> Candidate:
    """Return the newest checkpoint of a folder whose files are there in full size, and which this version reads.

    passed_over: iterations known to be damaged, each with the reason. Raises InputError where none is left, or where a newer version
    wrote one that would be passed over.
    """
    known = dict(passed_over or {})
    for iteration in iterations(folder):
        if iteration in known:
            continue
        try:
            path, manifest, architecture = read_description(folder, iteration)
        except NewerVersionError as error:
            raise NewerVersionError(f"{error} To go on from an older checkpoint, move that folder away; nothing was changed.") from error
        except InputError as error:
            known[iteration] = str(error)
            continue
        return Candidate(path=path, manifest=manifest, architecture=architecture, passed_over=tuple(known.values()))
    reasons = "; ".join(reason.rstrip(".") for reason in known.values())
    raise InputError(
        f"no checkpoint in {folder} is whole: {reasons}. Restore one from a copy, or give another --save to start anew; "
        "nothing was changed."
    )


def damage_of(path: Path, manifest: Manifest) -> str | None:
    """Read every file of a checkpoint against its checksum, the processes sharing the work; say what is wrong, the same on each."""
    import torch.distributed

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: list[str | None] = [None] * size
    torch.distributed.all_gather_object(found, damage(path, manifest, part=rank, of=size))
    return next((one for one in found if one is not None), None)


def newest_whole(folder: Path) -> Candidate:
    """Return the newest checkpoint of a folder every file of which is as it was written. Every process calls it.

    Raises InputError where there is none.
    """
    damaged: dict[int, str] = {}
    while True:
        candidate = newest_candidate(folder, passed_over=damaged)
        wrong = damage_of(candidate.path, candidate.manifest)
        if wrong is None:
            return candidate
        damaged[int(candidate.manifest.facts["iteration"])] = wrong


def check_identity(path: Path, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise ConfigError where a checkpoint belongs to a run with other settings than this one."""
    for name, old, new in _differences(saved, wanted):
        raise ConfigError(
            f"{path} belongs to a run with {name}={old!r}, and this one has {name}={new!r}; "
            "use another --save (and --load this one for its weights), or restore the setting."
        )


def _differences(saved: dict[str, Any], wanted: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yield settings that differ; of the model's architecture, the field."""
    for name, new in wanted.items():
        old = saved.get(name)
        if old == new:
            continue
        if name == "architecture" and isinstance(old, dict) and isinstance(new, dict):
            yield from ((field, old.get(field), new.get(field)) for field in {**old, **new} if old.get(field) != new.get(field))
        else:
            yield name, old, new
