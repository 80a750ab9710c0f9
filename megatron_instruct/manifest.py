"""The manifest: what a finished stage says of itself, written last.

A stage whose manifest exists is finished. The manifest holds the settings that decide the result, the fingerprints of what
came in and of what went out, and the counts: nothing that changes from one run to the next, so that an interrupted stage
that is run again ends with the same bytes as an undisturbed one.
"""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_instruct import __version__
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import LOCK, TEMPORARY_SUFFIX, read_json, sha256_of, write_json
from megatron_instruct.threads import in_threads

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file's name (relative to the manifest for outputs, from the root for inputs), size in bytes and SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished stage says of itself."""

    stage: str
    """Name of the stage: synthesize, render, preprocess, pretrain, convert, evaluate."""
    settings: Mapping[str, Any]
    """The settings that decide the result, as JSON types; worker counts and the like are left out."""
    inputs: tuple[FileRecord, ...] = ()
    """Everything that was read."""
    outputs: tuple[FileRecord, ...] = ()
    """Everything that was written."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What went in and out, by name: texts, pairs, documents, tokens."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """What was set aside, by reason."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else the next stage or a reader needs: a tokenizer's fingerprint, a proof, a measured difference."""
    version: str = __version__
    """Version of this project that wrote the result."""


def record(path: Path, *, relative_to: Path | None = None) -> FileRecord:
    """Fingerprint one file, or raise InputError that names it."""
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    return _named(FileRecord(path="", bytes=path.stat().st_size, sha256=sha256_of(path)), path, relative_to)


def _named(found: FileRecord, path: Path, relative_to: Path | None) -> FileRecord:
    return dataclasses.replace(found, path=os.path.relpath(path, relative_to) if relative_to else str(path.absolute()))


def records(
    paths: Iterable[Path], *, relative_to: Path | None = None, known: Mapping[Path, FileRecord] | None = None
) -> tuple[FileRecord, ...]:
    """Fingerprint files, and every file below folders, in sorted order.

    known: files that were fingerprinted while they were read or written; they are not read again.
    Not part of a result: an existing manifest.json, and what a run under way or killed leaves, its lock and its temporary files.
    """
    found: list[Path] = []
    for path in paths:
        found += [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
    kept = [path for path in found if path.name not in ("manifest.json", LOCK) and not path.name.endswith(TEMPORARY_SUFFIX)]
    unread = [path for path in kept if known is None or path not in known]
    of_each = {**(known or {}), **dict(zip(unread, in_threads(record, unread), strict=True))}
    return tuple(_named(of_each[path], path, relative_to) for path in kept)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the manifest, atomically. To be called last, when every output has its final name."""
    write_json(path, {"format": FORMAT, **dataclasses.asdict(manifest)})


def read_manifest(path: Path, *, stage: str | None = None) -> Manifest:
    """Read a manifest and check that its outputs are there in full size; raise InputError with the reason otherwise.

    stage: when given, the stage that must have written it.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such manifest, so what it should describe is unfinished or foreign; run its stage (again).")
    content = read_json(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InputError(f"{path} is not a manifest of format {FORMAT}; run the stage again with this version.")
    try:
        content["inputs"] = tuple(FileRecord(**item) for item in content["inputs"])
        content["outputs"] = tuple(FileRecord(**item) for item in content["outputs"])
        manifest = Manifest(**content)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it and run its stage again.") from error
    for name in ("settings", "counts", "rejected", "facts"):
        if not isinstance(getattr(manifest, name), dict):
            raise InputError(f"{path} is damaged ({name} is no mapping); remove it and run its stage again.")
    if stage is not None and manifest.stage != stage:
        raise InputError(f"{path} was written by the stage {manifest.stage!r}; a result of {stage!r} is needed here.")
    for output in manifest.outputs:
        file = path.parent / output.path
        size = file.stat().st_size if file.is_file() else None
        if size != output.bytes:
            raise InputError(
                f"{file} has {size} bytes where its manifest says {output.bytes}; remove {path} and run {manifest.stage!r} again."
            )
    return manifest


def finished(path: Path, *, stage: str, settings: Mapping[str, Any], inputs: Iterable[FileRecord]) -> Manifest | None:
    """Return the manifest when this very work is done already, None when there is none yet.

    Raises ConfigError when the place holds the result of other settings or other inputs: it is never mixed or overwritten.
    """
    if not path.is_file():
        return None
    manifest = read_manifest(path, stage=stage)
    if (difference := first_difference(manifest.settings, settings)) is not None:
        raise ConfigError(f"{path.parent} holds a result made with {difference}; choose another output or remove {path}.")
    before, now = ([(item.bytes, item.sha256) for item in of_one] for of_one in (manifest.inputs, inputs))
    if before != now:
        what = "the same inputs in another order" if sorted(before) == sorted(now) else "other inputs"
        raise ConfigError(f"{path.parent} holds a result made from {what}; choose another output or remove {path}.")
    return manifest


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words the first setting, by name, that is not as it was; None where all are."""
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old != new:
            return f"{name}={old!r}, and this run asks for {name}={new!r}"
    return None


def check_stage_outputs(files: Iterable[Path], inputs: Iterable[FileRecord]) -> None:
    """Check files that an earlier stage wrote against the manifest beside them; files of other origin have none."""
    for file, known in zip(files, inputs, strict=True):
        path = file.parent / "manifest.json"
        content = read_json(path) if path.is_file() else None
        if not isinstance(content, dict) or not {"format", "stage", "outputs"} <= content.keys():
            continue
        written = {output.path: output for output in read_manifest(path).outputs}
        if file.name in written and written[file.name].sha256 != known.sha256:
            raise InputError(f"{file} was changed after the stage {content['stage']!r} wrote it; remove {path} and run that stage again.")
