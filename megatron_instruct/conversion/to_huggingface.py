"""A Megatron checkpoint, trained or converted, of any layout -> a Hugging Face folder.

Goes out: safetensors, the tokenizer's files, generation_config.json, config.json (after the proof: without it nothing loads the
folder) and manifest.json. transformers, vLLM and lm-eval load it as it is.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from megatron_instruct.conversion import huggingface_side, megatron_side, proof
from megatron_instruct.conversion.config import ConvertConfig, Dtype
from megatron_instruct.conversion.huggingface_config import token_ids_of, write_config
from megatron_instruct.conversion.safetensors_folder import read_tensor, stored_tensors, write_tensors
from megatron_instruct.conversion.target import require_memory, require_new, require_room
from megatron_instruct.conversion.weights import join, split, weights_of
from megatron_instruct.errors import InputError
from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.manifest import FileRecord, Manifest, finished, record, records, write_manifest
from megatron_instruct.models.architecture import Architecture
from megatron_instruct.models.checkpoint_folder import read_description
from megatron_instruct.tokenizer import Tokenizer, copy_tokenizer, load_tokenizer

_CONFIG, _GENERATION, _TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_UNPROVEN = "config.unproven.json"
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
    require_new(config.save)
    require_room(config.save, source.architecture, source.dtype)
    require_memory(source.architecture, bytes_per_parameter=9.0, remedy="use a larger machine")
    text = proof.proof_text(config.prove_text)
    with megatron_side.one_process() as machine, atomic_folder(config.save) as folder:
        if config.prove:
            huggingface_side.start()
        model = megatron_side.build(source.architecture, machine, "fp32")
        dtypes = megatron_side.stored_dtypes(source.path, model)
        rounded = dtypes != {megatron_side.TORCH_DTYPES[source.dtype]}
        megatron_side.load(source.path, model)
        _write_weights(source, model, folder, max_shard_size=config.max_shard_size)
        _write_surroundings(source, folder)
        shown = proof.NO_PROOF
        if config.prove:
            checks = _prove_weights(source, model, folder, rounded=rounded)
            ids = proof.proof_tokens(source.tokenizer, source.architecture, text)
            ours = megatron_side.logits_of(model, ids, source.architecture)
            del model
            theirs = huggingface_side.logits(folder, folder / _UNPROVEN, ids)
            rounded_to = megatron_side.TORCH_DTYPES[source.dtype] if rounded else None
            checks.append(proof.check_logits(ours, theirs, rounded_to=rounded_to, num_layers=source.architecture.num_layers))
            checks.append(proof.check_token_ids(source.tokenizer.encode(text), huggingface_side.token_ids(folder, text)))
            shown = proof.conclude(checks, config.save)
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
    return Source(path=path, manifest=manifest, architecture=architecture, dtype=dtype, tokenizer=tokenizer, tokenizer_path=tokenizer_path)


def _inputs(config: ConvertConfig, source: Source) -> tuple[FileRecord, ...]:
    """The checkpoint's manifest, which holds the SHA-256 of each of its files, the tokenizer, and the text of the proof."""
    more = [config.prove_text] if config.prove_text else []
    return (record(source.path / "manifest.json"), *records([source.tokenizer_path, *more]))


def _write_weights(source: Source, model: GPTModel, folder: Path, *, max_shard_size: str) -> None:
    parameters = megatron_side.parameters_of(model)
    weights = weights_of(source.architecture)
    assert {weight.megatron for weight in weights} == parameters.keys(), "the family's table names every parameter"
    tensors: dict[str, torch.Tensor] = {}
    for weight in weights:
        parts = split(weight, parameters[weight.megatron], source.architecture)
        for name, part in zip(weight.huggingface, parts, strict=True):
            tensors[name] = _rounded(part, name, source.dtype)
    write_tensors(folder, tensors, max_shard_size=max_shard_size)


def _rounded(tensor: torch.Tensor, name: str, dtype: Dtype) -> torch.Tensor:
    result = tensor.to(megatron_side.TORCH_DTYPES[dtype])
    if not torch.isfinite(result).all():
        if torch.isfinite(tensor).all():
            raise InputError(f"{name} has values up to {float(tensor.abs().max()):.3g}, too large for {dtype}; use --dtype bf16 or fp32.")
        raise InputError(f"{name} holds values that are not finite (NaN or infinite): the training run went wrong; export an earlier one.")
    return result


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


def _prove_weights(source: Source, model: GPTModel, folder: Path, *, rounded: bool) -> list[proof.Check]:
    """Read back what was written, turn it round, and compare it with the checkpoint's weights."""
    parameters, weights, stored = megatron_side.parameters_of(model), weights_of(source.architecture), stored_tensors(folder)
    different: list[str] = []
    for weight in weights:
        parts = [read_tensor(name, stored[name]) for name in weight.huggingface]
        whole = join(weight, parts, source.architecture, rows=parts[0].size(0)).float()
        wanted = parameters[weight.megatron][: whole.size(0)]
        if not proof.same_bits(whole, wanted.to(megatron_side.TORCH_DTYPES[source.dtype]).float()):
            different.append(weight.megatron)
    names = proof.check_names(
        consumed=len(weights),
        source=len(parameters),
        filled=len({name for weight in weights for name in weight.huggingface} & stored.keys()),
        target=len(stored),
        set_aside=(),
    )
    return [names, proof.check_weights(different, count=len(weights), rounded=source.dtype if rounded else None)]
