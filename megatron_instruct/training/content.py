"""Is a data set's content what it was? Its fingerprint, from its manifest where that can be trusted, else from the bytes.

Comes in: a prefix, its manifest, a file of what was read before. Goes out: the SHA-256 of each of its files. Does not know: blends, torch.

Reading billions of tokens at every start would take minutes. So a file is read only where it may have changed since its SHA-256 was taken:
where its inode changed (ctime, which no tool sets back) after its manifest was written, or since it was read the last time.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_instruct.errors import InputError
from megatron_instruct.files import sha256_of, write_json
from megatron_instruct.manifest import FileRecord, Manifest
from megatron_instruct.records import ROLES_SUFFIX
from megatron_instruct.training.index_file import IndexFile

NAME = "checked.json"
"""File below the index caches with what was read."""
_CHUNK = 1 << 24
"""Bytes read at a time."""


@dataclass
class ContentCheck:
    """Looks at the files of data sets; what it had to read is remembered in `path` by `remember`."""

    path: Path
    """Of NAME; it need not exist."""
    reads: bool = True
    """False where another process of this machine reads for all: manifests are then taken at their word."""
    _known: dict[str, Any] = field(default_factory=dict)
    _read: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.is_file():
            try:
                self._known = json.loads(self.path.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # nothing that was computed: everything is read again

    def fingerprint(self, prefix: str, manifest: Manifest) -> list[str]:
        """Return the SHA-256 of each file of a data set. Raises InputError where a file is not what its manifest says."""
        written = Path(f"{prefix}.manifest.json").stat().st_ctime_ns
        files = [output for output in manifest.outputs if output.path.endswith((".bin", ".idx", ROLES_SUFFIX))]
        for record in files:
            file = Path(prefix).parent / record.path
            if self.reads and file.stat().st_ctime_ns > written:
                self._compare(file, record)
        return [record.sha256 for record in files]

    def foreign_fingerprint(self, index: IndexFile, vocab_size: int) -> list[str]:
        """Return the SHA-256 of .idx and .bin of a data set without a manifest. Raises InputError for a token that no tokenizer id is."""
        tokens = Path(f"{index.prefix}.bin")
        found = self._remembered(tokens)
        if found is None:
            print(f"reading {tokens}: it has no manifest, and was not read before …", flush=True)
            state = _state(tokens)
            found = self._note(tokens, state, _digest_and_largest(tokens, index.dtype))
        if found["largest"] >= vocab_size:
            raise InputError(
                f"data set {index.prefix} holds the token {found['largest']:,}, and the tokenizer has {vocab_size:,} ids: it was made with "
                "another tokenizer; give that one as tokenizer_model, or preprocess the data again."
            )
        return [sha256_of(Path(f"{index.prefix}.idx")), found["sha256"]]

    def remember(self) -> None:
        """Write down what was read, for the next start."""
        if self._read:
            write_json(self.path, {**self._known, **self._read})

    def _compare(self, file: Path, record: FileRecord) -> None:
        found = self._remembered(file)
        if found is None:
            print(f"reading {file}: it may have changed since its manifest was written …", flush=True)
            state = _state(file)
            found = self._note(file, state, {"sha256": sha256_of(file)})
        if found["sha256"] != record.sha256:
            raise InputError(
                f"{file} is not what its manifest says: SHA-256 {found['sha256'][:12]}… instead of {record.sha256[:12]}…, with the same "
                "size. It was changed or damaged after preprocessing; run preprocess_data.py again, or restore the file."
            )

    def _remembered(self, file: Path) -> Any:
        entry = self._known.get(str(file.resolve()))
        return entry if entry is not None and entry["state"] == _state(file) else None

    def _note(self, file: Path, state: list[int], found: dict[str, Any]) -> dict[str, Any]:
        self._read[str(file.resolve())] = {**found, "state": state}
        return found


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_ino, status.st_ctime_ns]


def _digest_and_largest(file: Path, dtype: np.dtype[Any]) -> dict[str, Any]:
    digest, largest = hashlib.sha256(), 0
    with open(file, "rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            largest = max(largest, int(np.frombuffer(chunk, dtype=dtype).max()))
    return {"sha256": digest.hexdigest(), "largest": largest}
