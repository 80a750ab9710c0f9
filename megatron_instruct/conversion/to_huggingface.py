"""A Megatron checkpoint, trained or converted, of any layout -> a Hugging Face folder.

Goes out: safetensors, the tokenizer's files, generation_config.json, config.json (after the proof: without it nothing loads the
folder) and manifest.json. transformers, vLLM and lm-eval load it as it is.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion import huggingface_side, megatron_side, proof, torch_dist
from megatron_instruct.conversion.checksums import check_manifest
from megatron_instruct.conversion.comparisons import Comparisons
from megatron_instruct.conversion.computation import Sides, compare
from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.digests import Digests, Written
from megatron_instruct.conversion.megatron_source import TORCH_NAMES, Source
from megatron_instruct.conversion.page_cache import Behind
from megatron_instruct.conversion.safetensors_folder import Writer, stored_tensors
from megatron_instruct.conversion.target import new_folder
from megatron_instruct.conversion.weights import Weight, join, rounded, split, weights_of
from megatron_instruct.files import read_json, write_json
from megatron_instruct.manifest import Manifest, records, write_manifest
from megatron_instruct.models.dtypes import TORCH_DTYPES
from megatron_instruct.models.huggingface_config import token_ids_of, write_config
from megatron_instruct.platform.device import Machine
from megatron_instruct.tokenizer import copy_tokenizer

_CONFIG, _GENERATION, _TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
_UNPROVEN = "config.unproven.json"
_EXPORT_EARLIER = "the training run went wrong; export an earlier iteration"


def convert(config: ConvertConfig, source: Source, digests: Digests, text: str) -> Manifest:
    """Write the folder, prove it, and commit it with its manifest.

    digests: of the source's files, being made. text: what both sides are run on.
    """
    weights = weights_of(source.architecture)
    with megatron_side.one_process() as machine, new_folder(config.save) as folder:
        plan = megatron_side.plan_checkpoint(source.architecture, machine)
        assert {weight.megatron for weight in weights} == plan.pieces.keys(), "the family's table names every parameter"
        checkpoint = torch_dist.Checkpoint(source.path)
        dtypes = megatron_side.stored_dtypes(checkpoint, plan, source.architecture, source.path)
        reader = Reader(source=source, weights=weights, plan=plan, checkpoint=checkpoint, dtypes=dtypes)
        written = _write_weights(reader, folder, max_shard_size=config.max_shard_size, read_back=config.prove)
        _write_surroundings(source, folder)
        if source.trained_in_fp8 is not None:
            print(f"trained in FP8 ({source.trained_in_fp8}): its weights are stored in {_some(dtypes)}, and exported in {source.dtype}")
        check_manifest(source.path, source.manifest, digests.records())
        shown = proof.NO_PROOF
        if config.prove:
            shown = proof.conclude(_prove(reader, written, folder, machine, text), config.save)
        (folder / _UNPROVEN).rename(folder / _CONFIG)
        manifest = Manifest(
            stage="convert",
            settings=source.settings(config),
            inputs=source.inputs(config),
            outputs=records([folder], relative_to=folder, known=written.records()),
            counts={"parameters": source.architecture.num_parameters},
            facts={
                "architecture": source.architecture.to_json(),
                "iteration": source.manifest.facts.get("iteration"),
                "source_stage": source.manifest.stage,
                "tokenizer": source.tokenizer.fingerprint,
                "dtype": source.dtype,
                "trained_in_fp8": source.trained_in_fp8,
                "stored_dtypes": sorted(str(dtype) for dtype in dtypes),
                "proof": shown,
            },
        )
        write_manifest(folder / "manifest.json", manifest)
    return manifest


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
        return self.dtypes != {TORCH_DTYPES[self.source.dtype]}

    def parameter(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return a parameter, as it is stored unless a type is given; a vocabulary without its padding."""
        vocabulary = {weight.megatron for weight in self.weights if weight.kind == "vocabulary"}
        rows = self.source.architecture.vocab_size if name in vocabulary else None
        return self.plan.read(self.checkpoint, name, rows=rows, dtype=dtype)

    def rounded(self, stored: torch.Tensor, weight: Weight) -> torch.Tensor:
        """Return what is stored of a parameter in the type of the result."""
        return rounded(stored, weight.megatron, self.source.dtype, remedy=_EXPORT_EARLIER)

    def is_side_by_side(self, weight: Weight) -> bool:
        """Whether the boxes of a parameter are the Hugging Face tensors as they are."""
        return self.plan.sizes[weight.megatron] == weight.shapes

    def parts(self, weight: Weight) -> list[torch.Tensor]:
        """Return the Hugging Face tensors of a parameter, in the type of the result."""
        if self.is_side_by_side(weight):
            boxes = zip(self.plan.pieces[weight.megatron], weight.shapes, strict=True)
            return [self.rounded(self.checkpoint.read(piece).reshape(shape), weight) for piece, shape in boxes]
        return split(weight, self.rounded(self.parameter(weight.megatron), weight), self.source.architecture)

    def in_order(self) -> list[Weight]:
        """Return the weights in the order in which the checkpoint's files hold them."""
        return sorted(self.weights, key=lambda weight: self.checkpoint.position(self.plan.pieces[weight.megatron][0]))


