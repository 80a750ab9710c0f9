"""A Hugging Face folder as a source: its configuration, the names and sizes of its weights, and its tokenizer, all checked.

Does not know: megatron-core, which takes seconds to import.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_instruct.conversion.config import ConvertConfig
from megatron_instruct.conversion.safetensors_folder import DTYPES, INDEX, StoredTensor, read_tensor, stored_tensors
from megatron_instruct.conversion.tokenizer_files import read_tokenizer
from megatron_instruct.conversion.weights import TIED, Weight, derived_names, rounded, weights_of
from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json
from megatron_instruct.manifest import FileRecord, records
from megatron_instruct.models.architecture import Architecture, Dtype
from megatron_instruct.models.huggingface_config import read_architecture
from megatron_instruct.tokenizer import TOKENIZER_FILES, Tokenizer

CONFIG, GENERATION = "config.json", "generation_config.json"
_COPY_AGAIN = "the file is damaged, or the model is: copy it again"


@dataclass(frozen=True, kw_only=True)
class Source:
    """A Hugging Face folder, checked."""

    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    weights: list[Weight]
    """In the order in which the files hold them."""
    tensors: dict[str, StoredTensor]
    set_aside: tuple[str, ...]
    """Stored tensors that follow from others or from the configuration."""
    dtype: Dtype
    """Of the result."""
    rounded: bool
    """Whether a tensor is stored in another type than the result's."""
    tokenizer: Tokenizer
    tokenizer_path: Path

    def settings(self, config: ConvertConfig) -> dict[str, Any]:
        """Return the settings that decide the result."""
        return {
            "to": "megatron",
            "dtype": self.dtype,
            "tokenizer": self.tokenizer.fingerprint,
            "max_position_embeddings": self.architecture.max_position_embeddings,
            "prove": config.prove,
        }

    def inputs(self, config: ConvertConfig, known: Mapping[Path, FileRecord]) -> tuple[FileRecord, ...]:
        """Return what a manifest says of everything that is read. known: files that were fingerprinted already."""
        files = {self.folder / CONFIG, *self.files}
        place = self.tokenizer_path
        files |= {place} if place.is_file() else {place / name for name in TOKENIZER_FILES if (place / name).is_file()}
        files |= {self.folder / name for name in (INDEX, GENERATION) if (self.folder / name).is_file()}
        return records(sorted(files) + ([config.prove_text] if config.prove_text else []), known=known)

    def tensor(self, name: str) -> torch.Tensor:
        """Read a tensor, in the type of the result."""
        return rounded(_read(self.tensors, name), name, self.dtype, remedy=_COPY_AGAIN)

    @property
    def files(self) -> list[Path]:
        """The files of the weights, in the order in which they are read."""
        used = [self.tensors[weight.huggingface[0]].file for weight in self.weights]
        return list(dict.fromkeys([*used, *(stored.file for stored in self.tensors.values())]))


def read_source(config: ConvertConfig) -> Source:
    """Read and check everything but the weights' values. Raises InputError that names what is wrong."""
    folder = config.load
    content = read_json(folder / CONFIG)
    if not isinstance(content, dict):
        raise InputError(f"{folder / CONFIG} holds no mapping; copy the model's folder again.")
    label = str(folder / CONFIG)
    architecture = read_architecture(content, source=label, max_position_embeddings=config.max_position_embeddings)
    tensors, weights = stored_tensors(folder), weights_of(architecture)
    set_aside = _check_tensors(folder, tensors, weights, architecture)
    tokenizer_path = config.tokenizer or folder
    tokenizer = read_tokenizer(tokenizer_path, model=folder, rows=architecture.vocab_size)
    used = {stored.dtype for name, stored in tensors.items() if name not in set_aside}
    if config.dtype is None and len(used) > 1:
        raise InputError(f"{folder} mixes weights of {', '.join(sorted(used))}; say which to write with --dtype.")
    dtype: Dtype = config.dtype or DTYPES[min(used)]  # type: ignore[assignment]
    return Source(
        folder=folder,
        config=content,
        architecture=architecture,
        weights=sorted(weights, key=lambda weight: _place_of(tensors[weight.huggingface[0]])),
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
        raise InputError(
            f"{folder} holds {_some(unknown)}, which a {architecture.family} model of this config.json does not have; copy the model's "
            "folder again, or mend config.json where it is another model's."
        )
    for name, shape in wanted.items():
        if tensors[name].shape != shape:
            raise InputError(
                f"{folder}: {name} has the shape {list(tensors[name].shape)}, and config.json calls for {list(shape)}; copy the model's "
                "folder again, or mend config.json where it is another model's."
            )
    copies = [name for name in left_over if name in TIED]
    for name in (*wanted, *copies):
        if tensors[name].dtype not in DTYPES:
            raise InputError(
                f"{folder}: {name} is stored as {tensors[name].dtype}; supported: {', '.join(DTYPES)}. Save it as one of them."
            )
    for name in copies:
        if not torch.equal(_read(tensors, name), _read(tensors, TIED[name])):
            raise InputError(
                f"{folder}: tie_word_embeddings is true, and {name} differs from {TIED[name]}; set tie_word_embeddings to false in "
                "config.json where the two are meant to be apart."
            )
    return tuple(left_over)


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _place_of(stored: StoredTensor) -> tuple[str, int]:
    return stored.file.name, stored.position


def _read(tensors: Mapping[str, StoredTensor], name: str) -> torch.Tensor:
    return read_tensor(name, tensors[name])
