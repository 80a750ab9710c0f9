"""Look into indexed data sets, of this tool or of any Megatron-style one: verify them, print what they hold, show documents."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_instruct.config import run_tool
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.verify import Findings, manifest_faults, manifest_file, own_manifest, verify
from megatron_instruct.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class InspectConfig:
    """Verify indexed data sets and print what they hold. Exits with 3 when a data set has a fault; changes nothing."""

    data_path: tuple[str, ...]
    """Prefixes of data sets, without .bin or .idx."""
    tokenizer_model: Path | None = None
    """Tokenizer of the data: checks that it is the one that made them, and decodes documents."""
    show: int = 0
    """Number of documents to print, from the first."""
    documents: tuple[int, ...] = ()
    """Numbers of documents to print, from 0."""
    adopt_data: bool = False
    """Accept data sets without a manifest, made by another tool."""

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ConfigError("data_path is empty; give the prefix of at least one data set.")
        if (self.show or self.documents) and self.tokenizer_model is None:
            raise ConfigError("printing documents needs tokenizer_model; give the tokenizer that made the data.")
        if self.show < 0 or min(self.documents, default=0) < 0:
            raise ConfigError(f"show={self.show} and documents={self.documents} must not be negative; documents count from 0.")


def run(config: InspectConfig) -> None:
    """Inspect each data set; raises InputError that names every faulty one, after all are done."""
    tokenizer = load_tokenizer(config.tokenizer_model) if config.tokenizer_model is not None else None
    faulty = []
    for name in config.data_path:
        prefix = Path(name.removesuffix(".bin").removesuffix(".idx"))
        faults = _inspect(prefix, tokenizer, adopt=config.adopt_data)
        for fault in faults:
            print(f"  FAULT: {fault}")
        if faults:
            faulty.append(f"{prefix} ({len(faults)})")
        elif tokenizer is not None:
            _show(IndexedDataset(prefix), [*range(config.show), *config.documents], tokenizer)
    if faulty:
        raise InputError(f"faults in: {', '.join(faulty)}; they are listed above. Run preprocess_data.py again for them.")


def _inspect(prefix: Path, tokenizer: Tokenizer | None, *, adopt: bool) -> list[str]:
    """Print one data set's findings and return its faults."""
    print(f"{prefix}")
    faults: list[str] = []
    manifest: Manifest | None = None
    try:
        if not adopt or manifest_file(prefix).is_file():
            manifest = own_manifest(prefix)
    except InputError as error:
        remedy = " (for data of another tool, pass --adopt-data)" if not manifest_file(prefix).is_file() else ""
        faults.append(f"{error}{remedy}")
    made_with = manifest.facts.get("tokenizer", {}) if manifest else {}
    if tokenizer is not None:
        made_with = {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod, "fingerprint": tokenizer.fingerprint}
        if manifest and manifest.facts.get("tokenizer", {}).get("fingerprint") != tokenizer.fingerprint:
            faults.append("the data were made with another tokenizer than tokenizer_model")
    try:
        found = verify(prefix, vocab_size=made_with.get("vocab_size"), eod=made_with.get("eod"))
    except InputError as error:
        return [*faults, str(error)]
    faults += [*found.faults, *(manifest_faults(prefix, found, manifest) if manifest and not found.faults else [])]
    _print_findings(found, manifest, sound=not faults)
    return faults


def _print_findings(found: Findings, manifest: Manifest | None, *, sound: bool) -> None:
    ids = "no ids" if found.smallest is None else f"ids {found.smallest:,} to {found.largest:,}"
    print(f"  {found.documents:,} documents, {found.tokens:,} tokens ({found.dtype}, {ids}), {found.empty_documents:,} empty")
    if found.ended_documents is not None:
        print(f"  {found.ended_documents:,} of {found.documents:,} documents end with the end-of-document token")
    if manifest is not None:
        print(f"  {manifest.counts.get('documents_in', 0):,} documents came in, {sum(manifest.rejected.values()):,} were rejected")
    if sound:
        print("  OK" if manifest is not None else "  OK, as far as files without a manifest can be checked")


def _show(dataset: IndexedDataset, numbers: Sequence[int], tokenizer: Tokenizer) -> None:
    for number in numbers:
        if number >= len(dataset):
            print(f"--- there is no document {number}; the data set has {len(dataset):,}")
            break
        ids = dataset.document(number).tolist()
        ended = bool(ids) and ids[-1] == tokenizer.eod
        end = " + end of document" if ended else ""
        print(f"--- document {number}: {len(ids) - ended:,} tokens{end}\n{tokenizer.decode(ids[:-1] if ended else ids)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(InspectConfig, run, argv, prog="inspect_data.py")
