"""Runs of pretrain.py, under way or finished -> one self-contained page with their curves, side by side.

Comes in: metrics.jsonl, samples.jsonl, faults.jsonl and settings.yaml of each run. Goes out: report.html. Reads only, so that it can be
made at any moment of a run; a line that is just being written is left out. Does not know: torch, checkpoints.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_instruct import __version__
from megatron_instruct.config import run_tool
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import atomic_write, distinct_endings, read_lines
from megatron_instruct.pages import Chart, Series, line_chart, render_page, require_page
from megatron_instruct.progress import clock
from megatron_instruct.training.ledger import LEDGER_FILE
from megatron_instruct.training.metrics import METRICS_FILE, SAMPLES_FILE
from megatron_instruct.training.run import SETTINGS

_GIB = 1 << 30
_RECENT = 20
"""Lines that a run's loss and rates of now are the mean and the median of."""
_EVENTS = 50
"""Most events of a run that the page tells of."""
_COUNTS = (("skipped", "steps left out"), ("reruns", "steps run again"), ("rollbacks", "times back to a checkpoint"))
_DONE = {"rerun": "run again", "skip": "skipped", "rollback": "went back", "straggler": "named"}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Draw the curves of runs into one page; of several, side by side. Works while they run."""

    runs: tuple[Path, ...]
    """Folders of runs (--save of pretrain.py), such as the vanilla and the instruct arm."""
    names: tuple[str, ...] = ()
    """What to call them (default: the names of their folders)."""
    output: Path | None = None
    """The page (default: report.html in the folder of the first run)."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ConfigError("runs is empty; give the --save folder of one or more runs.")
        if self.names and len(self.names) != len(self.runs):
            raise ConfigError(f"names has {len(self.names)} words for {len(self.runs)} runs; give one for each, or none.")
        require_page("output", self.output)


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """What a run has written so far."""

    name: str
    folder: Path
    finished: bool
    settings: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    """Lines of training."""
    validations: Sequence[Mapping[str, Any]]
    samples: Sequence[Mapping[str, Any]]
    test: Mapping[str, Any]
    """Its line, once the run has got there."""
    faults: Sequence[Mapping[str, Any]] = ()
    """Events of the ledger."""


def run(config: ReportConfig) -> None:
    """Write the page."""
    names = config.names or _names(config.runs)
    runs = [read_run(folder, name) for folder, name in zip(config.runs, names, strict=True)]
    path = config.output or config.runs[0] / "report.html"
    page = render_page(Path(__file__).parent, "report.html.j2", content(runs), extra="train")
    with atomic_write(path) as stream:
        stream.write(page)
    print(f"Report: {path}")


def read_run(folder: Path, name: str) -> RunLog:
    """Read what a run has written. Raises InputError for a folder without a run."""
    metrics, settings = folder / METRICS_FILE, folder / SETTINGS
    if not metrics.is_file():
        raise InputError(f"{folder}: {METRICS_FILE} is missing: no run of pretrain.py has made a step there; give its --save folder.")
    rows = _rows(metrics)
    return RunLog(
        name=name,
        folder=folder,
        finished=(folder / "manifest.json").is_file(),
        settings=yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.is_file() else {},
        steps=[row for row in rows if "loss" in row],
        validations=[row for row in rows if "validation_loss" in row],
        samples=_rows(folder / SAMPLES_FILE),
        test=next((row for row in reversed(rows) if "test_loss" in row), {}),
        faults=_rows(folder / LEDGER_FILE),
    )


