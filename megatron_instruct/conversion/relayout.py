"""A Megatron checkpoint -> the same checkpoint, optimizer included, laid out anew: every tensor whole, whichever ranks wrote it.

Goes out: SAVE/iter_N (one file of data; the manifest of the stage that wrote the checkpoint, with the new files), SAVE/tokenizer, what
the run wrote down beside its checkpoints, SAVE/conversion.json with the proof, SAVE/latest_checkpointed_iteration.txt. pretrain.py goes
on from it under any layout. Weights and optimizer state go box by box, and what is no tensor byte by byte: nothing is computed.
Does not know: models, megatron-core.
"""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion import proof, torch_dist
from megatron_instruct.conversion.checksums import check_manifest
from megatron_instruct.conversion.comparisons import Comparisons
from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.digests import Digests, Written
from megatron_instruct.conversion.page_cache import Behind
from megatron_instruct.conversion.target import new_folder, require_memory, require_new, require_room
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import FileRecord, Manifest, finished, record, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import iteration_folder, read_description, sealed, write_latest

DESCRIPTION = "conversion.json"
"""The manifest of the re-layout; manifest.json in SAVE is the one of a run that ends there."""
_NOTES = ("metrics.jsonl", "samples.jsonl", "faults.jsonl")
"""What pretrain.py writes beside its checkpoints and reads again when it goes on."""
_CHANGES_NOTHING = ("dtype", "tokenizer", "max_position_embeddings", "prove_text")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that is laid out anew."""

    folder: Path
    path: Path
    """Its iteration folder."""
    manifest: Manifest
    architecture: Architecture
    checkpoint: torch_dist.Checkpoint

    def inputs(self) -> tuple[FileRecord, ...]:
        """The checkpoint's manifest, which holds the SHA-256 of each of its files, and the tokenizer."""
        return (record(self.path / "manifest.json"), *records([self.folder / "tokenizer"]))


def relayout(config: ConvertConfig) -> Manifest:
    """Do the work, or find it done; return its manifest."""
    for name in _CHANGES_NOTHING:
        if (value := getattr(config, name)) is not None:
            raise ConfigError(
                f"{name}={str(value)!r} is given, and to='megatron' of a Megatron checkpoint keeps weights and optimizer as they are; "
                "drop one of them."
            )
    source = _read_source(config)
    settings = {"to": "megatron", "from": "megatron", "prove": config.prove}
    if (done := finished(config.save / DESCRIPTION, stage="convert", settings=settings, inputs=source.inputs())) is not None:
        print(f"Finished already: {config.save}.")
        return done
    require_new(config.save)
    tensors = source.checkpoint.tensors
    require_room(config.save, sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in tensors.values()))
    require_memory(max(math.prod(box.sizes) for name in tensors for box in boxes_of(name, tensors[name])))
    with Digests([source.path / output.path for output in source.manifest.outputs], grows=False) as digests:
        return _write(config, source, digests, settings)


def _read_source(config: ConvertConfig) -> Source:
    path, manifest, architecture = read_description(config.load, config.iteration)
    if not (config.load / "tokenizer").is_dir():
        raise InputError(f"{config.load / 'tokenizer'}: no such folder; copy the tokenizer's files of the run there.")
    return Source(folder=config.load, path=path, manifest=manifest, architecture=architecture, checkpoint=torch_dist.Checkpoint(path))


def boxes_of(name: str, stored: torch_dist.StoredTensor) -> Iterator[torch_dist.Piece]:
    """Yield the boxes that a tensor is written in: one a layer and expert, which lie along its first axes, one deep in every box."""
    axes = len(stored.shape)
    deep = next((axis for axis in range(axes) if any(chunk.sizes[axis] != 1 for chunk in stored.chunks)), axes)
    sizes = (*[1] * deep, *stored.shape[deep:])
    for place in itertools.product(*(range(size) for size in stored.shape[:deep])):
        yield torch_dist.Piece(key=name, shape=stored.shape, offsets=(*place, *[0] * (axes - deep)), sizes=sizes)


