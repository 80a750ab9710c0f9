"""The finished shards into one file of examples and one of rejects, in the order of the corpus; and the filters that see all pairs.

Comes in: the folders of the shards. Goes out: OUTPUT_DIR/{examples.jsonl,rejects.jsonl}, and what is to be said of them. Killed and run
again, it begins from the shards. Does not know: engines, prompts.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_instruct.files import concatenate
from megatron_instruct.progress import Progress
from megatron_instruct.records import MShotExample
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.intake import GIVEN
from megatron_instruct.synthesis.near_duplicates import sift
from megatron_instruct.synthesis.rejects import write_rejects
from megatron_instruct.synthesis.shard import read_shard

EXAMPLES, REJECTS = "examples.jsonl", "rejects.jsonl"


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What the merged files hold."""

    counts: Counter[str]
    rejected: Counter[str]
    """By reason, without what the intake rejected."""


def merge_shards(shards: Sequence[Path], output_dir: Path, *, intake: Path, scratch: Path, filtering: FilterSettings) -> Merged:
    """Write the outputs. intake: folder with the first rejects. scratch: folder for files that do not last."""
    counts, rejected = Counter({"texts": 0, "texts_with_pairs": 0, "pairs": 0}), Counter[str]()
    for shard in shards:
        summary = read_shard(shard)
        assert summary is not None, "every shard is finished"
        counts.update(summary.counts)
        rejected.update(summary.rejected)
    examples, rejects = [shard / EXAMPLES for shard in shards], [intake / REJECTS, *(shard / REJECTS for shard in shards)]
    if filtering.of_stage(2):
        left = _sifted(examples, scratch, filtering, texts=counts["texts"])
        counts = Counter({**counts, **left.counts})
        rejected.update(left.rejected)
        examples, rejects = [scratch / f"sifted-{EXAMPLES}"], [*rejects, scratch / f"sifted-{REJECTS}"]
    concatenate(examples, output_dir / EXAMPLES)
    concatenate(rejects, output_dir / REJECTS)
    return Merged(counts=counts, rejected=rejected)


def _sifted(parts: Sequence[Path], scratch: Path, filtering: FilterSettings, *, texts: int) -> Merged:
    """Write what the filters that see all pairs leave, and what they drop."""
    counts, rejected = Counter({"examples": 0, "pairs": 0, "texts_with_pairs": 0}), Counter[str]()
    with (
        open(scratch / f"sifted-{EXAMPLES}", "w", encoding="utf-8") as kept,
        open(scratch / f"sifted-{REJECTS}", "w", encoding="utf-8") as dropped,
        Progress("look for near-duplicates", total=texts, unit="texts") as progress,
    ):
        for left in sift(_read(parts), scratch / "near-duplicates.sqlite", filtering):
            kept.writelines(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in left.examples)
            write_rejects(dropped, left.rejects)
            rejected.update(reject.reason for reject in left.rejects)
            counts["examples"] += len(left.examples)
            for shot in (shot for example in left.examples for shot in example.shots):
                written = [pair for pair in shot.pairs if pair.provenance.get(GIVEN) != "pair"]
                counts["pairs"] += len(written)
                counts["texts_with_pairs"] += bool(written)
                progress.add()
    return Merged(counts=counts, rejected=rejected)


def _read(parts: Sequence[Path]) -> Iterator[MShotExample]:
    for part in parts:
        with open(part, encoding="utf-8") as stream:
            for line in stream:
                yield MShotExample.from_json(json.loads(line), where=str(part))
