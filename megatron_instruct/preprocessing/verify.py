"""Is this data set what it should be? Structure, token range, document bounds, and what its manifest says.

Comes in: a prefix. Goes out: what was found, with every fault in words; nothing is repaired.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from megatron_instruct.errors import InputError
from megatron_instruct.files import sha256_of
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file, idx_file, roles_file
from megatron_instruct.preprocessing.token_scan import document_tokens, pieces_of, scan_tokens
from megatron_instruct.records import ROLE_CODES
from megatron_instruct.tokenizer import token_dtype

_CHUNK = 1 << 20
"""Entries of the index looked at together."""


@dataclass(frozen=True, kw_only=True)
class Findings:
    """What a data set holds. faults is empty when all is well."""

    documents: int
    tokens: int
    dtype: str
    smallest: int | None
    """Smallest token id; None without tokens."""
    largest: int | None
    empty_documents: int
    ended_documents: int | None
    """Documents whose last token is the end-of-document token; None when that is unknown."""
    roles: Mapping[str, int] | None
    """Tokens of each role; None without a file of roles."""
    bin_sha256: str
    """Of PREFIX.bin."""
    faults: tuple[str, ...]


def verify(prefix: Path, *, vocab_size: int | None, eod: int | None) -> Findings:
    """Check the files by themselves. Raises InputError for files that cannot even be opened as a data set.

    vocab_size: ids must be below it. eod: id of the end-of-document token.
    """
    dataset = IndexedDataset(prefix)
    faults = structure_faults(dataset)
    index_is_sound = not faults
    scan = scan_tokens(dataset, eod=eod if index_is_sound else None)
    if scan.smallest is not None and scan.smallest < 0:
        faults.append(f"the smallest token id is {scan.smallest}; ids start at 0")
    if vocab_size is not None and scan.largest is not None and scan.largest >= vocab_size:
        faults.append(
            f"the largest token id is {scan.largest}; the tokenizer's vocabulary has {vocab_size}: another tokenizer made the data"
        )
    roles, role_faults = _roles(prefix, len(dataset.tokens))
    return Findings(
        documents=len(dataset),
        tokens=len(dataset.tokens),
        dtype=dataset.dtype.name,
        smallest=scan.smallest,
        largest=scan.largest,
        empty_documents=_empty_documents(dataset) if index_is_sound else 0,
        ended_documents=scan.ended,
        roles=roles,
        bin_sha256=scan.sha256,
        faults=(*faults, *role_faults),
    )


def _roles(prefix: Path, tokens: int) -> tuple[dict[str, int] | None, list[str]]:
    """Return the tokens of each role, and what is wrong with the file of roles."""
    path = roles_file(prefix)
    if not path.is_file():
        return None, []
    return count_roles(path.name, pieces_of(path, np.dtype(np.uint8)), tokens)


def count_roles(name: str, pieces: Iterable[npt.NDArray[np.uint8]], tokens: int) -> tuple[dict[str, int], list[str]]:
    """Return the tokens of each role in a file of roles that is read in pieces, and what is wrong with it. tokens: of the data set."""
    found = np.zeros(256, dtype=np.int64)
    for codes in pieces:
        known = [np.count_nonzero(codes == code) for code in ROLE_CODES.values()]  # a fifth of what bincount takes
        found[: len(known)] += known
        if sum(known) < len(codes):
            found += np.bincount(codes[codes >= len(known)], minlength=256)
    size = int(found.sum())
    faults = [f"{name} has roles of {size} tokens; the data set has {tokens}"] if size != tokens else []
    unknown = np.flatnonzero(found[len(ROLE_CODES) :]) + len(ROLE_CODES)
    if len(unknown):
        faults.append(f"{name} holds {found[unknown].sum()} bytes that stand for no role, such as {unknown[0]}")
    return {role: int(found[code]) for role, code in ROLE_CODES.items()}, faults


def manifest_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".manifest.json")


def rejects_file(prefix: Path) -> Path:
    return prefix.with_name(prefix.name + ".rejects.jsonl")


def result_files(prefix: Path) -> list[Path]:
    """Return what a run writes before the manifest."""
    return [bin_file(prefix), idx_file(prefix), roles_file(prefix), rejects_file(prefix)]


def manifest_faults(prefix: Path, found: Findings, manifest: Manifest) -> list[str]:
    """Compare a data set with its manifest: content, counts, dtype, ends of documents, roles."""
    described = {output.path for output in manifest.outputs}
    missing = sorted({bin_file(prefix).name, idx_file(prefix).name} - described)
    if missing:
        return [f"the manifest describes {', '.join(sorted(described))}, not {', '.join(missing)}: it is that of another data set"]
    faults = []
    if found.roles is not None and roles_file(prefix).name not in described:
        faults.append(f"{roles_file(prefix).name} is there, and the manifest knows of no roles: it belongs to another run")
    known_roles = manifest.facts.get("roles", {}).get("tokens")
    if known_roles is not None and found.roles != known_roles:
        faults.append(f"the tokens of each role are {found.roles}; the manifest says {known_roles}")
    for output in manifest.outputs:
        file = prefix.parent / output.path
        content = found.bin_sha256 if file.name == bin_file(prefix).name else sha256_of(file)
        if content != output.sha256:
            faults.append(f"{output.path} has the SHA-256 {content[:12]}…; its manifest says {output.sha256[:12]}…: it was changed")
    for name, value in (("documents", found.documents), ("tokens", found.tokens)):
        if manifest.counts.get(name) != value:
            faults.append(f"the data set has {value} {name}; its manifest says {manifest.counts.get(name)}")
    came_in, set_aside = manifest.counts.get("documents_in"), sum(manifest.rejected.values())
    kept = manifest.counts.get("documents_kept", found.documents)  # splitting and packing change the number of documents
    if came_in != kept + set_aside:
        faults.append(f"{came_in} documents came in, but {kept} + {set_aside} rejected are there")
    tokenizer = manifest.facts.get("tokenizer", {})
    if "vocab_size" in tokenizer and found.dtype != token_dtype(tokenizer["vocab_size"]).name:
        faults.append(f"the tokens are {found.dtype}; a vocabulary of {tokenizer['vocab_size']} takes another dtype")
    if found.empty_documents:
        faults.append(f"{found.empty_documents} documents have no token")
    packed = manifest.settings.get("pack_sequence_length") is not None
    if manifest.settings.get("append_eod") and not packed and found.ended_documents not in (None, found.documents):
        faults.append(f"only {found.ended_documents} of {found.documents} documents end with the end-of-document token")
    return faults


def input_faults(manifest: Manifest) -> tuple[list[str], int]:
    """Compare the inputs that are still there with the manifest; return the faults and how many inputs are gone."""
    faults, gone = [], 0
    for source in manifest.inputs:
        path = Path(source.path)
        if not (path.is_absolute() and path.is_file()):  # version 0.1.0 kept names as given, and not the folder they were given in
            gone += 1
        elif path.stat().st_size != source.bytes or sha256_of(path) != source.sha256:
            faults.append(f"the input {source.path} was changed after the data set was made from it")
    return faults, gone


def own_manifest(prefix: Path) -> Manifest:
    """Read the manifest of the data set at `prefix`, or raise InputError."""
    return read_manifest(manifest_file(prefix), stage="preprocess")


def require_sound(prefix: Path, faults: list[str]) -> None:
    """Raise InputError that lists the faults, if there are any."""
    if faults:
        raise InputError(f"data set {prefix} has {len(faults)} fault(s):\n  - " + "\n  - ".join(faults))


def structure_faults(dataset: IndexedDataset) -> list[str]:
    """Return what is wrong with the index: where sequences lie, and where documents begin."""
    return [*_sequence_faults(dataset), *_bound_faults(dataset)]


def _spans(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, min(start + _CHUNK, count))


def _sequence_faults(dataset: IndexedDataset) -> Iterator[str]:
    end = 0
    for span in _spans(len(dataset.sequence_lengths)):
        lengths = dataset.sequence_lengths[span].astype(np.int64)
        if (lengths < 0).any():
            yield f"sequence {span.start + int(np.argmax(lengths < 0))} has a negative length"
            return
        ends = end + np.cumsum(lengths) * dataset.dtype.itemsize
        wrong = dataset.sequence_offsets[span] != ends - lengths * dataset.dtype.itemsize
        if wrong.any():
            yield f"sequence {span.start + int(np.argmax(wrong))} does not start where the one before it ends"
            return
        end = int(ends[-1])
    size = len(dataset.tokens) * dataset.dtype.itemsize
    if end != size:
        yield f"{bin_file(dataset.prefix).name} has {size} bytes; the index describes {end}"


def _bound_faults(dataset: IndexedDataset) -> Iterator[str]:
    bounds, sequences = dataset.document_bounds, len(dataset.sequence_lengths)
    if len(bounds) == 0 or bounds[0] != 0 or bounds[-1] != sequences:
        ends = f"{bounds[0]} to {bounds[-1]}" if len(bounds) else "nothing"
        yield f"the document bounds run over {ends}; they must run from 0 to {sequences}, the number of sequences"
    elif any((bounds[span.start + 1 : span.stop + 1] < bounds[span][: len(bounds) - 1 - span.start]).any() for span in _spans(len(bounds))):
        yield "the document bounds are not in order"


def _empty_documents(dataset: IndexedDataset) -> int:
    return sum(int((first == end).sum()) for first, end in document_tokens(dataset))
