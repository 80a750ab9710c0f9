"""Look into indexed data sets, of this tool or of any Megatron-style one: verify them, print what they hold, show documents."""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_instruct.config import run_tool
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest
from megatron_instruct.preprocessing.decoded import decoded
from megatron_instruct.preprocessing.indexed_dataset import IndexedDataset
from megatron_instruct.preprocessing.verify import Findings, input_faults, manifest_faults, manifest_file, own_manifest, verify
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
    json: bool = False
    """Print what was found as one line of JSON, for programs."""

    def __post_init__(self) -> None:
        if not self.data_path:
            raise ConfigError("data_path is empty; give the prefix of at least one data set.")
        if (self.show or self.documents) and self.tokenizer_model is None:
            raise ConfigError("printing documents needs tokenizer_model; give the tokenizer that made the data.")
        if (self.show or self.documents) and self.json:
            raise ConfigError("json prints what was found for programs, and no documents; leave out show and documents, or json.")
        if self.show < 0 or min(self.documents, default=0) < 0:
            raise ConfigError(f"show={self.show} and documents={self.documents} must not be negative; documents count from 0.")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was found of one data set. faults is empty when all is well."""

    data_set: str
    found: Findings | None
    """None for files that cannot be opened as a data set."""
    counts: Mapping[str, int]
    """Those of the manifest: empty without one."""
    rejected: int | None
    """Documents that were set aside when the data set was made; None without a manifest."""
    inputs_gone: int
    """Inputs that are no longer there to compare."""
    faults: tuple[str, ...]


def run(config: InspectConfig) -> None:
    """Inspect each data set; raises InputError that names every faulty one, after all are done."""
    tokenizer = load_tokenizer(config.tokenizer_model) if config.tokenizer_model is not None else None
    reports = []
    for name in config.data_path:
        prefix = Path(name.removesuffix(".bin").removesuffix(".idx"))
        report = inspect(prefix, tokenizer, adopt=config.adopt_data)
        reports.append(report)
        if not config.json:
            _print(report)
            if tokenizer is not None and not report.faults:
                _show(prefix, config, tokenizer)
    if config.json:
        print(json.dumps([dataclasses.asdict(report) for report in reports]))
    faulty = [f"{report.data_set} ({len(report.faults)})" for report in reports if report.faults]
    if faulty:
        raise InputError(f"faults in: {', '.join(faulty)}; they are listed above. Run preprocess_data.py again for them.")


def inspect(prefix: Path, tokenizer: Tokenizer | None, *, adopt: bool) -> Report:
    """Compare a data set with itself, its manifest, its inputs and the tokenizer; nothing is changed."""
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
    found, gone = None, 0
    try:
        found = verify(prefix, vocab_size=made_with.get("vocab_size"), eod=made_with.get("eod"))
        faults += found.faults
        if manifest is not None:
            faults += manifest_faults(prefix, found, manifest)
    except InputError as error:
        faults.append(str(error))
    if manifest is not None:
        changed, gone = input_faults(manifest)
        faults += changed
    return Report(
        data_set=str(prefix),
        found=found,
        counts=manifest.counts if manifest is not None else {},
        rejected=sum(manifest.rejected.values()) if manifest is not None else None,
        inputs_gone=gone,
        faults=tuple(faults),
    )


def _print(report: Report) -> None:
    print(report.data_set)
    found = report.found
    if found is not None:
        ids = "no ids" if found.smallest is None else f"ids {found.smallest:,} to {found.largest:,}"
        print(f"  {found.documents:,} documents, {found.tokens:,} tokens ({found.dtype}, {ids}), {found.empty_documents:,} empty")
        if found.ended_documents is not None:
            rate = found.ended_documents / max(found.documents, 1)
            print(
                f"  {found.ended_documents:,} of {found.documents:,} documents end with the end-of-document token ({rate:.1%}); "
                f"a document has {found.tokens / max(found.documents, 1):,.1f} tokens on average"
            )
        if found.roles is not None:
            shares = ", ".join(f"{role} {count / max(found.tokens, 1):.1%}" for role, count in found.roles.items() if count)
            print(f"  roles of tokens: {shares}")
    if report.rejected is not None:
        print(f"  {report.counts.get('documents_in', 0):,} documents came in, {report.rejected:,} were rejected")
    if report.inputs_gone:
        print(f"  {report.inputs_gone:,} inputs are no longer where they were read, so they are not compared")
    for fault in report.faults:
        print(f"  FAULT: {fault}")
    if not report.faults:
        print("  OK" if report.rejected is not None else "  OK, as far as files without a manifest can be checked")


def _show(prefix: Path, config: InspectConfig, tokenizer: Tokenizer) -> None:
    count = len(IndexedDataset(prefix))
    for number in (*range(min(config.show, count)), *config.documents):
        if number >= count:
            print(f"--- there is no document {number}; the data set has {count:,}")
        else:
            print(decoded(prefix, number, tokenizer, colour=sys.stdout.isatty()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(InspectConfig, run, argv, prog="inspect_data.py")
