"""The weights of a Hugging Face folder: one safetensors file or several with an index, read tensor by tensor, written in shards.

Pickled weights are never opened: a pickle can run any code. Does not know: what the tensors mean.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""safetensors' names of the types of weights that are supported."""
_PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as BF16."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a Hugging Face folder, or raise InputError with the reason."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        places = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(places, dict) or not places:
            raise InputError(f"{folder / INDEX} has no weight_map; copy the model's folder again.")
        files = sorted({folder / str(name) for name in places.values()})
        for file in files:
            if file.parent != folder or not file.is_file():
                raise InputError(f"{file}: named by {INDEX}, and there is no such file beside it; copy the model's folder again.")
        return files
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} holds its weights as pickles ({pickles[0]}), which can run any code when they are read; where you trust them, "
            "rewrite them with transformers: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)."
        )
    raise InputError(f"{folder} has neither {SINGLE} nor {INDEX}; give a Hugging Face folder with weights.")


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the folder by name, from the headers of its files alone. Raises InputError for a damaged file."""
    found: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        try:
            with safetensors.safe_open(file, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118  (a file, not a mapping)
                    if name in found:
                        raise InputError(f"{file}: the tensor {name} is in {found[name].file.name} too; copy the model's folder again.")
                    part = stream.get_slice(name)
                    found[name] = StoredTensor(file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype())
        except safetensors.SafetensorError as error:
            raise InputError(f"{file} is damaged or cut short ({error}); copy it again.") from error
    if (folder / INDEX).is_file():
        listed: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        for name, file_name in sorted(listed.items()):
            if name not in found or found[name].file.name != file_name:
                raise InputError(f"{folder / INDEX} says that {file_name} holds {name}, and it does not; copy the model's folder again.")
    return found


def read_tensor(name: str, stored: StoredTensor) -> torch.Tensor:
    """Read one tensor."""
    with safetensors.safe_open(stored.file, framework="pt") as stream:
        tensor: torch.Tensor = stream.get_tensor(name)
    return tensor


def write_tensors(folder: Path, tensors: Mapping[str, torch.Tensor], *, max_shard_size: str) -> None:
    """Write model.safetensors, or shards with an index where one file would be larger than max_shard_size."""
    shards = split_torch_state_dict_into_shards(dict(tensors), max_shard_size=max_shard_size)
    for file_name, names in shards.filename_to_tensors.items():
        part = {name: tensors[name].contiguous() for name in names}
        safetensors.torch.save_file(part, folder / file_name, metadata={"format": "pt"})
        (folder / file_name).chmod(0o644)  # safetensors 0.8 makes a file that only its owner can read
    if shards.is_sharded:
        content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        write_json(folder / INDEX, json.loads(json.dumps(content, sort_keys=True)))
