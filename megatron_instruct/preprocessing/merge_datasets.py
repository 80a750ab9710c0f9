"""Indexed data sets -> one, without encoding anything again.

Comes in: prefixes, or a folder of data sets, which is taken in the order of names. Goes out: OUTPUT_PREFIX.bin and .idx with the bytes of
megatron-core's IndexedDatasetBuilder.add_index, .roles where the data sets have roles, the rejects of all, and a manifest of the stage
preprocess, since what takes a data set of preprocess_data.py takes this one. Nothing is held in memory but the bounds of documents.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from megatron_instruct.config import run_tool
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import atomic_write, concatenate, locked
from megatron_instruct.manifest import FileRecord, Manifest, finished, record, records, write_manifest
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset, bin_file, idx_file, roles_file, write_index
from megatron_instruct.preprocessing.read_back import Wanted, checked_files, checked_roles
from megatron_instruct.preprocessing.verify import (
    manifest_file,
    own_manifest,
    rejects_file,
    require_sound,
    result_files,
    structure_faults,
    verify,
)
from megatron_instruct.progress import Progress
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.workspace import is_own, remove, require_own, take_up

_STAGE = "preprocess"
_WORK = "merge"
"""What unfinished work says it is of: no run of preprocess_data.py takes it for its own."""
_MUST_AGREE = ("append_eod", "prepend_bos", "split_sentences", "pack_sequence_length")
"""Settings of preprocessing that say what a sequence and a document of the data set are."""


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Merge indexed data sets into one. Writes OUTPUT_PREFIX.bin, .idx, .rejects.jsonl, .manifest.json, and .roles where they have roles.

    All must have the same dtype, tokenizer, ends of documents and kind of sequences. Killed and started again, it ends with the same bytes.
    """

    output_prefix: Path
    """Path and name of the merged data set, without .bin or .idx."""
    input: Path | None = None
    """Folder: every data set in it is merged, in the order of their names."""
    data_path: tuple[str, ...] = ()
    """Prefixes of data sets, merged in this order, after those of the folder."""
    tokenizer_model: Path | None = None
    """Tokenizer of the data; needed where no data set has a manifest that names it."""
    adopt_data: bool = False
    """Accept data sets without a manifest, made by another tool with the tokenizer of the rest."""

    def __post_init__(self) -> None:
        if self.input is None and not self.data_path:
            raise ConfigError("input and data_path are empty; give a folder of data sets, or the prefixes of data sets.")
        if self.output_prefix.name in ("", "..") or self.output_prefix.suffix in (".bin", ".idx"):
            raise ConfigError(f"output_prefix={self.output_prefix} must be a path and a name, without .bin or .idx.")


@dataclass(frozen=True, kw_only=True)
class _Source:
    """One of the data sets."""

    prefix: Path
    dataset: IndexedDataset
    manifest: Manifest | None
    settings: Mapping[str, Any]
    """Those of _MUST_AGREE, read off the data where there is no manifest."""
    files: tuple[FileRecord, ...]
    has_roles: bool


def run(config: MergeConfig) -> Manifest:
    """Merge, and return the manifest."""
    prefix = config.output_prefix
    prefixes = _prefixes(config)
    manifests = [_manifest_of(path, adopt=config.adopt_data) for path in prefixes]
    tokenizer = _tokenizer(config, prefixes, manifests)
    sources = [_source(path, manifest, tokenizer) for path, manifest in zip(prefixes, manifests, strict=True)]
    _check_agreement(sources)
    settings = {**sources[0].settings, "tokenizer": tokenizer["fingerprint"]}
    inputs = tuple(file for source in sources for file in source.files)
    folder = prefix.with_name(prefix.name + ".parts")
    if not is_own(folder, _WORK) and (done := _finished(prefix, settings, inputs)) is not None:
        return done
    require_own(folder, _WORK)
    with locked(folder):
        if (done := _finished(prefix, settings, inputs)) is None:
            plan = {"stage": _WORK, "settings": settings, "inputs": [[file.path, file.sha256] for file in inputs]}
            take_up(folder, plan, outputs=result_files(prefix))
            done = _merge(prefix, sources, tokenizer, settings, inputs)
            write_manifest(manifest_file(prefix), done)
            _describe(prefix, sources, done)
        remove(folder, _WORK)
    return done


