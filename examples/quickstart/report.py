"""What the quick start made -> report.html, one self-contained page for a reader who knows nothing yet.

Comes in: the stages' manifests, examples, documents and metrics. Nothing is computed again; numbers that a stage did not write
down are not shown.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from stages import HERE, QuickstartConfig, Stage

from megatron_instruct import __version__
from megatron_instruct.evaluation.comparison import Comparison, compare
from megatron_instruct.evaluation.config import PERPLEXITY
from megatron_instruct.evaluation.results import read_results
from megatron_instruct.files import atomic_write
from megatron_instruct.manifest import Manifest, read_manifest
from megatron_instruct.pages import Chart, Series, line_chart, render_page

_SHOWN_EXAMPLES = 4
_SHOWN_CHARACTERS = 1600


@dataclass(frozen=True, kw_only=True)
class Results:
    """The manifests of the finished stages."""

    corpus: Manifest
    synthesis: Manifest
    rendering: Manifest
    data: Mapping[str, Manifest]
    """By name: augmented, raw, held-out."""
    imported: Manifest
    exported: Manifest
    metrics: Sequence[dict[str, Any]]
    comparison: Sequence[Comparison]
    """Of the trained model (b) with the base model (a)."""


def write_report(config: QuickstartConfig, stages: Sequence[Stage], times: Mapping[str, Any]) -> Path:
    """Write OUTPUT_DIR/report.html and return its path."""
    results = _read(config)
    total = sum(entry["seconds"] for entry in times.values())
    content = {
        "corpus_name": config.corpus.name,
        "model_name": "SmolLM2-135M-Instruct" if config.base_model is None else config.base_model.name,
        "version": __version__,
        "facts": _facts(results, total),
        "verdict": _verdict(results.comparison),
        "examples": _examples(config.folder),
        "yields": _yields(results),
        "drops": _drops(results),
        "training_summary": _training_summary(results.metrics),
        "chart": _chart(results.metrics),
        "comparison": _comparison_rows(results.comparison),
        "evaluation_note": _EVALUATION_NOTE,
        "proofs": [_proof("Hugging Face → Megatron", results.imported), _proof("Megatron → Hugging Face", results.exported)],
        "machine": _machine(),
        "stages": [_stage_row(stage, times[stage.name]) for stage in stages],
        "total_time": _clock(total),
        "highest_memory": _gigabytes(max(entry["peak_bytes"] for entry in times.values())),
    }
    page = render_page(HERE, "report.html.j2", content, extra="all")
    path = config.folder / "report.html"
    with atomic_write(path) as stream:
        stream.write(page)
    return path


def _read(config: QuickstartConfig) -> Results:
    out = config.folder
    names = ("augmented", "raw", "held-out")
    lines = (out / "trained" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    imported = next((out / "imported").glob("iter_*/manifest.json"))
    return Results(
        corpus=read_manifest(out / "corpus" / "manifest.json"),
        synthesis=read_manifest(out / "examples" / "manifest.json", stage="synthesize"),
        rendering=read_manifest(out / "augmented" / "manifest.json", stage="render"),
        data={name: read_manifest(out / "data" / f"{name}_text_document.manifest.json", stage="preprocess") for name in names},
        imported=read_manifest(imported, stage="convert"),
        exported=read_manifest(out / "exported" / "manifest.json", stage="convert"),
        metrics=[json.loads(line) for line in lines],
        comparison=compare(*(read_results(out / "evaluation" / name) for name in ("base", "trained"))),
    )


def _facts(results: Results, total_seconds: float) -> list[tuple[str, str]]:
    counts = results.synthesis.counts
    tokens = max(record["tokens"] for record in results.metrics if "tokens" in record)
    return [
        (f"{results.corpus.counts['texts']:,}", "texts in the corpus"),
        (f"{counts['texts_with_pairs']:,} of {counts['texts']:,}", "chosen texts that got a pair"),
        (f"{counts['pairs']:,}", "instruction-response pairs kept"),
        (f"{tokens:,}", "tokens trained on"),
        (_clock(total_seconds), "minutes : seconds in all"),
    ]


def _examples(folder: Path) -> list[dict[str, Any]]:
    """Choose short examples with a pair in every text first, and cut their documents by role."""
    with open(folder / "examples" / "examples.jsonl", encoding="utf-8") as stream:
        examples = {row["id"]: row for row in map(json.loads, stream)}
    with open(folder / "augmented" / "augmented.jsonl", encoding="utf-8") as stream:
        documents = [row for row in map(json.loads, stream) if any(role == "response" for _, _, role in row["spans"])]
    documents.sort(key=lambda row: (len(row["text"]) > _SHOWN_CHARACTERS, _pairless(examples[row["id"]]), row["id"]))
    return [
        {"shots": examples[row["id"]]["shots"], "pieces": [(role, row["text"][start:end]) for start, end, role in row["spans"]]}
        for row in documents[:_SHOWN_EXAMPLES]
    ]


def _pairless(example: dict[str, Any]) -> int:
    return sum(not shot["pairs"] for shot in example["shots"])


def _yields(results: Results) -> list[tuple[str, str, str]]:
    corpus, synthesis, rendering = results.corpus.counts, results.synthesis.counts, results.rendering.counts
    rows = [
        ("Corpus", "texts to write pairs for", corpus["synthesize"]),
        ("", "texts that stay raw", corpus["raw"]),
        ("", "texts held out for the evaluation", corpus["heldout"]),
        ("Synthesis", "requests to the model", synthesis["requests"]),
        ("", "tokens that it wrote", synthesis["generated_tokens"]),
        ("", "pairs kept", synthesis["pairs"]),
        ("", "texts with at least one pair", synthesis["texts_with_pairs"]),
        ("Templates", "M-shot examples in", rendering["examples"]),
        ("", "documents out", rendering["documents"]),
        ("Data sets", "tokens, augmented", results.data["augmented"].counts["tokens"]),
        ("", "tokens, raw", results.data["raw"].counts["tokens"]),
        ("", "tokens, held out", results.data["held-out"].counts["tokens"]),
    ]
    return [(stage, label, f"{value:,}") for stage, label, value in rows]


def _drops(results: Results) -> list[tuple[str, str, str, float]]:
    """Return stage, reason, number and share of the most frequent reason, the frequent ones first."""
    manifests = {"corpus": results.corpus, "synthesis": results.synthesis, "templates": results.rendering}
    manifests |= {f"data set, {name}": manifest for name, manifest in results.data.items()}
    rows = [(stage, reason, count) for stage, manifest in manifests.items() for reason, count in manifest.rejected.items() if count]
    highest = max((count for _, _, count in rows), default=1)
    rows.sort(key=lambda row: -row[2])
    return [(stage, reason, f"{count:,}", count / highest) for stage, reason, count in rows]


def _training_summary(metrics: Sequence[dict[str, Any]]) -> str:
    steps = [record for record in metrics if "loss" in record]
    rates = sorted(record["tokens_per_second"] for record in steps)
    shares = sorted(record["peak_fraction"] for record in steps if "peak_fraction" in record)
    peak = f", {shares[len(shares) // 2]:.0%} of what the processor can do" if shares else ""
    return f"{steps[-1]['iteration']} steps, {steps[-1]['tokens']:,} tokens, {rates[len(rates) // 2]:,.0f} tokens a second{peak}"


def _chart(metrics: Sequence[dict[str, Any]]) -> Chart | None:
    def points(key: str) -> list[tuple[float, float]]:
        return [(record["iteration"], record[key]) for record in metrics if key in record]

    held_out = Series(name="held-out texts", points=points("validation_loss"), dots=True)
    return line_chart("Loss (nats a token)", [held_out, Series(name="training batches", points=points("loss"), color=1)])


def _proof(name: str, manifest: Manifest) -> dict[str, Any]:
    checks = {check["name"]: check for check in manifest.facts["proof"]["checks"]}
    logits = checks["logits"]["values"]
    return {
        "name": name,
        "largest": f"{logits['max']:.1e}",
        "mean": f"{logits['mean']:.1e}",
        "allowed": f"{logits['tolerance']:.1e}",
        "passed": all(check["passed"] for check in checks.values()),
    }


_EVALUATION_NOTE = (
    "A difference is called better or worse only where two equally good models would show one so large in fewer than 5 % of such "
    "comparisons: McNemar's exact test for questions, a paired bootstrap over texts for perplexity."
)
_SHOWN_METRICS = {
    "perplexity": "Perplexity of held-out texts (lower is better)",
    "bits_per_byte": "Bits per byte of held-out texts (lower is better)",
    "acc": "Questions answered right",
    "acc_norm": "Questions answered right, likelihood per character",
}


def _comparison_rows(comparisons: Sequence[Comparison]) -> list[dict[str, str]]:
    rows = []
    for one in (one for one in comparisons if one.name in _SHOWN_METRICS):
        digits = 2 if one.name == "perplexity" else 3
        says = one.verdict if one.p_value is None else f"{one.verdict} (p = {one.p_value:.2g}, {one.n} {_unit(one)})"
        rows.append(
            {
                "measure": _SHOWN_METRICS[one.name],
                "base": f"{one.value_a:.{digits}f}",
                "trained": f"{one.value_b:.{digits}f}",
                "difference": f"{one.difference:+.{digits}f}",
                "says": says,
            }
        )
    return rows


def _unit(one: Comparison) -> str:
    return "texts" if one.task == PERPLEXITY else "questions"


def _verdict(comparisons: Sequence[Comparison]) -> str:
    """Say plainly whether so short a run helped."""
    perplexity = next(one for one in comparisons if one.task == PERPLEXITY and one.name == "perplexity")
    questions = next(one for one in comparisons if one.task != PERPLEXITY)
    change = f"from {perplexity.value_a:.1f} to {perplexity.value_b:.1f}"
    reading = {
        "better": f"reads unseen texts of this corpus better than before: perplexity fell {change}",
        "worse": f"reads unseen texts of this corpus worse than before: perplexity rose {change}",
    }.get(perplexity.verdict, f"reads unseen texts of this corpus neither better nor worse: perplexity went {change}")
    answering = {
        "better": "It also answers more questions right",
        "worse": "It answers fewer questions right",
    }.get(questions.verdict, "On the questions, the difference is within chance")
    return (
        f"Did it help? After this short run the model {reading}. {answering}: {questions.value_a:.0%} before, "
        f"{questions.value_b:.0%} after, {questions.n} questions. A run of minutes on a small model shows that the chain works; "
        "it says little about what a long one gains."
    )


def _stage_row(stage: Stage, entry: Mapping[str, Any]) -> dict[str, str]:
    time, memory = _clock(entry["seconds"]), _gigabytes(entry["peak_bytes"])
    return {"name": stage.name, "what": stage.what, "time": time, "memory": memory, "command": stage.shown}


def _machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} processor cores, {memory:.0f} GB of memory, {platform.system()}, Python {platform.python_version()}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count else "–"
