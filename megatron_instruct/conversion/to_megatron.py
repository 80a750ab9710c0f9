"""A Hugging Face folder -> a Megatron checkpoint that pretrain.py loads, in whatever layout it trains.

Goes out: SAVE/iter_0000000 (weights, manifest.json), SAVE/tokenizer (its files, and config.json and generation_config.json of the
source for the way back), SAVE/latest_checkpointed_iteration.txt, written last.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion import huggingface_side, megatron_side, proof, torch_dist
from megatron_instruct.conversion.checksums import check_known
from megatron_instruct.conversion.computation import Sides, compare
from megatron_instruct.conversion.config import ConvertConfig, Dtype
from megatron_instruct.conversion.huggingface_config import read_architecture, token_ids_of
from megatron_instruct.conversion.safetensors_folder import DTYPES, INDEX, StoredTensor, read_tensor, stored_tensors
from megatron_instruct.conversion.target import require_memory, require_new, require_room
from megatron_instruct.conversion.weights import TIED, Weight, derived_names, join, largest_tensor, rounded, split, weights_of
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, read_json
from megatron_instruct.manifest import FileRecord, Manifest, finished, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import iteration_folder, write_latest
from megatron_instruct.platform.device import Machine
from megatron_instruct.tokenizer import TOKENIZER_FILES, Tokenizer, copy_tokenizer, load_tokenizer

_CONFIG, _GENERATION = "config.json", "generation_config.json"
_COPY_AGAIN = "the file is damaged, or the model is: copy it again"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face folder, checked."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    weights: list[Weight]
    tensors: dict[str, StoredTensor]
    set_aside: tuple[str, ...]
    """Stored tensors that follow from others or from the configuration."""
    dtype: Dtype
    """Of the result."""
    rounded: bool
    """Whether a tensor is stored in another type than the result's."""
    tokenizer: Tokenizer
    tokenizer_path: Path


def convert(config: ConvertConfig) -> Manifest:
    """Do the conversion, or find it done."""
    source = read_source(config)
    settings = {
        "to": "megatron",
        "dtype": source.dtype,
        "tokenizer": source.tokenizer.fingerprint,
        "max_position_embeddings": source.architecture.max_position_embeddings,
        "prove": config.prove,
    }
    inputs = _inputs(config, source)
    path = iteration_folder(config.save, 0)
    if (done := finished(path / "manifest.json", stage="convert", settings=settings, inputs=inputs)) is not None:
        print(f"Finished already: {config.save}.")
        return done
    check_known(source.folder, {stored.file for stored in source.tensors.values()}, inputs)
    require_new(config.save)
    require_room(config.save, source.architecture, source.dtype)
    require_memory(largest_tensor(source.weights))
    text = proof.proof_text(config.prove_text)
    with megatron_side.one_process() as machine, atomic_folder(config.save) as folder:
        if config.prove:
            huggingface_side.start()
        partial = iteration_folder(folder, 0)
        partial.mkdir()
        plan = megatron_side.plan_checkpoint(source.architecture, machine)
        _write(source, partial, plan)
        _keep_tokenizer(source, folder / "tokenizer")
        shown = proof.NO_PROOF
        if config.prove:
            names = proof.check_names(
                consumed=len(source.tensors) - len(source.set_aside),
                source=len(source.tensors),
                filled=len({weight.megatron for weight in source.weights} & plan.pieces.keys()),
                target=len(plan.pieces),
                set_aside=source.set_aside,
            )
            shown = proof.conclude([names, *_prove(source, partial, plan, machine, text)], config.save)
        manifest = Manifest(
            stage="convert",
            settings=settings,
            inputs=inputs,
            outputs=records([partial, folder / "tokenizer"], relative_to=partial),
            counts={"tensors_in": len(source.tensors), "parameters": source.architecture.num_parameters},
            facts={
                "architecture": source.architecture.to_json(),
                "iteration": 0,
                "tokenizer": source.tokenizer.fingerprint,
                "dtype": source.dtype,
                "token_ids": token_ids_of(source.config),
                "proof": shown,
            },
        )
        write_manifest(partial / "manifest.json", manifest)
        write_latest(folder, 0)
    return manifest


def read_source(config: ConvertConfig) -> Source:
    """Read and check everything but the weights' values. Raises InputError that names what is wrong."""
    folder = config.load
    content = read_json(folder / _CONFIG)
    if not isinstance(content, dict):
        raise InputError(f"{folder / _CONFIG} holds no mapping; copy the model's folder again.")
    label = str(folder / _CONFIG)
    architecture = read_architecture(content, source=label, max_position_embeddings=config.max_position_embeddings)
    tensors, weights = stored_tensors(folder), weights_of(architecture)
    set_aside = _check_tensors(folder, tensors, weights, architecture)
    tokenizer_path = config.tokenizer or folder
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer_path} has {tokenizer.vocab_size} ids, and the embedding of {folder} has {architecture.vocab_size} "
            "rows; give the model's own tokenizer with --tokenizer."
        )
    used = {stored.dtype for name, stored in tensors.items() if name not in set_aside}
    if config.dtype is None and len(used) > 1:
        raise InputError(f"{folder} mixes weights of {', '.join(sorted(used))}; say which to write with --dtype.")
    dtype: Dtype = config.dtype or DTYPES[min(used)]  # type: ignore[assignment]
    return Source(
        folder=folder,
        config=content,
        architecture=architecture,
        weights=weights,
        tensors=tensors,
        set_aside=set_aside,
        dtype=dtype,
        rounded=any(DTYPES[name] != dtype for name in used),
        tokenizer=tokenizer,
        tokenizer_path=tokenizer_path,
    )