def _write_weights(reader: Reader, folder: Path, *, max_shard_size: str, read_back: bool) -> Written:
    """Write the weights, one parameter in memory at a time, in the checkpoint's order.

    read_back: whether to read each one from its file again, turn it round, and compare it with the checkpoint's.
    """
    shapes = {name: shape for weight in reader.weights for name, shape in zip(weight.huggingface, weight.shapes, strict=True)}
    with (
        Writer(folder, shapes, TORCH_DTYPES[reader.source.dtype], max_shard_size=max_shard_size) as writer,
        Comparisons() as comparisons,
    ):
        behind = Behind()
        for weight in reader.in_order():
            parts = reader.parts(weight)
            for name, part in zip(weight.huggingface, parts, strict=True):
                writer.write(name, part)
            if read_back:
                comparisons.start(partial(_different, writer, weight, reader, parts))
            del parts, part
            for piece in reader.plan.pieces[weight.megatron]:
                for place in reader.checkpoint.places(piece):
                    behind.add(*place)
    return Written(different=comparisons.different, records=writer.records)


def _different(writer: Writer, weight: Weight, reader: Reader, parts: list[torch.Tensor]) -> list[str]:
    """Read a parameter from the files again and turn it round; return its name where it does not come back bit for bit."""
    back = (writer.read_back(name) for name in weight.huggingface)
    if reader.is_side_by_side(weight):
        same = all(map(proof.same_bits, parts, back))
    else:
        tensors = list(back)
        whole = join(weight, tensors, reader.source.architecture, rows=tensors[0].size(0))
        same = proof.same_bits(whole, reader.rounded(reader.parameter(weight.megatron), weight))
    return [] if same else [weight.megatron]


def _write_surroundings(source: Source, folder: Path) -> None:
    """Write everything but the weights; config.json under a name that nothing loads."""
    copy_tokenizer(source.tokenizer_path, folder)
    carried = read_json(folder / _CONFIG) if (folder / _CONFIG).is_file() else {}
    (folder / _CONFIG).unlink(missing_ok=True)
    ids = {"bos_token_id": source.tokenizer.bos, "eos_token_id": source.tokenizer.eod, **token_ids_of(carried)}
    ids = {name: value for name, value in ids.items() if value is not None}
    config = write_config(source.architecture, dtype=TORCH_NAMES[source.dtype], token_ids=ids)
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


def _some(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(name for name, dtype in TORCH_DTYPES.items() if dtype in dtypes))


def _prove(reader: Reader, written: Written, folder: Path, machine: Machine, text: str) -> list[proof.Check]:
    """Check names and bits of what was written, and run both sides."""
    source, stored = reader.source, stored_tensors(folder)
    names = proof.check_names(
        consumed=len(reader.weights),
        source=len(reader.plan.pieces),
        filled=len({name for weight in reader.weights for name in weight.huggingface} & stored.keys()),
        target=len(stored),
        set_aside=(),
    )
    weights = proof.check_weights(written.different, count=len(reader.weights), rounded=source.dtype if reader.rounds else None)
    sides = Sides(
        architecture=source.architecture,
        parameter=lambda name: reader.parameter(name, torch.float32),
        folder=folder,
        config_file=folder / _UNPROVEN,
        rounded_to=TORCH_DTYPES[source.dtype] if reader.rounds else None,
    )
    computed = compare(sides, machine, proof.proof_tokens(source.tokenizer, source.architecture, text))
    theirs, kind = huggingface_side.token_ids(folder, folder / _UNPROVEN, text)
    ids = proof.check_token_ids(source.tokenizer.encode(text), theirs, kind=kind)
    return [names, weights, *computed, ids]