def _prefixes(config: MergeConfig) -> list[Path]:
    """Return the prefixes in order; the output itself is none, so that it may lie in the same folder."""
    found: list[Path] = []
    if config.input is not None:
        if not config.input.is_dir():
            raise InputError(f"input={config.input} is no folder; give a folder of data sets, or prefixes with data_path.")
        names = {file.stem for file in config.input.iterdir() if file.is_file() and file.suffix in (".bin", ".idx")}
        if config.input.resolve() == config.output_prefix.parent.resolve():
            names.discard(config.output_prefix.name)
        found = [config.input / name for name in sorted(names)]
        if not found and not config.data_path:
            raise InputError(f"input={config.input} holds no data set: no file there ends in .bin or .idx.")
    found += [Path(name.removesuffix(".bin").removesuffix(".idx")) for name in config.data_path]
    repeated = [str(prefix) for prefix, count in Counter(path.resolve() for path in found).items() if count > 1]
    if repeated:
        raise ConfigError(f"data set {repeated[0]} is named twice; weights of a blend repeat data in training.")
    if config.output_prefix.resolve() in [path.resolve() for path in found]:
        raise ConfigError(f"output_prefix={config.output_prefix} is one of the data sets to merge; choose another.")
    return found


def _manifest_of(prefix: Path, *, adopt: bool) -> Manifest | None:
    for file in (bin_file(prefix), idx_file(prefix)):
        if not file.is_file():
            raise InputError(f"data set {prefix}: {file} is missing; a data set is a .bin and a .idx file of one name.")
    if manifest_file(prefix).is_file():
        return own_manifest(prefix)
    if not adopt:
        raise InputError(
            f"data set {prefix} has no manifest: it is unfinished, or made by another tool; "
            "run preprocess_data.py again, or pass --adopt-data to take it as it is."
        )
    return None


def _tokenizer(config: MergeConfig, prefixes: Sequence[Path], manifests: Sequence[Manifest | None]) -> dict[str, Any]:
    """Return fingerprint, vocab_size and eod of the one tokenizer of all data sets."""
    known: dict[Path, dict[str, Any]] = {}
    for prefix, manifest in zip(prefixes, manifests, strict=True):
        if manifest is not None:
            known[prefix] = manifest.facts["tokenizer"]
    first = str(next(iter(known), ""))
    if config.tokenizer_model is not None:
        given = load_tokenizer(config.tokenizer_model)
        wanted: dict[str, Any] = {"fingerprint": given.fingerprint, "vocab_size": given.vocab_size, "eod": given.eod}
        first = f"tokenizer_model={config.tokenizer_model}"
    elif not known:
        raise ConfigError("none of the data sets has a manifest that names its tokenizer; give it with tokenizer_model.")
    else:
        wanted = dict(next(iter(known.values())))
    for prefix, one in known.items():
        if one["fingerprint"] != wanted["fingerprint"]:
            raise InputError(
                f"data set {prefix} was made with the tokenizer {one['fingerprint'][:12]}, {first} has {wanted['fingerprint'][:12]}: "
                "the same id means different text; preprocess one of them again with the other's tokenizer."
            )
    return wanted


def _source(prefix: Path, manifest: Manifest | None, tokenizer: Mapping[str, Any]) -> _Source:
    """Open and fingerprint one data set. Raises InputError for one that is damaged or changed."""
    dataset = IndexedDataset(prefix)
    if dataset.has_modes:
        raise InputError(f"data set {prefix} is multimodal: its index has a mode for each sequence, which is not merged.")
    require_sound(prefix, structure_faults(dataset))
    roles = roles_file(prefix)
    has_roles = any(output.path == roles.name for output in manifest.outputs) if manifest is not None else roles.is_file()
    files = records([bin_file(prefix), idx_file(prefix), *([roles] if has_roles else [])])
    if manifest is None:
        found = verify(prefix, vocab_size=tokenizer["vocab_size"], eod=tokenizer["eod"])
        require_sound(prefix, list(found.faults))
        several = len(dataset.sequence_lengths) != len(dataset)
        settings: dict[str, Any] = {
            "append_eod": found.ended_documents == found.documents,
            "prepend_bos": None,
            "split_sentences": "unknown" if several else None,
            "pack_sequence_length": None,
        }
    else:
        settings = {name: manifest.settings.get(name) for name in _MUST_AGREE}
        written = {output.path: output.sha256 for output in manifest.outputs}
        for file in files:
            if written.get(Path(file.path).name) != file.sha256:
                raise InputError(f"{file.path} was changed after its manifest was written; run preprocess_data.py again for {prefix}.")
    return _Source(prefix=prefix, dataset=dataset, manifest=manifest, settings=settings, files=files, has_roles=has_roles)


def _check_agreement(sources: Sequence[_Source]) -> None:
    first = sources[0]
    for source in sources[1:]:
        if source.dataset.dtype != first.dataset.dtype:
            raise InputError(
                f"data set {source.prefix} holds {source.dataset.dtype.name} tokens, {first.prefix} {first.dataset.dtype.name}; "
                "a data set has one dtype: preprocess one of them again."
            )
        for name in _MUST_AGREE:
            if source.settings[name] != first.settings[name]:
                raise InputError(
                    f"data set {source.prefix} was made with {name}={source.settings[name]!r}, {first.prefix} with "
                    f"{name}={first.settings[name]!r}; preprocess one of them again, or keep them apart and blend them in training."
                )
    without = [str(source.prefix) for source in sources if not source.has_roles]
    if without and len(without) < len(sources):
        raise InputError(
            f"{len(sources) - len(without)} of {len(sources)} data sets have roles, and not {', '.join(without)}: their tokens would have "
            "no role. Merge data sets with roles and without apart and blend them in training, or preprocess all inputs in one run."
        )


