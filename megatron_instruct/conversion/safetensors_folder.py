"""The weights of a Hugging Face folder: one safetensors file or several with an index, read tensor by tensor, written in shards.

Pickled weights are never opened: a pickle can run any code. Does not know: what the tensors mean.
"""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

import safetensors
import torch
from huggingface_hub import split_torch_state_dict_into_shards

from megatron_instruct.conversion.digests import Digests
from megatron_instruct.conversion.mapped import map_tensor
from megatron_instruct.conversion.target import refusals_named
from megatron_instruct.errors import InputError
from megatron_instruct.files import read_json, write_json
from megatron_instruct.manifest import FileRecord

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": "fp32", "BF16": "bf16", "F16": "fp16"}
"""safetensors' names of the types of weights that are supported."""
_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_PICKLES = ("pytorch_model*.bin", "*.pth", "*.pt", "*.ckpt")


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies, and what it is."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name, such as BF16."""
    position: int
    """Of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _TYPES[self.dtype].itemsize


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
        if (folder / SINGLE).is_file() and folder / SINGLE not in files:
            raise InputError(f"{folder} holds {SINGLE}, which transformers reads, and {INDEX}, which names others; remove one of them.")
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
                positions = _positions(file)
                for name in stream.keys():  # noqa: SIM118  (a file, not a mapping)
                    if name in found:
                        raise InputError(f"{file}: the tensor {name} is in {found[name].file.name} too; copy the model's folder again.")
                    part = stream.get_slice(name)
                    found[name] = StoredTensor(file=file, shape=tuple(part.get_shape()), dtype=part.get_dtype(), position=positions[name])
        except safetensors.SafetensorError as error:
            raise InputError(f"{file} is damaged or cut short ({error}); copy it again.") from error
    if (folder / INDEX).is_file():
        listed: dict[str, str] = read_json(folder / INDEX)["weight_map"]
        for name, file_name in sorted(listed.items()):
            if name not in found or found[name].file.name != file_name:
                raise InputError(f"{folder / INDEX} says that {file_name} holds {name}, and it does not; copy the model's folder again.")
    return found


def _positions(file: Path) -> dict[str, int]:
    """Return where each tensor of a sound file starts, which safetensors itself does not tell."""
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}


def read_tensor(name: str, stored: StoredTensor) -> torch.Tensor:
    """Return one tensor, which stays in its file (mapped.py)."""
    try:
        return map_tensor(stored.file, stored.position, stored.shape, _TYPES[stored.dtype])
    except (OSError, ValueError) as error:
        raise InputError(f"{stored.file} cannot be read where {name} lies ({error}); copy it again.") from error


def read_rows(name: str, stored: StoredTensor, rows: Sequence[int]) -> torch.Tensor:
    """Read some rows of a tensor, in this order; the others take no memory."""
    with safetensors.safe_open(stored.file, framework="pt") as stream:
        part = stream.get_slice(name)
        return torch.cat([part[row : row + 1] for row in rows])


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a tensor goes."""

    file: Path
    start: int
    shape: tuple[int, ...]


class Writer:
    """Writes tensors of known names and shapes in any order, one in memory at a time, in a with block: into model.safetensors, or into
    shards with an index where one file would be larger than max_shard_size. The files are those that safetensors itself would write."""

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, *, max_shard_size: str) -> None:
        self._dtype = dtype
        self._places: dict[str, _Place] = {}
        self._streams: dict[Path, IO[bytes]] = {}
        self._waiting: dict[Path, dict[str, _Place]] = {}
        """By file: the tensors that are not written yet, in the file's order."""
        meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
        shards = split_torch_state_dict_into_shards(meta, max_shard_size=max_shard_size)
        try:
            for file_name, names in shards.filename_to_tensors.items():
                self._open(folder / file_name, {name: meta[name] for name in sorted(names)})
        except OSError:
            for stream in self._streams.values():
                stream.close()
            raise
        if shards.is_sharded:
            content = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            write_json(folder / INDEX, json.loads(json.dumps(content, sort_keys=True)))
        self._digests = Digests(self._streams, grows=True)

    def _open(self, file: Path, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write a file's header: 8 bytes of its length, JSON padded to a multiple of 8 (safetensors' format)."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, tensor in tensors.items():
            start, end = end, end + tensor.nbytes
            header[name] = {"dtype": _NAMES[self._dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        stream = self._streams[file] = open(file, "wb")  # noqa: SIM115  (closed at the end of the with block)
        with refusals_named(file):
            stream.write(len(text).to_bytes(8, "little") + text)
            stream.truncate(8 + len(text) + end)
        starts = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
        self._waiting[file] = {name: _Place(file=file, start=starts[name], shape=tuple(tensors[name].shape)) for name in tensors}
        self._places |= self._waiting[file]

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor."""
        place = self._places[name]
        assert tuple(tensor.shape) == place.shape and tensor.dtype == self._dtype, f"{name} is as announced"
        stream, waiting = self._streams[place.file], self._waiting[place.file]
        with refusals_named(place.file):
            stream.seek(place.start)
            stream.write(memoryview(tensor.detach().contiguous().view(torch.uint8).numpy()).cast("B"))
            stream.flush()
        del waiting[name]
        self._digests.ready(place.file, next((first.start for first in waiting.values()), None))

    def read_back(self, name: str) -> torch.Tensor:
        """Read one tensor that was written, from its file."""
        place = self._places[name]
        return read_tensor(name, StoredTensor(file=place.file, shape=place.shape, dtype=_NAMES[self._dtype], position=place.start))

    def records(self) -> dict[Path, FileRecord]:
        """Return what a manifest says of the files, once the with block is left."""
        return self._digests.records()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the files. Every announced tensor must have been written."""
        if kind is not None:
            self._digests.stop()
        for stream in self._streams.values():
            with contextlib.suppress(OSError) if kind is not None else contextlib.nullcontext():  # a full disk is told of already
                stream.close()
        if kind is not None:
            return
        left = sorted(name for waiting in self._waiting.values() for name in waiting)
        assert not left, f"never written: {left[:4]}"
