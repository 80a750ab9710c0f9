"""A Hugging Face folder -> a Megatron checkpoint that pretrain.py loads, in whatever layout it trains.

Goes out: SAVE/iter_0000000 (weights, manifest.json), SAVE/tokenizer (its files, and config.json and generation_config.json of the
source for the way back), SAVE/latest_checkpointed_iteration.txt, written last.
"""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from megatron_instruct.conversion import megatron_side, proof, torch_dist
from megatron_instruct.conversion.checksums import check_known
from megatron_instruct.conversion.comparisons import Comparisons
from megatron_instruct.conversion.computation import Sides, compare
from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.digests import Digests, Written
from megatron_instruct.conversion.huggingface_source import CONFIG, GENERATION, Source
from megatron_instruct.conversion.page_cache import Behind
from megatron_instruct.conversion.target import new_folder
from megatron_instruct.conversion.weights import Weight, join, split
from megatron_instruct.manifest import Manifest, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import iteration_folder, write_latest
from megatron_instruct.models.dtypes import TORCH_DTYPES
from megatron_instruct.models.huggingface_config import token_ids_of
from megatron_instruct.models.megatron_lm import common_state
from megatron_instruct.platform.device import Machine
from megatron_instruct.tokenizer import copy_tokenizer


def convert(config: ConvertConfig, source: Source, digests: Digests, text: str) -> Manifest:
    """Write the checkpoint, prove it, and commit it with its manifest.

    digests: of the source's files, being made. text: what both sides are run on.
    """
    with megatron_side.one_process() as machine, new_folder(config.save) as folder:
        partial = iteration_folder(folder, 0)
        partial.mkdir()
        plan = megatron_side.plan_checkpoint(source.architecture, machine)
        written = _write(source, partial, plan, read_back=config.prove)
        _keep_tokenizer(source, folder / "tokenizer")
        inputs = source.inputs(config, digests.records())
        check_known(source.folder, source.files, inputs)
        shown = proof.NO_PROOF
        if config.prove:
            shown = proof.conclude(_prove(source, written, partial, plan, machine, text), config.save)
        manifest = Manifest(
            stage="convert",
            settings=source.settings(config),
            inputs=inputs,
            outputs=records([partial, folder / "tokenizer"], relative_to=partial, known=written.records()),
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


def _write(source: Source, path: Path, plan: megatron_side.CheckpointPlan, *, read_back: bool) -> Written:
    """Write the checkpoint, one parameter in memory at a time, in the source's order.

    read_back: whether to read each one from the file again, turn it round, and compare it with the source's.
    """
    with torch_dist.Writer(path) as writer, Comparisons() as comparisons:
        common = common_state(source.architecture, dtype=source.dtype, iteration=0)
        for key, value in {**plan.objects, megatron_side.COMMON: [common]}.items():
            writer.object(key, value)
        behind = Behind()
        for weight in source.weights:
            sizes = plan.sizes[weight.megatron]
            parts = [source.tensor(name) for name in weight.huggingface]
            boxes = parts if weight.shapes == sizes else [join(weight, parts, source.architecture, rows=sizes[0][0])]
            for piece, box in zip(plan.pieces[weight.megatron], boxes, strict=True):
                writer.tensor(piece, box)
            if read_back:
                comparisons.start(partial(_different, writer, weight, parts, plan, source.architecture))
            del parts, boxes, box
            for stored in (source.tensors[name] for name in weight.huggingface):
                behind.add(stored.file, stored.position, stored.nbytes)
    return Written(different=comparisons.different, records=writer.records)


def _different(
    writer: torch_dist.Writer,
    weight: Weight,
    parts: list[torch.Tensor],
    plan: megatron_side.CheckpointPlan,
    architecture: Architecture,
) -> list[str]:
    """Read a parameter from the file again and turn it round; return the names of the tensors that do not come back bit for bit."""
    pieces, sizes = plan.pieces[weight.megatron], plan.sizes[weight.megatron]
    boxes: Iterator[torch.Tensor] = (writer.read_back(piece).reshape(size) for piece, size in zip(pieces, sizes, strict=True))
    if weight.shapes != sizes:
        (whole,) = boxes
        boxes = iter(split(weight, whole, architecture))
    compared = zip(weight.huggingface, parts, boxes, strict=True)
    return [name for name, part, box in compared if not proof.same_bits(part, box)]


def _keep_tokenizer(source: Source, target: Path) -> None:
    target.mkdir()
    for name in (CONFIG, GENERATION):
        if (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, target / name)
    copy_tokenizer(source.tokenizer_path, target)


def _prove(
    source: Source, written: Written, path: Path, plan: megatron_side.CheckpointPlan, machine: Machine, text: str
) -> list[proof.Check]:
    """Check names, types and bits of what was written, and run both sides."""
    checkpoint = torch_dist.Checkpoint(path)
    names = proof.check_names(
        consumed=len(source.tensors) - len(source.set_aside),
        source=len(source.tensors),
        filled=len({weight.megatron for weight in source.weights} & plan.pieces.keys()),
        target=len(plan.pieces),
        set_aside=source.set_aside,
    )
    dtypes = megatron_side.stored_dtypes(checkpoint, plan, source.architecture, path)
    types = proof.check_types(dtypes, TORCH_DTYPES[source.dtype])
    count = sum(len(weight.huggingface) for weight in source.weights)
    weights = proof.check_weights(written.different, count=count, rounded=source.dtype if source.rounded else None)
    vocabulary = {weight.megatron: source.architecture.vocab_size for weight in source.weights if weight.kind == "vocabulary"}
    sides = Sides(
        architecture=source.architecture,
        parameter=lambda name: plan.read(checkpoint, name, rows=vocabulary.get(name), dtype=torch.float32),
        folder=source.folder,
        config_file=source.folder / CONFIG,
        rounded_to=TORCH_DTYPES[source.dtype] if source.rounded else None,
    )
    ids = proof.proof_tokens(source.tokenizer, source.architecture, text)
    return [names, types, weights, *compare(sides, machine, ids)]