def _check_tensors(folder: Path, tensors: Mapping[str, StoredTensor], weights: list[Weight], architecture: Architecture) -> tuple[str, ...]:
    """Compare what is stored with what the family's table needs; return the names that follow from others."""
    wanted = {name: shape for weight in weights for name, shape in zip(weight.huggingface, weight.shapes, strict=True)}
    if missing := sorted(wanted.keys() - tensors.keys()):
        hint = " (or tie_word_embeddings is false in config.json by mistake)" if missing == ["lm_head.weight"] else ""
        raise InputError(f"{folder} lacks {_some(missing)}, which its config.json calls for; copy the model's folder again{hint}.")
    left_over = sorted(tensors.keys() - wanted.keys())
    set_aside = derived_names(architecture) | (TIED.keys() if architecture.tie_embeddings else set())
    if unknown := [name for name in left_over if name not in set_aside]:
        raise InputError(f"{folder} holds {_some(unknown)}, which a {architecture.family} model of this config.json does not have.")
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(f"{folder}: {name} has the shape {list(tensors[name].shape)}, and config.json calls for {list(shape)}.")
        if tensors[name].dtype not in DTYPES:
            raise InputError(f"{folder}: {name} is stored as {tensors[name].dtype}; supported: {', '.join(DTYPES)}.")
    for name in left_over:
        if name in TIED and not torch.equal(_read(tensors, name), _read(tensors, TIED[name])):
            raise InputError(
                f"{folder}: tie_word_embeddings is true, and {name} differs from {TIED[name]}; set tie_word_embeddings to false in "
                "config.json where the two are meant to be apart."
            )
    return tuple(left_over)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _read(tensors: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    return read_tensor(name, tensors[name])


def _inputs(config: ConvertConfig, source: Source) -> tuple[FileRecord, ...]:
    files = {source.folder / _CONFIG, *(stored.file for stored in source.tensors.values())}
    place = source.tokenizer_path
    files |= {place} if place.is_file() else {place / name for name in TOKENIZER_FILES if (place / name).is_file()}
    files |= {source.folder / name for name in (INDEX, _GENERATION) if (source.folder / name).is_file()}
    return records(sorted(files) + ([config.prove_text] if config.prove_text else []))


def _write(source: Source, path: Path, plan: megatron_side.CheckpointPlan) -> None:
    """Write the checkpoint, one parameter in memory at a time."""
    with torch_dist.Writer(path=path) as writer:
        for key, value in plan.objects.items():
            writer.object(key, value)
        for weight in source.weights:
            for piece, part in _pieces(source, plan, weight):
                writer.tensor(piece, part)


def _pieces(source: Source, plan: megatron_side.CheckpointPlan, weight: Weight) -> list[tuple[torch_dist.Piece, torch.Tensor]]:
    """Return the boxes that a parameter is stored in, with their values."""
    sizes = plan.sizes[weight.megatron]
    parts = [rounded(_read(source.tensors, name), name, source.dtype, remedy=_COPY_AGAIN) for name in weight.huggingface]
    if tuple(tuple(part.shape) for part in parts) == sizes:  # stored as they are, side by side
        return list(zip(plan.pieces[weight.megatron], parts, strict=True))
    return plan.cut(weight.megatron, join(weight, parts, source.architecture, rows=sum(size[0] for size in sizes)))


def _keep_tokenizer(source: Source, target: Path) -> None:
    target.mkdir()
    for name in (_CONFIG, _GENERATION):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)
    copy_tokenizer(source.tokenizer_path, target)


def _prove(source: Source, path: Path, plan: megatron_side.CheckpointPlan, machine: Machine, text: str) -> list[proof.Check]:
    """Read back what was written, compare it with the source tensor by tensor, and run both sides."""
    checkpoint = torch_dist.Checkpoint(path)
    dtypes = megatron_side.stored_dtypes(checkpoint, plan, source.architecture, path)
    stored = proof.check_types(dtypes, megatron_side.TORCH_DTYPES[source.dtype])
    vocabulary = {weight.megatron: source.architecture.vocab_size for weight in source.weights if weight.kind == "vocabulary"}

    def parameter(name: str) -> torch.Tensor:
        return plan.read(checkpoint, name, rows=vocabulary.get(name))

    different: list[str] = []
    for weight in source.weights:
        parts = split(weight, parameter(weight.megatron), source.architecture)
        for name, part in zip(weight.huggingface, parts, strict=True):
            if not proof.same_bits(part.contiguous(), rounded(_read(source.tensors, name), name, source.dtype, remedy=_COPY_AGAIN)):
                different.append(name)
        del parts, part
    count = sum(len(weight.huggingface) for weight in source.weights)
    weights = proof.check_weights(different, count=count, rounded=source.dtype if source.rounded else None)
    sides = Sides(
        architecture=source.architecture,
        parameter=parameter,
        folder=source.folder,
        config_file=source.folder / _CONFIG,
        rounded_to=megatron_side.TORCH_DTYPES[source.dtype] if source.rounded else None,
    )
    ids = proof.proof_tokens(source.tokenizer, source.architecture, text)
    return [stored, weights, *compare(sides, machine, ids)]
