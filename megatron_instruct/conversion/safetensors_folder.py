"""The weights of a Hugging Face folder: one safetensors file or several with an index, read tensor by tensor, written in shards.

Pickled weights are never opened: a pickle can run any code. Does not know: what the tensors mean.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json, write_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""safetensors' names of the types of weights that are supported."""
_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
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


def read_rows(name: str, stored: StoredTensor, rows: Sequence[int]) -> torch.Tensor:
    """Read some rows of a tensor, in this order; the others take no memory."""
    with safetensors.safe_open(stored.file, framework="pt") as stream:
        part = stream.get_slice(name)
        return torch.cat([part[row : row + 1] for row in rows])


class Writer:
    """Writes tensors of known names and shapes in any order, one in memory at a time, in a with block: into model.safetensors, or into
    shards with an index where one file would be larger than max_shard_size. The files are those that safetensors itself would write."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, max_shard_size: str) -> None:
        self._dtype = dtype
        self._places: dict[str, tuple[Path, int, tuple[int, ...]]] = {}
        self._streams: dict[Path, IO[bytes]] = {}
        meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        shards = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
        for file_name, names in shards.filename_to_tensors.items():
            self._open(folder / file_name, {name: meta[name] for name in sorted(names)})
        if shards.is_sharded:
            content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(folder / INDEX, json.loads(json.dumps(content, sort_keys=True)))

    def _open(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a file's header: 8 bytes of its length, JSON padded to a multiple of 8 (safetensors' format)."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _NAMES[self._dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        stream = open(file, "wb")  # noqa: SIM115  (closed at the end of the with block)
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + end)
        for name, tensor in tensors.items():
            self._places[name] = (file, 8 + len(text) + header[name]["data_offsets"][0], tuple(tensor.shape))
        self._streams[file] = stream

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        file, position, shape = self._places.pop(name)
        assert tuple(tensor.shape) == shape and tensor.dtype == self._dtype, f"{name} is as announced"
        self._streams[file].seek(position)
        self._streams[file].write(memoryview(tensor.detach().contiguous().view(torch.uint8).numpy()).cast("B"))

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the files. Every announced tensor must have been written."""
        for stream in self._streams.values():
            stream.close()
        assert kind is not None or not self._places, f"never written: {sorted(self._places)[:4]}"
