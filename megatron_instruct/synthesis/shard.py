"""One shard: some whole columns of texts, taken through all rounds, into a folder that is whole or absent.

Goes out: examples.jsonl, rejects.jsonl, summary.json, and timing.json, which alone may differ from run to run. Until then, finished
requests are in a journal beside the folder. Does not know: other shards, the corpus's files, when what is asked.
"""

import json
import re
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from msgspec.structs import replace

from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.prompt_formats.parsing import Dropped, Parsed, parse_pairs, read_answer
from megatron_instruct.prompt_formats.prompt_format import PromptFormat
from megatron_instruct.records import InstructionPair, MShotExample, OneShotExample, RawText
from megatron_instruct.synthesis.chains import Column, advance, m_shot_examples
from megatron_instruct.synthesis.engines.engine import Completion, Request
from megatron_instruct.synthesis.filter_rules import Drop
from megatron_instruct.synthesis.filters import Filters, dropped_pair
from megatron_instruct.synthesis.intake import GIVEN, AskedText
from megatron_instruct.synthesis.journal import Journal
from megatron_instruct.synthesis.prompts import Prompts, fit, restored
from megatron_instruct.synthesis.rejects import Reject, write_rejects
from megatron_instruct.synthesis.schedule import Steps
from megatron_instruct.synthesis.second_pass import Check
from megatron_instruct.synthesis.structured import NoStatementError, grammar_of

SUMMARY, TIMING = "summary.json", "timing.json"
_LIKE_A_CHECK = re.compile(r"\?\w+=\d+\?*\Z")
"""An id of a text that ends as those of questions about pairs do."""
_JOURNAL = ".journal"


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What every text is asked with."""

    prompt_format: PromptFormat
    prompts: Prompts
    filters: Filters
    checks: tuple[Check, ...]
    """Filters that ask the engine again, in their order."""
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
        dropped = sum(reject.where in ("completion", "filter") for result in results for reject in result.rejects)
        assert counts["pieces"] == counts["pairs"] + dropped, (
            "each piece of a completion is a pair that is kept, or is dropped for a reason"
        )
        summary = ShardSummary(counts=dict(sorted(counts.items())), rejected=dict(sorted(rejected.items())))
        with atomic_folder(self.folder) as unfinished:
            with open(unfinished / "examples.jsonl", "w", encoding="utf-8") as stream:
                for result in results:
                    stream.writelines(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in result.examples)
            with open(unfinished / "rejects.jsonl", "w", encoding="utf-8") as stream:
                for result in results:
                    write_rejects(stream, result.rejects)
            write_json(unfinished / SUMMARY, asdict(summary))
            write_json(unfinished / TIMING, {str(second): answers for second, answers in sorted(self.journal.answers.items())})


def read_shard(folder: Path) -> ShardSummary | None:
    """Return what the shard in `folder` says of itself, or None when it is not finished."""
    return ShardSummary(**read_json(folder / SUMMARY)) if (folder / SUMMARY).is_file() else None


def holds_work(folder: Path) -> bool:
    """Say whether a folder of shards holds a finished one, or answers of an unfinished one."""
    return any(folder.glob(f"*/{TIMING}")) or any(file.stat().st_size for file in folder.glob(f"*{_JOURNAL}"))


def has_answers(folder: Path) -> bool:
    """Say whether the shard in `folder` is finished and some request of it was answered."""
    summary = read_shard(folder)
    return summary is not None and summary.counts.get("requests", 0) > summary.rejected.get("request failed", 0)


def journal_of(folder: Path) -> Path:
    """Return where the finished requests of an unfinished shard are."""
    return folder.with_name(f"{folder.name}{_JOURNAL}")


def work_on_column(texts: Iterable[AskedText], asking: Asking) -> Steps[ColumnResult]:
    """Ask for the pairs of the texts of one column, each with what the earlier ones gave before it."""
    column, result = Column(), ColumnResult()
    for number, text in enumerate(texts, 1):
        if text.pairs is not None:
            column = advance(column, OneShotExample(id=text.id, text=text.text, pairs=text.pairs), shown=len(column.history))
            result.counts.update(("texts", "texts_with_pairs_given"))
            continue
        prepared = _request(text, column, asking)
        if isinstance(prepared, Reject):
            result.rejects.append(prepared)
            shot, shown = OneShotExample(id=text.id, text=text.text, pairs=()), 0
        else:
            request, shown = prepared
            (completion,) = yield [request]
            _count(result.counts, request, completion)
            pairs = _pairs(text, completion, number, asking, result)
            for check in asking.checks if text.question is None else ():
                pairs = yield from _checked(check, pairs, text, asking, result)
            result.counts["pairs"] += len(pairs)
            result.counts["texts_with_pairs"] += bool(pairs)
            shot = OneShotExample(id=text.id, text=text.text, pairs=tuple(pairs))
        column = advance(column, shot, shown=shown)
        result.counts["texts"] += 1
    result.examples = m_shot_examples(column)
    result.counts["examples"] = len(result.examples)
    return result


def _request(text: AskedText, column: Column, asking: Asking) -> tuple[Request, int] | Reject:
    """Return the request for one text and how many examples it shows, or why the text cannot be asked about."""
    try:
        grammar = grammar_of(asking.prompt_format, text.text) if text.question is None else None
    except NoStatementError:
        return Reject(where="request", id=text.id, reason="no sentence to answer with", content=text.text)
    asked = None if text.question is None else InstructionPair(question=text.question, answer="")
    fitting = fit(asking.prompts, column.history, text.text, most=asking.longest_prompt, asked=asked)
    if fitting is None:
        assert asked is not None, "the intake lets in only what fits without history"
        return Reject(where="request", id=text.id, reason="question does not fit", content=asked.question)
    ids, shown = fitting
    return Request(id=_request_id(text), prompt=tuple(ids), max_new_tokens=asking.max_new_tokens, grammar=grammar), shown


def _request_id(text: RawText) -> str:
    """Return the text's id, made longer where it ends as the id of a question about a pair does, so that it is none."""
    return f"{text.id}?" if _LIKE_A_CHECK.search(text.id) else text.id


