"""A checkpoint in megatron-core's torch_dist format, read and written piece by piece, so that memory holds one piece at a time.

The format is torch.distributed.checkpoint's: NAME.distcp files hold tensors as torch.save writes them, one after the other; .metadata is
a pickle of the index (which tensor, which part of it, where); metadata.json names the format. The index is read by an unpickler that
knows the classes of that index and no others, and tensors with torch's weights_only: nothing that a checkpoint holds is ever run.
Does not know: models, Hugging Face.
"""

import collections
import contextlib
import io
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_instruct.conversion.digests import Digests
from megatron_instruct.conversion.mapped import map_tensor
from megatron_instruct.conversion.target import refusals_named
from megatron_instruct.errors import InputError
from megatron_instruct.files import write_json
from megatron_instruct.manifest import FileRecord

INDEX, FORMAT, DATA = ".metadata", "metadata.json", "__0_0.distcp"
_VALUES = "data/0"
"""Where an archive of torch.save has a tensor's values."""
_ALIGNED = 64
"""Tensors start at multiples of so many bytes, as torch.save's values do from there: so they can be used where they lie."""
_REMEDY = "give another iteration or write it again"
_SAFE_NAMES = {
    ("collections", "OrderedDict"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("torch.distributed.checkpoint.planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("pathlib", "PosixPath"),
}
_SAFE_MODULE = "torch.distributed.checkpoint.metadata"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A box of a tensor that a checkpoint holds."""

    key: str
    """The tensor's name in the checkpoint."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """A box as it is stored."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: Path
    position: int
    length: int


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """What a checkpoint holds of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """Where what is no tensor lies. It is never looked into."""

    file: Path
    position: int
    length: int


class Checkpoint:
    """What a checkpoint of any layout holds, by name. Raises InputError for one that cannot be read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.tensors, self.objects = _read_index(path)

    def bytes_of(self, key: str) -> bytes:
        """Return what is no tensor, as it is stored."""
        stored = self.objects[key]
        try:
            with open(stored.file, "rb") as stream:
                stream.seek(stored.position)
                content = stream.read(stored.length)
        except OSError as error:
            raise InputError(f"{stored.file} cannot be read where {key} lies ({error}); {_REMEDY}.") from error
        if len(content) != stored.length:
            raise InputError(f"{stored.file} ends before {key} does; {_REMEDY}.")
        return content

    def position(self, piece: Piece) -> tuple[str, int]:
        """Return where the box begins: its file's name, and a position in it."""
        chunks = self.tensors[piece.key].chunks
        first = next((chunk for chunk in chunks if _overlap(piece, chunk) is not None), chunks[0])
        return first.file.name, first.position

    def places(self, piece: Piece) -> Iterator[tuple[Path, int, int]]:
        """Yield file, position and length of what is stored of the box and of nothing else."""
        for chunk in self.tensors[piece.key].chunks:
            if _overlap(piece, chunk) == [(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]:
                yield chunk.file, chunk.position, chunk.length

    def read(self, piece: Piece) -> torch.Tensor:
        """Return the box, put together from however it was stored. One that lies in one piece stays in its file (mapped.py)."""
        stored, result, filled = self.tensors[piece.key], None, 0
        for chunk in stored.chunks:
            box = _overlap(piece, chunk)
            if box is None:
                continue
            tensor = _load(piece.key, chunk, stored.dtype, box)
            if tuple(tensor.shape) == piece.sizes:
                return tensor
            result = torch.empty(piece.sizes, dtype=stored.dtype) if result is None else result
            there = tuple(slice(start - a, end - a) for (start, end), a in zip(box, piece.offsets, strict=True))
            result[there] = tensor
            filled += tensor.numel()
        if result is None or filled != math.prod(piece.sizes):
            raise InputError(f"{self._path} holds {filled} of {math.prod(piece.sizes)} values of a part of {piece.key}; {_REMEDY}.")
        return result


def _overlap(piece: Piece, chunk: _Chunk) -> list[tuple[int, int]] | None:
    """Return from where to where both hold each axis; None where they have nothing in common."""
    box = [(max(a, c), min(a + s, c + t)) for a, s, c, t in zip(piece.offsets, piece.sizes, chunk.offsets, chunk.sizes, strict=True)]
    return None if any(end <= start for start, end in box) else box


class Writer:
    """Writes a checkpoint below an empty folder, tensor after tensor, in a with block, at whose end the index is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO = open(path / DATA, "wb")  # noqa: SIM115  (closed at the end of the with block)
        self._digests = Digests([path / DATA], grows=True)
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Close the data, and write the index where nothing went wrong."""
        if kind is not None:
            self._digests.stop()
            with contextlib.suppress(OSError):  # a full disk is told of already
                self._stream.close()
            return
        self._stream.close()
        self._digests.ready(self._path / DATA, None)
        metadata = Metadata(state_dict_metadata={**self._tensors, **self._objects}, storage_data=self._places)
        (self._path / INDEX).write_bytes(pickle.dumps(metadata))
        written = Checkpoint(self._path)
        assert (written.tensors, written.objects) == _contents(self._path, metadata), "the index says what was written"
        write_json(self._path / FORMAT, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})

    def tensor(self, piece: Piece, value: torch.Tensor) -> None:
        """Write one box. Its values may have any shape of as many elements."""
        known = self._tensors.setdefault(
            piece.key,
            TensorStorageMetadata(properties=TensorProperties(dtype=value.dtype), size=torch.Size(piece.shape), chunks=[]),
        )
        assert known.properties.dtype == value.dtype, "all parts of a tensor have one type"
        offsets = torch.Size(piece.offsets)
        known.chunks.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size(piece.sizes)))
        value = value.detach().reshape(piece.sizes).contiguous()
        if value.untyped_storage().nbytes() != value.nbytes:
            value = value.clone()  # torch.save writes the whole memory that a view looks at
        self._write(MetadataIndex(piece.key, offsets), value)

    def object(self, key: str, value: Any) -> None:
        """Write what is no tensor."""
        self._objects[key] = BytesStorageMetadata()
        self._write(MetadataIndex(key), value)

    def object_as_stored(self, key: str, content: bytes) -> None:
        """Write what is no tensor, as another checkpoint stores it."""
        self._objects[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), lambda stream: stream.write(content))

    def read_back(self, piece: Piece) -> torch.Tensor:
        """Read one box that was written as it is, from the file."""
        info = self._places[MetadataIndex(piece.key, torch.Size(piece.offsets))]
        chunk = _Chunk(offsets=piece.offsets, sizes=piece.sizes, file=self._path / DATA, position=info.offset, length=info.length)
        box = [(start, start + size) for start, size in zip(piece.offsets, piece.sizes, strict=True)]
        return _load(piece.key, chunk, self._tensors[piece.key].properties.dtype, box)

    def records(self) -> dict[Path, FileRecord]:
        """Return what a manifest says of the data, once the with block is left."""
        return self._digests.records()

    def _write(self, index: MetadataIndex, value: Any) -> None:
        with _without_checksums():
            self._append(index, lambda stream: torch.save(value, stream))

    def _append(self, index: MetadataIndex, write: Callable[[BinaryIO], Any]) -> None:
        with refusals_named(self._path / DATA):
            self._stream.write(bytes(-self._stream.tell() % _ALIGNED))
            start = self._stream.tell()
            write(self._stream)
            self._stream.flush()
        end = self._stream.tell()
        self._places[index] = _StorageInfo(relative_path=DATA, offset=start, length=end - start)
        self._digests.ready(self._path / DATA, end)