def _write(config: ConvertConfig, source: Source, digests: Digests, settings: dict[str, Any]) -> Manifest:
    """Write the folder, prove it, and commit it."""
    iteration = int(source.manifest.facts["iteration"])
    with new_folder(config.save) as folder:
        path = iteration_folder(folder, iteration)
        path.mkdir()
        shutil.copytree(source.folder / "tokenizer", folder / "tokenizer")
        for note in _NOTES:
            if (source.folder / note).is_file():
                shutil.copyfile(source.folder / note, folder / note)
        written = _write_state(source.checkpoint, path, read_back=config.prove)
        check_manifest(source.path, source.manifest, digests.records())
        shown = proof.conclude(_prove(source.checkpoint, written, path), config.save) if config.prove else proof.NO_PROOF
        outside = tuple(output for output in source.manifest.outputs if output.path.startswith("../"))
        outputs = records([path], relative_to=path, known=written.records())
        write_manifest(path / "manifest.json", sealed(dataclasses.replace(source.manifest, outputs=(*outputs, *outside))))
        manifest = Manifest(
            stage="convert",
            settings=settings,
            inputs=source.inputs(),
            outputs=records([path, folder / "tokenizer"], relative_to=folder, known=written.records()),
            counts={
                "parameters": source.architecture.num_parameters,
                "tensors": len(source.checkpoint.tensors),
                "objects": len(source.checkpoint.objects),
            },
            facts={
                "iteration": iteration,
                "source_stage": source.manifest.stage,
                "dtype": source.manifest.facts.get("dtype") or source.manifest.settings.get("dtype"),
                "proof": shown,
            },
        )
        write_manifest(folder / DESCRIPTION, manifest)
        write_latest(folder, iteration)
    return manifest


def _write_state(checkpoint: torch_dist.Checkpoint, path: Path, *, read_back: bool) -> Written:
    """Write every tensor, one box in memory at a time, in the order in which the source's files hold them, and what is no tensor."""
    boxes = [box for name, stored in checkpoint.tensors.items() for box in boxes_of(name, stored)]
    with torch_dist.Writer(path) as writer, Comparisons() as comparisons:
        for key in checkpoint.objects:
            writer.object_as_stored(key, checkpoint.bytes_of(key))
        behind = Behind()
        for box in sorted(boxes, key=checkpoint.position):
            value = checkpoint.read(box)
            writer.tensor(box, value)
            if read_back:
                comparisons.start(partial(_different, writer, box, value))
            del value
            for place in checkpoint.places(box):
                behind.add(*place)
    return Written(different=comparisons.different, records=writer.records)


def _different(writer: torch_dist.Writer, box: torch_dist.Piece, value: torch.Tensor) -> list[str]:
    """Read a box from the file again; return its tensor's name where it does not come back bit for bit."""
    return [] if proof.same_bits(value, writer.read_back(box)) else [box.key]


def _prove(source: torch_dist.Checkpoint, written: Written, path: Path) -> list[proof.Check]:
    """Compare what the new index names with what the old one does, and every tensor with the source's bits."""
    target = torch_dist.Checkpoint(path)
    same = [
        name
        for name, stored in source.tensors.items()
        if name in target.tensors and (target.tensors[name].shape, target.tensors[name].dtype) == (stored.shape, stored.dtype)
    ]
    objects = [key for key in source.objects if key in target.objects and target.bytes_of(key) == source.bytes_of(key)]
    names = proof.check_names(
        consumed=len(same) + len(objects),
        source=len(source.tensors) + len(source.objects),
        filled=len(target.tensors) + len(target.objects),
        target=len(same) + len(objects),
        set_aside=(),
    )
    return [names, proof.check_weights(sorted(set(written.different)), count=len(source.tensors), rounded=None)]