def _finished(prefix: Path, settings: Mapping[str, Any], inputs: Sequence[FileRecord]) -> Manifest | None:
    manifest = finished(manifest_file(prefix), stage=_STAGE, settings=settings, inputs=inputs)
    if manifest is not None:
        print(f"Finished already: {prefix}.")
    return manifest


def _merge(
    prefix: Path, sources: Sequence[_Source], tokenizer: Mapping[str, Any], settings: Mapping[str, Any], inputs: tuple[FileRecord, ...]
) -> Manifest:
    """Write and check everything but the manifest, which is returned."""
    dtype = sources[0].dataset.dtype
    counts = _counts(sources)
    total = sum(file.bytes for file in inputs if not file.path.endswith(".idx"))
    with Progress("merge", total=total, unit="bytes") as progress:
        concatenate([bin_file(source.prefix) for source in sources], bin_file(prefix), report=progress.add)
        if sources[0].has_roles:
            concatenate([roles_file(source.prefix) for source in sources], roles_file(prefix), report=progress.add)
    rejects = [rejects_file(source.prefix) for source in sources]
    concatenate([file for file in rejects if file.is_file()], rejects_file(prefix))
    with atomic_write(idx_file(prefix), "wb") as stream:
        _write_index(stream, [source.dataset for source in sources], dtype)
    wanted = Wanted(
        documents=counts["documents"],
        tokens=counts["tokens"],
        vocab_size=tokenizer["vocab_size"],
        eod=tokenizer["eod"] if settings["append_eod"] and settings["pack_sequence_length"] is None else None,
    )
    outputs = list(checked_files(prefix, wanted))
    facts: dict[str, Any] = {
        "dtype": dtype.name,
        "tokenizer": dict(tokenizer),
        "merged": [{"data_set": str(source.prefix), "documents": len(source.dataset)} for source in sources],
    }
    if sources[0].has_roles:
        roles, tokens = checked_roles(roles_file(prefix), prefix, wanted)
        outputs.append(roles)
        facts["roles"] = {"tokens": tokens}
    outputs.append(record(rejects_file(prefix), relative_to=prefix.parent))
    rejected: Counter[str] = sum((Counter(source.manifest.rejected) for source in sources if source.manifest is not None), Counter())
    return Manifest(
        stage=_STAGE,
        settings=settings,
        inputs=inputs,
        outputs=tuple(outputs),
        counts=counts,
        rejected=dict(sorted(rejected.items())),
        facts=facts,
    )


def _counts(sources: Sequence[_Source]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for source in sources:
        own = dict(source.manifest.counts) if source.manifest is not None else {"documents_in": len(source.dataset)}
        own = {**own, "documents": len(source.dataset), "tokens": len(source.dataset.tokens)}
        counts.update({"documents_kept": own["documents"], **own})
    return dict(counts)


def _write_index(stream: IO[bytes], datasets: Sequence[IndexedDataset], dtype: np.dtype[Any]) -> None:
    lengths = [dataset.sequence_lengths for dataset in datasets]
    alone = not any(len(dataset.sequence_lengths) != len(dataset) or any(_unusual(dataset)) for dataset in datasets)
    documents = None if alone else [np.diff(dataset.document_bounds).astype("<i4") for dataset in datasets]
    write_index(stream, dtype, lengths, documents=documents)


def _unusual(dataset: IndexedDataset) -> Iterator[bool]:
    """Yield for one run of documents after another whether a document is not one sequence."""
    bounds: npt.NDArray[np.int64] = dataset.document_bounds
    for start in range(0, len(bounds), 1 << 20):
        piece = bounds[start : start + (1 << 20)]
        yield bool((piece != np.arange(start, start + len(piece))).any())


def _describe(prefix: Path, sources: Sequence[_Source], manifest: Manifest) -> None:
    for source in sources:
        origin = "" if source.manifest is not None else ", without a manifest: taken as it is"
        print(f"  {source.prefix}: {len(source.dataset):,} documents, {len(source.dataset.tokens):,} tokens{origin}")
    counts = manifest.counts
    print(f"{prefix}: {counts['documents']:,} documents, {counts['tokens']:,} tokens, {manifest.facts['dtype']}")
    if manifest.rejected:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.rejected.items())
        print(f"What was set aside when they were made ({reasons}) is in {rejects_file(prefix)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(MergeConfig, run, argv, prog="merge_datasets.py")
