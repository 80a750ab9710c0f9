"""One shard: some whole columns of texts, taken through all rounds, into a folder that is whole or absent.

Goes out: examples.jsonl, rejects.jsonl, summary.json, and timing.json, which alone may differ from run to run. Until then, finished
requests are in a journal beside the folder. Does not know: other shards, the corpus's files, when what is asked.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.records import MShotExample, OneShotExample, RawText
from megatron_instruct.synthesis.chains import Column, advance, m_shot_examples
from megatron_instruct.synthesis.engines.engine import Completion, Request
from megatron_instruct.synthesis.filters import FilterSettings, keep
from megatron_instruct.synthesis.journal import Journal
from megatron_instruct.synthesis.parsing import parse_pairs
from megatron_instruct.synthesis.prompt_format import PromptFormat
from megatron_instruct.synthesis.prompts import Prompts, fit, restored
from megatron_instruct.synthesis.rejects import Reject, write_rejects
from megatron_instruct.synthesis.schedule import Steps
from megatron_instruct.synthesis.structured import NoStatementError, grammar_of

SUMMARY, TIMING = "summary.json", "timing.json"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What every text is asked with."""

    prompt_format: PromptFormat
    prompts: Prompts
    filtering: FilterSettings
    synthesizer: str
    """Name and revision of the model, kept with every pair."""
    max_new_tokens: int
    longest_prompt: int
    """Tokens."""


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a finished shard says of itself."""

    counts: dict[str, int]
    rejected: dict[str, int]
    """By reason."""


@dataclass(kw_only=True)
class ColumnResult:
    """What a column gave."""

    examples: list[MShotExample] = field(default_factory=list)
    rejects: list[Reject] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class OpenShard:
    """A shard that is worked on: its journal, and the results of its columns as they come, in any order."""

    def __init__(self, folder: Path, columns: int) -> None:
        self.folder, self.journal = folder, Journal(journal_of(folder))
        self._results: list[ColumnResult | None] = [None] * columns
        self._missing = columns

    def add(self, column: int, result: ColumnResult) -> bool:
        """Take a column's result; with the last, write the folder. Return whether it is written."""
        assert self._results[column] is None, "a column is done once"
        self._results[column] = result
        self._missing -= 1
        if self._missing:
            return False
        self._write([result for result in self._results if result is not None])
        self.journal.remove()
        return True

    def _write(self, results: Sequence[ColumnResult]) -> None:
        rejected = Counter(reject.reason for result in results for reject in result.rejects)
        counts = sum((result.counts for result in results), Counter[str]())
        summary = ShardSummary(counts=dict(sorted(counts.items())), rejected=dict(sorted(rejected.items())))
        with atomic_folder(self.folder) as unfinished:
            with open(unfinished / "examples.jsonl", "w", encoding="utf-8") as stream:
                for result in results:
                    stream.writelines(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in result.examples)
            with open(unfinished / "rejects.jsonl", "w", encoding="utf-8") as stream:
                for result in results:
                    write_rejects(stream, result.rejects)
            write_json(unfinished / SUMMARY, asdict(summary))
            write_json(unfinished / TIMING, {"first_answer": self.journal.first, "finished": round(time.time(), 3)})


def read_shard(folder: Path) -> ShardSummary | None:
    """Return what the shard in `folder` says of itself, or None when it is not finished."""
    return ShardSummary(**read_json(folder / SUMMARY)) if (folder / SUMMARY).is_file() else None


def journal_of(folder: Path) -> Path:
    """Return where the finished requests of an unfinished shard are."""
    return folder.with_name(f"{folder.name}.journal")


def work_on_column(texts: Iterable[RawText], asking: Asking) -> Steps[ColumnResult]:
    """Ask for the pairs of the texts of one column, each with what the earlier ones gave before it."""
    column, result = Column(), ColumnResult()
    for number, text in enumerate(texts, 1):
        prepared = _request(text, column, asking)
        if isinstance(prepared, Reject):
            result.rejects.append(prepared)
            shot, shown = OneShotExample(id=text.id, text=text.text, pairs=()), 0
        else:
            request, shown = prepared
            (completion,) = yield [request]
            _count(result.counts, request, completion)
            shot = _shot(text, completion, number, asking, result)
        column = advance(column, shot, shown=shown)
        result.counts["texts"] += 1
    result.examples = m_shot_examples(column)
    result.counts["examples"] = len(result.examples)
    return result


def _request(text: RawText, column: Column, asking: Asking) -> tuple[Request, int] | Reject:
    """Return the request for one text and how many examples it shows, or why the text cannot be asked about."""
    try:
        grammar = grammar_of(asking.prompt_format, text.text)
    except NoStatementError:
        return Reject(where="request", id=text.id, reason="no sentence to answer with", content=text.text)
    fitting = fit(asking.prompts, column.history, text.text, most=asking.longest_prompt)
    assert fitting is not None, "the intake lets in only what fits without history"
    ids, shown = fitting
    return Request(id=text.id, prompt=tuple(ids), max_new_tokens=asking.max_new_tokens, grammar=grammar), shown


def _count(counts: Counter[str], request: Request, completion: Completion) -> None:
    counts["requests"] += 1
    counts["requests_retried"] += completion.attempts - 1
    counts["prompt_tokens"] += len(request.prompt)
    counts["generated_tokens"] += completion.tokens


def _shot(text: RawText, completion: Completion, round_: int, asking: Asking, result: ColumnResult) -> OneShotExample:
    """Turn a completion into the text with its pairs, and note what is dropped."""
    if completion.error is not None:
        result.rejects.append(Reject(where="request", id=text.id, reason="request failed", content=text.text, detail=completion.error))
        return OneShotExample(id=text.id, text=text.text, pairs=())
    format_ = asking.prompt_format
    parsed = parse_pairs(completion.text, format_.pair, stopped=completion.stopped)
    provenance = {
        "synthesizer": asking.synthesizer,
        "prompt_format": format_.name,
        "language": format_.language,
        "round": round_,
        "filters": list(asking.filtering.filters),
    }
    pairs = [restored(pair, asking.prompts.escaping, **provenance) for pair in parsed.pairs]
    kept, dropped = keep(pairs, text.text, asking.filtering, language=format_.language)
    for where, items in (("completion", parsed.dropped), ("filter", dropped)):
        result.rejects += [Reject(where=where, id=text.id, reason=item.reason, content=item.content) for item in items]
    result.counts["pairs_parsed"] += len(pairs)
    result.counts["pairs"] += len(kept)
    result.counts["texts_with_pairs"] += bool(kept)
    return OneShotExample(id=text.id, text=text.text, pairs=tuple(kept))