def _count(counts: Counter[str], request: Request, completion: Completion) -> None:
    counts["requests"] += 1
    counts["requests_retried"] += completion.attempts - 1
    counts["prompt_tokens"] += len(request.prompt)
    counts["generated_tokens"] += completion.tokens


def _pairs(text: AskedText, completion: Completion, round_: int, asking: Asking, result: ColumnResult) -> list[InstructionPair]:
    """Return the pairs of a completion that pass the filters that ask nothing, and note what is dropped."""
    if completion.error is not None:
        result.rejects.append(Reject(where="request", id=text.id, reason="request failed", content=text.text, detail=completion.error))
        return []
    format_ = asking.prompt_format
    if text.question is None:
        parsed = parse_pairs(completion.text, format_.pair, stopped=completion.stopped)
    else:
        parsed = _answered(text.question, completion.text, format_)
    provenance = {
        "text_id": text.id,
        "synthesizer": asking.synthesizer,
        "prompt_format": format_.name,
        "language": format_.language,
        "round": round_,
        "filters": asking.filters.passed if text.question is None else [],
        **({} if text.question is None else {GIVEN: "question"}),
    }
    pairs = [restored(pair, asking.prompts.escaping, **provenance) for pair in parsed.pairs]
    kept, dropped = asking.filters.keep(pairs, text.text) if text.question is None else (pairs, [])
    result.rejects += _rejects("completion", text, parsed.dropped) + _rejects("filter", text, dropped)
    result.counts["pieces"] += len(parsed.pairs) + len(parsed.dropped)
    result.counts["pairs_parsed"] += len(pairs)
    return kept


def _answered(question: str, completion: str, format_: PromptFormat) -> Parsed:
    """Return the question with the answer that the completion begins with; cut off at the limit of new tokens, it is taken as it is."""
    answer = read_answer(completion, format_.pair)
    if not answer or "\0" in answer:
        reason = "NUL character" if answer else "empty completion"
        return Parsed(pairs=(), dropped=(Dropped(reason=reason, content=completion),))
    return Parsed(pairs=(InstructionPair(question=question, answer=answer),), dropped=())


def _checked(
    check: Check, pairs: Sequence[InstructionPair], text: RawText, asking: Asking, result: ColumnResult
) -> Generator[Sequence[Request], Sequence[Completion], list[InstructionPair]]:
    """Ask about each pair, and return those that pass."""
    prompts = [check.question(pair, text.text) for pair in pairs]
    fitting = [number for number, prompt in enumerate(prompts) if len(prompt) <= asking.longest_prompt]
    requests = [
        Request(id=f"{_request_id(text)}?{check.name}={number}", prompt=tuple(prompts[number]), max_new_tokens=check.max_new_tokens)
        for number in fitting
    ]
    completions = (yield requests) if requests else []
    answers = dict(zip(fitting, completions, strict=True))
    kept: list[InstructionPair] = []
    for request, completion in zip(requests, completions, strict=True):
        _count(result.counts, request, completion)
    for number, pair in enumerate(pairs):
        drop = _verdict(check, pair, answers.get(number))
        if drop is None:
            kept.append(replace(pair, provenance={**pair.provenance, "filters": [*pair.provenance["filters"], check.name]}))
        else:
            result.rejects += _rejects("filter", text, [dropped_pair(pair, drop)])
    return kept


def _verdict(check: Check, pair: InstructionPair, completion: Completion | None) -> Drop | None:
    if completion is None:
        return Drop(f"{check.name} does not fit", "the text, the question and what is asked about them are longer than a prompt may be")
    if completion.error is not None:
        return Drop(f"{check.name} failed", completion.error)
    return check.verdict(pair, completion.text)


def _rejects(where: str, text: RawText, dropped: Iterable[Dropped]) -> list[Reject]:
    return [Reject(where=where, id=text.id, reason=item.reason, content=item.content, detail=item.detail) for item in dropped]