@contextlib.contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out the CRC-32 of what torch.save writes, which takes twice as long as the rest of it and which torch.load does not read.

    The manifest has the SHA-256 of the file.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _load(key: str, chunk: _Chunk, dtype: torch.dtype, box: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Return a part of what is stored of a tensor; box: from where to where on each axis of the whole tensor."""
    try:
        with open(chunk.file, "rb") as stream, torch.serialization.skip_data():  # names and sizes are read, values are not
            view: Any = _create_file_view(stream, chunk.position, chunk.length)
            tensor: torch.Tensor = torch.load(view, map_location="cpu", weights_only=True)
            view.seek(0)
            archive: Any = torch._C.PyTorchFileReader(view)
            values, size = archive.get_record_offset(_VALUES), archive.get_record_size(_VALUES)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, ValueError) as error:
        raise InputError(f"{chunk.file} is damaged where {key} lies ({error}); {_REMEDY}.") from error
    if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != chunk.sizes or tensor.dtype != dtype:
        raise InputError(f"{chunk.file} holds something else where {key} lies; {_REMEDY}.")
    if size != tensor.untyped_storage().nbytes() or values + size > chunk.length:
        raise InputError(f"{chunk.file} is damaged where {key} lies (its values take {size} bytes); {_REMEDY}.")
    here = [(start - offset, end - offset) for (start, end), offset in zip(box, chunk.offsets, strict=True)]
    part = tensor[tuple(slice(*place) for place in here)]
    spans = sum((size - 1) * stride for size, stride in zip(part.shape, part.stride(), strict=True)) + 1
    try:
        flat = map_tensor(chunk.file, chunk.position + values + part.storage_offset() * dtype.itemsize, (spans,), dtype)
    except (OSError, ValueError) as error:
        raise InputError(f"{chunk.file} is damaged where {key} lies ({error}); {_REMEDY}.") from error
    return flat.as_strided(part.shape, part.stride())


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == _SAFE_MODULE or (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint holds")


def _read_index(path: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    try:
        metadata = _IndexUnpickler(io.BytesIO((path / INDEX).read_bytes())).load()
        return _contents(path, metadata)
    except (OSError, pickle.UnpicklingError, EOFError, AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise InputError(f"{path} is no readable checkpoint of megatron-core ({error}); {_REMEDY}.") from error


def _contents(path: Path, metadata: Metadata) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """Return the tensors and what else there is."""
    places: dict[str, list[tuple[tuple[int, ...] | None, Any]]] = collections.defaultdict(list)
    for index, info in metadata.storage_data.items():
        places[index.fqn].append((None if index.offset is None else tuple(index.offset), info))
    tensors: dict[str, StoredTensor] = {}
    objects: dict[str, StoredObject] = {}
    for name, entry in metadata.state_dict_metadata.items():
        where = dict(places[name])
        if isinstance(entry, TensorStorageMetadata):
            tensors[name] = StoredTensor(shape=tuple(entry.size), dtype=entry.properties.dtype, chunks=_chunks(path, entry.chunks, where))
        else:
            info = where[None]
            objects[name] = StoredObject(file=_inside(path, info.relative_path), position=info.offset, length=info.length)
    return tensors, objects


def _inside(path: Path, name: str) -> Path:
    file = path / name
    if file.parent != path:
        raise ValueError(f"its index leads outside, to {name}")
    return file


def _chunks(path: Path, stored: Sequence[ChunkStorageMetadata], places: Mapping[tuple[int, ...] | None, Any]) -> tuple[_Chunk, ...]:
    result = []
    for chunk in stored:
        info = places[tuple(chunk.offsets)]
        file = _inside(path, info.relative_path)
        result.append(_Chunk(offsets=tuple(chunk.offsets), sizes=tuple(chunk.sizes), file=file, position=info.offset, length=info.length))
    return tuple(result)
