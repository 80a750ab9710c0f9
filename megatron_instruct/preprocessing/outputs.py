"""Finished parts -> data sets with their manifests, verified.

Comes in: folders of parts in the order of the input. Goes out: the files of each JSON key's data set, but for its manifest, which is
returned for the caller to write last.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_instruct.corpora.part_folders import read_summary
from megatron_instruct.errors import InputError
from megatron_instruct.files import concatenate
from megatron_instruct.manifest import FileRecord, Manifest, record
from megatron_instruct.preprocessing.config import PreprocessConfig
from megatron_instruct.preprocessing.documents import RenderOptions
from megatron_instruct.preprocessing.indexed_dataset import roles_file
from megatron_instruct.preprocessing.merge import MergeOptions, merge_tokens
from megatron_instruct.preprocessing.part_files import REJECTS, PartSummary
from megatron_instruct.preprocessing.read_back import Wanted, checked_files, checked_roles
from megatron_instruct.preprocessing.verify import rejects_file
from megatron_instruct.tokenizer import Tokenizer, token_dtype

STAGE = "preprocess"
RENDERING = "rendering"
"""Name of the setting that decides how examples are rendered; kept where there were any."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where the tokens come from, for the manifest."""

    tokenizer: Tokenizer
    inputs: tuple[FileRecord, ...]
    settings: Mapping[str, Any]
    render: RenderOptions
    named: str
    """The inputs as the user named them."""
    facts: Mapping[str, Any]
    """What else is to be kept of it."""


def write_data_sets(config: PreprocessConfig, folders: Sequence[Path], origin: Origin) -> dict[str, Manifest]:
    """Write and verify the data set of each JSON key. Raises InputError where no document is left."""
    total = _total([PartSummary(**read_summary(folder)) for folder in folders])
    options = MergeOptions(
        dtype=token_dtype(origin.tokenizer.vocab_size),
        eod=origin.tokenizer.eod,
        ended=config.append_eod,
        shuffle_seed=config.shuffle_seed,
        pack_sequence_length=config.pack_sequence_length,
    )
    with_roles = total.has_roles or config.pack_sequence_length is not None
    manifests: dict[str, Manifest] = {}
    for key in config.json_keys:
        prefix = config.prefix(key)
        rejects = rejects_file(prefix)
        concatenate([folder / REJECTS for folder in folders], rejects)
        if not total.documents_kept:
            raise InputError(f"no document is left of {origin.named}: {_reasons(total.rejected)}; see {rejects}.")
        layout = merge_tokens(folders, key, prefix, options, with_roles=with_roles)
        wanted = Wanted(
            documents=len(layout.documents) if layout is not None else total.documents[key],
            tokens=layout.tokens if layout is not None else total.tokens[key],
            vocab_size=origin.tokenizer.vocab_size,
            eod=options.eod if config.append_eod and config.pack_sequence_length is None else None,
        )
        files = list(checked_files(prefix, wanted))
        facts: dict[str, Any] = {"json_key": key, "dtype": options.dtype.name, **origin.facts}
        if with_roles:
            roles, tokens = checked_roles(roles_file(prefix), prefix, wanted)
            files.append(roles)
            facts["roles"] = {"tokens": tokens, "straddling_tokens": total.straddling}
        if layout is not None and layout.packing is not None:
            facts["packing"] = layout.packing
        files.append(record(rejects, relative_to=prefix.parent))
        manifests[key] = _manifest(total, wanted, origin, tuple(files), facts)
    return manifests


def _total(summaries: Sequence[PartSummary]) -> PartSummary:
    banks = [summary.bank for summary in summaries if summary.bank is not None]
    return PartSummary(
        documents_in=sum(summary.documents_in for summary in summaries),
        documents_kept=sum(summary.documents_kept for summary in summaries),
        documents=_sum([summary.documents for summary in summaries]),
        tokens=_sum([summary.tokens for summary in summaries]),
        rejected=_sum([summary.rejected for summary in summaries]),
        rendering=_sum([summary.rendering for summary in summaries]),
        pairs_set_aside=_sum([summary.pairs_set_aside for summary in summaries]),
        bank=banks[0] if banks else None,
        has_roles=any(summary.has_roles for summary in summaries),
        straddling=sum(summary.straddling for summary in summaries),
    )


def _sum(counts: Sequence[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for one in counts:
        total.update(one)  # which keeps what is 0, unlike a sum of counters
    return dict(sorted(total.items()))


def _manifest(total: PartSummary, wanted: Wanted, origin: Origin, outputs: tuple[FileRecord, ...], facts: Mapping[str, Any]) -> Manifest:
    counts = {
        "documents_in": total.documents_in,
        "documents_kept": total.documents_kept,
        "documents": wanted.documents,
        "tokens": wanted.tokens,
        **total.rendering,
    }
    assert counts["documents_in"] == counts["documents_kept"] + sum(total.rejected.values()), "no document is lost"
    settings = dict(origin.settings)
    if total.bank is not None:
        settings[RENDERING] = origin.render.fingerprint()
        facts = {**facts, RENDERING: {"bank": total.bank, "seed": origin.render.seed, "pairs_set_aside": total.pairs_set_aside}}
    return Manifest(
        stage=STAGE, settings=settings, inputs=origin.inputs, outputs=outputs, counts=counts, rejected=total.rejected, facts=facts
    )


def describe(manifests: Mapping[str, Manifest], prefixes: Mapping[str, Path], *, append_eod: bool, seconds: float) -> None:
    """Print what was done."""
    for key, manifest in manifests.items():
        counts, prefix = manifest.counts, prefixes[key]
        megabytes = sum(record.bytes for record in manifest.inputs) / 1e6
        print(
            f"{prefix}: {counts['documents_in']:,} documents in = {counts['documents_kept']:,} documents + "
            f"{_reasons(manifest.rejected)}; {counts['tokens']:,} tokens, {manifest.facts['dtype']}; "
            f"{megabytes:,.1f} MB in {seconds:,.1f} s ({megabytes / seconds:.2f} MB/s)"
        )
        if "packing" in manifest.facts:
            packing = manifest.facts["packing"]
            print(
                f"Packed {packing['documents']:,} documents into {counts['documents']:,} sequences of {packing['sequence_length']:,} "
                f"tokens: {packing['fill_percent']} % filled, {packing['cut_documents']:,} longer documents cut"
            )
        elif counts["documents"] != counts["documents_kept"]:
            print(f"Long documents were split: the data set has {counts['documents']:,} documents.")
        if RENDERING in manifest.facts:
            print(
                f"Rendered {counts['examples']:,} examples; {counts['pairs_rendered']:,} pairs + "
                f"{_reasons(manifest.facts[RENDERING]['pairs_set_aside'], 'set aside')}"
            )
        if manifest.rejected or counts.get("pairs_set_aside"):
            print(f"What was set aside is in {rejects_file(prefix)}")
    if not append_eod:
        print("Nothing marks where a document ends: --append-eod was not given.")


def _reasons(rejected: Mapping[str, int], what: str = "rejected") -> str:
    detail = f" ({', '.join(f'{why} {n:,}' for why, n in sorted(rejected.items()))})" if rejected else ""
    return f"{sum(rejected.values()):,} {what}{detail}"
