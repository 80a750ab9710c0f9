"""A Megatron checkpoint, trained or converted, of any layout -> a Hugging Face folder.

Goes out: safetensors, the tokenizer's files, generation_config.json, config.json (after the proof: without it nothing loads the
folder) and manifest.json. transformers, vLLM and lm-eval load it as it is.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion import huggingface_side, megatron_side, proof, torch_dist
from megatron_instruct.conversion.checksums import check_manifest
from megatron_instruct.conversion.computation import Sides, compare
from megatron_instruct.conversion.config import ConvertConfig, Dtype
from megatron_instruct.conversion.huggingface_config import token_ids_of, write_config
from megatron_instruct.conversion.safetensors_folder import Writer, read_tensor, stored_tensors
from megatron_instruct.conversion.target import require_memory, require_new, require_room
from megatron_instruct.conversion.weights import Weight, join, largest_tensor, rounded, split, weights_of
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.manifest import FileRecord, Manifest, finished, record, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import read_description
from megatron_instruct.platform.device import Machine
from megatron_instruct.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer

_CONFIG, _GENERATION, _TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_UNPROVEN = "config.unproven.json"
_EXPORT_EARLIER = "the training run went wrong; export an earlier iteration"
_TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Megatron checkpoint, checked."""

    path: Path
    """Iteration folder."""
    manifest: Manifest
    architecture: Architecture
    dtype: Dtype
    """Of the result."""
    tokenizer: Tokenizer
    tokenizer_path: Path


def convert(config: ConvertConfig) -> Manifest:
    """Do the conversion, or find it done."""
    source = read_source(config)
    settings = {
        "to": "huggingface",
        "dtype": source.dtype,
        "tokenizer": source.tokenizer.fingerprint,
        "max_position_embeddings": source.architecture.max_position_embeddings,
        "max_shard_size": config.max_shard_size,
        "prove": config.prove,
    }
    inputs = _inputs(config, source)
    if (done := finished(config.save / "manifest.json", stage="convert", settings=settings, inputs=inputs)) is not None:
        print(f"Finished already: {config.save}.")
        return done
    check_manifest(source.path, source.manifest)
    require_new(config.save)
    require_room(config.save, source.architecture, source.dtype)
    weights = weights_of(source.architecture)
    require_memory(largest_tensor(weights))
    text = proof.proof_text(config.prove_text)
    with megatron_side.one_process() as machine, atomic_folder(config.save) as folder:
        if config.prove:
            huggingface_side.start()
        plan = megatron_side.plan_checkpoint(source.architecture, machine)
        assert {weight.megatron for weight in weights} == plan.pieces.keys(), "the family's table names every parameter"
        checkpoint = torch_dist.Checkpoint(source.path)
        dtypes = megatron_side.stored_dtypes(checkpoint, plan, source.architecture, source.path)
        reader = Reader(source=source, weights=weights, plan=plan, checkpoint=checkpoint, dtypes=dtypes)
        _write_weights(reader, folder, max_shard_size=config.max_shard_size)
        _write_surroundings(source, folder)
        shown = proof.NO_PROOF
        if config.prove:
            shown = proof.conclude(_prove(reader, folder, machine, text), config.save)
        (folder / _UNPROVEN).rename(folder / _CONFIG)
        manifest = Manifest(
            stage="convert",
            settings=settings,
            inputs=inputs,
            outputs=records([folder], relative_to=folder),
            counts={"parameters": source.architecture.num_parameters},
            facts={
                "architecture": source.architecture.to_json(),
                "iteration": source.manifest.facts.get("iteration"),
                "source_stage": source.manifest.stage,
                "tokenizer": source.tokenizer.fingerprint,
                "dtype": source.dtype,
                "stored_dtypes": sorted(str(dtype) for dtype in dtypes),
                "proof": shown,
            },
        )
        write_manifest(folder / "manifest.json", manifest)
    return manifest


def read_source(config: ConvertConfig) -> Source:
    """Read and check everything but the weights. Raises InputError that names what is wrong."""
    path, manifest, architecture = read_description(config.load, config.iteration)
    if config.max_position_embeddings is not None:
        architecture = dataclasses.replace(architecture, max_position_embeddings=config.max_position_embeddings)
    tokenizer_path = config.tokenizer or config.load / "tokenizer"
    if not tokenizer_path.exists():
        raise InputError(f"{tokenizer_path}: no such tokenizer; name the one that the model was trained with by --tokenizer.")
    tokenizer = load_tokenizer(tokenizer_path)
    if tokenizer.vocab_size > architecture.vocab_size:
        raise InputError(
            f"the tokenizer {tokenizer_path} has {tokenizer.vocab_size} ids, and the embedding of {path} has {architecture.vocab_size} "
            "rows; give the model's own tokenizer with --tokenizer."
        )
    trained_with = manifest.facts.get("tokenizer")
    if trained_with is not None and trained_with != tokenizer.fingerprint:
        raise InputError(f"{tokenizer_path} is another tokenizer than the one that {path} was trained with; give that one by --tokenizer.")
    if tokenizer.kind != "HuggingFaceTokenizer":
        raise InputError(
            f"{tokenizer_path} is a bare sentencepiece model, which transformers 5 reads with wrong ids; an export needs a model trained "
            "with a tokenizer.json."
        )
    declared = manifest.facts.get("dtype") or manifest.settings.get("dtype")
    dtype: Dtype | None = config.dtype or declared
    if dtype not in megatron_side.TORCH_DTYPES:
        raise InputError(f"{path / 'manifest.json'} does not say in which type the weights are; give --dtype.")
    write_config(architecture, dtype=_TORCH_NAMES[dtype], token_ids={})  # what no config.json can say is refused before any work
    return Source(path=path, manifest=manifest, architecture=architecture, dtype=dtype, tokenizer=tokenizer, tokenizer_path=tokenizer_path)


