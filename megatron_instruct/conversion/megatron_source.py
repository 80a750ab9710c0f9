"""A Megatron checkpoint as a source: its manifest, the architecture that it names, and its tokenizer, all checked.

Does not know: megatron-core, which takes seconds to import.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.tokenizer_files import read_tokenizer
from megatron_instruct.errors import InputError
from megatron_instruct.manifest import FileRecord, Manifest, record, records
from megatron_instruct.models.architecture import Architecture, Dtype
from megatron_instruct.models.checkpoint_folder import read_description
from megatron_instruct.models.dtypes import TORCH_DTYPES
from megatron_instruct.models.huggingface_config import write_config
from megatron_instruct.tokenizer import Tokenizer

TORCH_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""How config.json calls the types."""


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

    @property
    def trained_in_fp8(self) -> str | None:
        """How FP8 was used in training, for a reader; None where it was not."""
        fields = self.manifest.settings.get("fp8") or {}
        return ", ".join(f"{name}={value}" for name, value in fields.items()) or None

    @property
    def files(self) -> list[Path]:
        """The files of the checkpoint, as its manifest lists them."""
        return [self.path / output.path for output in self.manifest.outputs]

    def settings(self, config: ConvertConfig) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return {
            "to": "huggingface",
            "dtype": self.dtype,
            "tokenizer": self.tokenizer.fingerprint,
            "max_position_embeddings": self.architecture.max_position_embeddings,
            "max_shard_size": config.max_shard_size,
            "prove": config.prove,
        }

    def inputs(self, config: ConvertConfig) -> tuple[FileRecord, ...]:
        """The checkpoint's manifest, which holds the SHA-256 of each of its files, the tokenizer, and the text of the proof."""
        more = [config.prove_text] if config.prove_text else []
        return (record(self.path / "manifest.json"), *records([self.tokenizer_path, *more]))


def read_source(config: ConvertConfig) -> Source:
    """Read and check everything but the weights. Raises InputError that names what is wrong."""
    path, manifest, architecture = read_description(config.load, config.iteration)
    if config.max_position_embeddings is not None:
        architecture = dataclasses.replace(architecture, max_position_embeddings=config.max_position_embeddings)
    tokenizer_path = config.tokenizer or config.load / "tokenizer"
    if not tokenizer_path.exists():
        raise InputError(f"{tokenizer_path}: no such tokenizer; name the one that the model was trained with by --tokenizer.")
    tokenizer = read_tokenizer(tokenizer_path, model=path, rows=architecture.vocab_size)
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
    if dtype not in TORCH_DTYPES:
        raise InputError(f"{path / 'manifest.json'} does not say in which type the weights are; give --dtype.")
    write_config(architecture, dtype=TORCH_NAMES[dtype], token_ids={})  # what no config.json can say is refused before any work
    return Source(path=path, manifest=manifest, architecture=architecture, dtype=dtype, tokenizer=tokenizer, tokenizer_path=tokenizer_path)
