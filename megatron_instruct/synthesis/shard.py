"""One shard: some whole columns of texts, taken through all rounds, into a folder that is whole or absent.

Goes out: examples.jsonl, rejects.jsonl, summary.json. Does not know: other shards, the corpus's files.
"""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_instruct.errors import EngineError
from megatron_instruct.files import atomic_folder, read_json, write_json
from megatron_instruct.records import OneShotExample, RawText
from megatron_instruct.synthesis.chains import Column, advance, m_shot_examples
from megatron_instruct.synthesis.engines.engine import Completion, Engine, Request
from megatron_instruct.synthesis.filters import FilterSettings, keep
from megatron_instruct.synthesis.parsing import parse_pairs
from megatron_instruct.synthesis.prompt_format import PromptFormat
from megatron_instruct.synthesis.prompts import Prompts, fit, restored
from megatron_instruct.synthesis.rejects import Reject, write_rejects
from megatron_instruct.synthesis.structured import NoStatementError, grammar_of

SUMMARY = "summary.json"
_TELLING = 4
"""Requests of a batch that must all fail before the engine, rather than the texts, is taken to be at fault."""
Report = Callable[[int, int], None]
"""Called with the texts finished and the tokens generated since the last call."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every shard is made with."""

    prompt_format: PromptFormat
    prompts: Prompts
    engine: Engine
    filtering: FilterSettings
    synthesizer: str
    """Name and revision of the model, kept with every pair."""
    max_new_tokens: int
    longest_prompt: int
    """Tokens."""
    retries: int


@dataclass(frozen=True, kw_only=True)
class ShardSummary:
    """What a finished shard says of itself."""

    counts: dict[str, int]
    rejected: dict[str, int]
    """By reason."""


@dataclass(kw_only=True)
class _Progress:
    """What a shard has so far."""

    columns: list[Column]
    rejects: list[Reject] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


def make_shard(folder: Path, columns: Sequence[Sequence[RawText]], work: Work, report: Report) -> ShardSummary:
    """Ask for the pairs of all texts of these columns, round by round, and write the shard's folder, which must not exist."""
    work.engine.begin_shard()
    state = _Progress(columns=[Column() for _ in columns])
    for number in range(max(map(len, columns))):
        _round(number, [(i, column[number]) for i, column in enumerate(columns) if number < len(column)], state, work, report)
    examples = [example for column in state.columns for example in m_shot_examples(column)]
    state.counts["examples"] = len(examples)
    with atomic_folder(folder) as unfinished:
        with open(unfinished / "examples.jsonl", "w", encoding="utf-8") as stream:
            stream.writelines(json.dumps(example.to_json(), ensure_ascii=False) + "\n" for example in examples)
        with open(unfinished / "rejects.jsonl", "w", encoding="utf-8") as stream:
            write_rejects(stream, state.rejects)
        rejected = Counter(reject.reason for reject in state.rejects)
        summary = ShardSummary(counts=dict(sorted(state.counts.items())), rejected=dict(sorted(rejected.items())))
        write_json(unfinished / SUMMARY, asdict(summary))
    return summary


def read_shard(folder: Path) -> ShardSummary | None:
    """Return what the shard in `folder` says of itself, or None when it is not finished."""
    return ShardSummary(**read_json(folder / SUMMARY)) if (folder / SUMMARY).is_file() else None


def _round(number: int, texts: Sequence[tuple[int, RawText]], state: _Progress, work: Work, report: Report) -> None:
    """Ask for the next text of each column, all in one batch. texts: column and text."""
    requests: list[Request] = []
    asked: list[tuple[int, RawText, int]] = []
    for column, text in texts:
        prepared = _request(text, state.columns[column], work)
        if isinstance(prepared, Reject):
            state.rejects.append(prepared)
            state.columns[column] = advance(state.columns[column], OneShotExample(id=text.id, text=text.text, pairs=()), shown=0)
            report(1, 0)
        else:
            requests.append(prepared[0])
            asked.append((column, text, prepared[1]))
    completions = _generate(requests, state, work, report)
    for (column, text, shown), completion in zip(asked, completions, strict=True):
        shot = _shot(text, completion, number + 1, state, work)
        state.columns[column] = advance(state.columns[column], shot, shown=shown)
    state.counts["texts"] += len(texts)


def _request(text: RawText, column: Column, work: Work) -> tuple[Request, int] | Reject:
    """Return the request for one text and how many examples it shows, or why the text cannot be asked about."""
    try:
        grammar = grammar_of(work.prompt_format, text.text)
    except NoStatementError:
        return Reject(where="request", id=text.id, reason="no sentence to answer with", content=text.text)
    fitting = fit(work.prompts, column.history, text.text, most=work.longest_prompt)
    assert fitting is not None, "the intake lets in only what fits without history"
    ids, shown = fitting
    return Request(id=text.id, prompt=tuple(ids), max_new_tokens=work.max_new_tokens, grammar=grammar), shown


def _generate(requests: Sequence[Request], state: _Progress, work: Work, report: Report) -> list[Completion]:
    """Answer all requests; those that fail are asked again, together, up to the limit."""
    if not requests:
        return []
    completions = work.engine.generate(requests, report)
    state.counts["requests"] += len(requests)
    for _ in range(work.retries):
        failed = [number for number, completion in enumerate(completions) if completion.error is not None]
        if not failed:
            break
        state.counts["requests_retried"] += len(failed)
        again = work.engine.generate([requests[number] for number in failed], lambda _, tokens: report(0, tokens))
        for number, completion in zip(failed, again, strict=True):
            completions[number] = completion
    if len(requests) >= _TELLING and all(completion.error is not None for completion in completions):
        raise EngineError(f"every request of a batch of {len(requests)} failed, the first with: {completions[0].error}")
    state.counts["generated_tokens"] += sum(completion.tokens for completion in completions)
    state.counts["prompt_tokens"] += sum(len(request.prompt) for request in requests)
    return completions


def _shot(text: RawText, completion: Completion, round_: int, state: _Progress, work: Work) -> OneShotExample:
    """Turn a completion into the text with its pairs, and note what is dropped."""
    if completion.error is not None:
        state.rejects.append(Reject(where="request", id=text.id, reason="request failed", content=text.text, detail=completion.error))
        return OneShotExample(id=text.id, text=text.text, pairs=())
    format_ = work.prompt_format
    parsed = parse_pairs(completion.text, format_.pair, stopped=completion.stopped)
    provenance = {
        "synthesizer": work.synthesizer,
        "prompt_format": format_.name,
        "language": format_.language,
        "round": round_,
        "filters": list(work.filtering.filters),
    }
    pairs = [restored(pair, work.prompts.escaping, **provenance) for pair in parsed.pairs]
    kept, dropped = keep(pairs, text.text, work.filtering, language=format_.language)
    for where, items in (("completion", parsed.dropped), ("filter", dropped)):
        state.rejects += [Reject(where=where, id=text.id, reason=item.reason, content=item.content) for item in items]
    state.counts["pairs_parsed"] += len(pairs)
    state.counts["pairs"] += len(kept)
    state.counts["texts_with_pairs"] += bool(kept)
    return OneShotExample(id=text.id, text=text.text, pairs=tuple(kept))