def _inputs(config: ConvertConfig, source: Source) -> tuple[FileRecord, ...]:
    """The checkpoint's manifest, which holds the SHA-256 of each of its files, the tokenizer, and the text of the proof."""
    more = [config.prove_text] if config.prove_text else []
    return (record(source.path / "manifest.json"), *records([source.tokenizer_path, *more]))


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads a checkpoint of any layout parameter by parameter."""

    source: Source
    weights: list[Weight]
    plan: megatron_side.CheckpointPlan
    checkpoint: torch_dist.Checkpoint
    dtypes: set[torch.dtype]
    """Of the weights as they are stored."""

    @property
    def rounds(self) -> bool:
        return self.dtypes != {megatron_side.TORCH_DTYPES[self.source.dtype]}

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter as it is stored; a vocabulary without its padding."""
        vocabulary = {weight.megatron for weight in self.weights if weight.kind == "vocabulary"}
        return self.plan.read(self.checkpoint, name, rows=self.source.architecture.vocab_size if name in vocabulary else None)

    def tensors(self, weight: Weight) -> list[torch.Tensor]:
        """Return the Hugging Face tensors that a parameter makes, in the type of the result."""
        whole = rounded(self.parameter(weight.megatron), weight.megatron, self.source.dtype, remedy=_EXPORT_EARLIER)
        return split(weight, whole, self.source.architecture)


def _write_weights(reader: Reader, folder: Path, *, max_shard_size: str) -> None:
    shapes = {name: shape for weight in reader.weights for name, shape in zip(weight.huggingface, weight.shapes, strict=True)}
    with Writer(folder, shapes, megatron_side.TORCH_DTYPES[reader.source.dtype], max_shard_size=max_shard_size) as writer:
        for weight in reader.weights:
            for name, part in zip(weight.huggingface, reader.tensors(weight), strict=True):
                writer.write(name, part)


def _write_surroundings(source: Source, folder: Path) -> None:
    """Write everything but the weights; config.json under a name that nothing loads."""
    copy_tokenizer(source.tokenizer_path, folder)
    carried = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    (folder / _CONFIG).unlink(missing_ok=True)
    ids = {"bos_token_id": source.tokenizer.bos, "eos_token_id": source.tokenizer.eod, **token_ids_of(carried)}
    ids = {name: value for name, value in ids.items() if value is not None}
    config = write_config(source.architecture, dtype=_TORCH_NAMES[source.dtype], token_ids=ids)
    write_json(folder / _UNPROVEN, config)
    if not (folder / _GENERATION).is_file():
        generation = {name: ids[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in ids}
        write_json(folder / _GENERATION, generation)
    _complete_tokenizer_config(source, folder)


def _complete_tokenizer_config(source: Source, folder: Path) -> None:
    """Name the class of the tokenizer where nothing does: transformers 5 would rebuild it as the model family's own, with other ids."""
    file = folder / _TOKENIZER_CONFIG
    content: dict[str, Any] = read_json(file) if file.is_file() else {}
    missing: dict[str, Any] = {} if "tokenizer_class" in content else {"tokenizer_class": "PreTrainedTokenizerFast"}
    if "eos_token" not in content and not (folder / "special_tokens_map.json").is_file():
        missing["eos_token"] = source.tokenizer.decode([source.tokenizer.eod])
    if missing:
        write_json(file, {**content, **missing})


def _prove(reader: Reader, folder: Path, machine: Machine, text: str) -> list[proof.Check]:
    """Read back what was written, turn it round, compare it with the checkpoint's weights, and run both sides."""
    source, stored = reader.source, stored_tensors(folder)
    different: list[str] = []
    for weight in reader.weights:
        parts = [read_tensor(name, stored[name]) for name in weight.huggingface]
        whole = join(weight, parts, source.architecture, rows=parts[0].size(0))
        wanted = rounded(reader.parameter(weight.megatron), weight.megatron, source.dtype, remedy=_EXPORT_EARLIER)
        if not proof.same_bits(whole, wanted):
            different.append(weight.megatron)
        del parts, whole, wanted
    names = proof.check_names(
        consumed=len(reader.weights),
        source=len(reader.plan.pieces),
        filled=len({name for weight in reader.weights for name in weight.huggingface} & stored.keys()),
        target=len(stored),
        set_aside=(),
    )
    weights = proof.check_weights(different, count=len(reader.weights), rounded=source.dtype if reader.rounds else None)
    sides = Sides(
        architecture=source.architecture,
        parameter=reader.parameter,
        folder=folder,
        config_file=folder / _UNPROVEN,
        rounded_to=megatron_side.TORCH_DTYPES[source.dtype] if reader.rounds else None,
    )
    computed = compare(sides, machine, proof.proof_tokens(source.tokenizer, source.architecture, text))
    ids = proof.check_token_ids(source.tokenizer.encode(text), huggingface_side.token_ids(folder, text))
    return [names, weights, *computed, ids]