def content(runs: Sequence[RunLog]) -> dict[str, Any]:
    """Return all that the template shows."""
    return {
        "version": __version__,
        "title": " · ".join(run.name for run in runs),
        "runs": [_summary(run) for run in runs],
        "charts": [chart for chart in _charts(runs) if chart is not None],
        "components": [chart for chart in _component_charts(runs) if chart is not None],
        "samples": _samples(runs),
        "faults": _faults(runs),
        "differences": _differences(runs),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not path.is_file():
        return rows
    for line in read_lines(path):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # the last line of a run under way, half written
    return rows


def _names(folders: Sequence[Path]) -> list[str]:
    names = distinct_endings([folder.resolve() for folder in folders])
    if names is None:
        raise ConfigError(f"runs names the same folder twice: {', '.join(map(str, folders))}; give each run once.")
    return names


def _summary(run: RunLog) -> dict[str, Any]:
    """Return the facts of a run, each a value and what it is."""
    recent = run.steps[-_RECENT:]
    if not recent:
        return {"name": run.name, "state": "has made no step yet", "facts": []}
    last, total = recent[-1], run.settings.get("train_iters")
    done = last["iteration"]
    facts = [(f"{done:,}" + (f" of {total:,}" if total else ""), "steps"), (_short(last["tokens"]), "tokens")]
    facts.append((f"{statistics.fmean(row['loss'] for row in recent):.4f}", "loss, recently"))
    if run.validations:
        facts.append((f"{run.validations[-1]['validation_loss']:.4f}", "validation loss, last"))
    if run.test:
        facts.append((f"{run.test['test_loss']:.4f}", "test loss"))
        facts += [(f"{loss:.4f}", f"test loss on {name}") for name, loss in run.test.get("test_loss_of", {}).items()]
    rate = statistics.median(row["tokens_per_second"] for row in recent)
    facts.append((f"{rate:,.0f}", "tokens a second"))
    for key, shown, scale, label in (
        ("tflops", "{:.3g}", 1, "TFLOP/s a device"),
        ("peak_fraction", "{:.0%}", 1, "of the peak"),
        ("memory", "{:.1f} GiB", _GIB, "most memory, first process"),
    ):
        values = [row[key] / scale for row in recent if key in row]
        if values:
            facts.append((shown.format(statistics.median(values)), label))
    facts += [(f"{last[key]:,}", label) for key, label in _COUNTS if last.get(key)]
    left = (total - done) * last["tokens"] / done / rate if total else 0.0
    state = "finished" if run.finished else f"under way or stopped, {clock(left)} of training left at this rate"
    return {"name": run.name, "state": state, "facts": facts}


def _charts(runs: Sequence[RunLog]) -> list[Chart | None]:
    def curve(title: str, key: str, of: Callable[[RunLog], Sequence[Mapping[str, Any]]], *, dots: bool = False) -> Chart | None:
        series = [
            Series(name=run.name, color=number, dots=dots, points=[(row["iteration"], row[key]) for row in of(run) if key in row])
            for number, run in enumerate(runs)
        ]
        return line_chart(title, series)

    return [
        curve("Loss on training batches (nats a token)", "loss", lambda run: run.steps),
        curve("Validation loss (nats a token)", "validation_loss", lambda run: run.validations, dots=True),
        curve("Learning rate", "lr", lambda run: run.steps),
        curve("Norm of the gradient, before clipping", "grad_norm", lambda run: run.steps),
        curve("Tokens a second", "tokens_per_second", lambda run: run.steps),
    ]


def _component_charts(runs: Sequence[RunLog]) -> list[Chart | None]:
    """Return a chart a data set of the validation blends, with a line for each run that has it."""
    names = list(dict.fromkeys(name for run in runs for row in run.validations for name in row.get("validation_loss_of", {})))
    return [
        line_chart(
            f"Validation loss on {name}",
            [
                Series(
                    name=run.name,
                    color=number,
                    dots=True,
                    points=[
                        (row["iteration"], row["validation_loss_of"][name])
                        for row in run.validations
                        if name in row.get("validation_loss_of", {})
                    ],
                )
                for number, run in enumerate(runs)
            ],
        )
        for name in names
    ]


def _samples(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Return for each prompt what each run wrote, the newest first."""
    prompts = list(dict.fromkeys(row["prompt"] for run in runs for row in run.samples))
    return [
        {
            "prompt": prompt,
            "runs": [
                {"name": run.name, "color": number, "written": [row for row in reversed(run.samples) if row["prompt"] == prompt]}
                for number, run in enumerate(runs)
            ],
        }
        for prompt in prompts
    ]


def _faults(runs: Sequence[RunLog]) -> list[dict[str, Any]]:
    """Return the newest events of each run, the newest first."""
    return [
        {"name": run.name, "color": number, "iteration": event["iteration"], "done": _DONE[event["kind"]], "text": event["text"]}
        for number, run in enumerate(runs)
        for event in reversed(run.faults[-_EVENTS:])
    ]


def _differences(runs: Sequence[RunLog]) -> list[tuple[str, list[str]]]:
    """Return the settings in which runs differ; of one run, all that it has."""
    names = list(dict.fromkeys(name for run in runs for name in run.settings))
    values = [(name, [_shown(run.settings.get(name)) for run in runs]) for name in names]
    return [(name, shown) for name, shown in values if len(runs) == 1 or len(set(shown)) > 1]


def _shown(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _short(count: float) -> str:
    scale, unit = next(((scale, unit) for scale, unit in ((1e12, " T"), (1e9, " B"), (1e6, " M")) if count >= scale), (1.0, ""))
    return f"{count / scale:,.{2 if unit else 0}f}{unit}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(ReportConfig, run, argv, prog="report_run.py")
