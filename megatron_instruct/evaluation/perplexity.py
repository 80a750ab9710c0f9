"""Perplexity on held-out documents, with transformers.

Comes in: documents as token ids, a causal language model. Goes out: the negative log-likelihood of each document (natural
logarithm), and three metrics over all of them, weighted by token or byte and not by document: nll_per_token, perplexity = exp of
it, and bits_per_byte, which does not depend on the tokenizer.
Protocol: a document is scored after one start token (BOS or EOD), alone, every token of its own exactly once; no end token is
scored. Where start token and document are longer than the sequence length L, a window of L tokens moves by the stride S, and each
window scores only tokens that no earlier one has scored: each has at least L - S tokens before it. Arithmetic after the logits is
in float32, sums over tokens are in float64.
Does not know: files, lm-eval.
"""

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_instruct.errors import InputError
from megatron_instruct.evaluation.config import PERPLEXITY
from megatron_instruct.evaluation.results import NOT_FINITE, Metric, Results, Sample


@dataclass(frozen=True, kw_only=True, slots=True)
class Window:
    """Tokens [begin, end) of one document's sequence (start token first), of which [score_from, end) are scored."""

    document: int
    begin: int
    end: int
    score_from: int


def windows_of(document: int, length: int, *, seq_length: int, stride: int) -> list[Window]:
    """Cut a sequence of `length` tokens, start token included, into windows.

    seq_length, stride: in tokens, 1 <= stride < seq_length or the document fits one window.
    """
    windows: list[Window] = []
    begin, scored = 0, 1
    while scored < length:
        end = min(begin + seq_length, length)
        windows.append(Window(document=document, begin=begin, end=end, score_from=scored))
        begin, scored = begin + stride, end
    return windows


def document_nll(
    sequences: Sequence[Sequence[int]],
    model: Any,
    *,
    seq_length: int,
    stride: int,
    batch_size: int,
    report: Callable[[int], None] = lambda windows: None,
) -> list[float]:
    """Return the negative log-likelihood of each sequence given its first token.

    Raises InputError where one is not finite.

    model: a transformers causal language model in evaluation mode. At most batch_size windows of like length are scored together, the
    longest first; padding stands on the right, where a causal model does not see it.
    """
    import torch

    windows = [
        window
        for document, sequence in enumerate(sequences)
        for window in windows_of(document, len(sequence), seq_length=seq_length, stride=stride)
    ]
    order = sorted(range(len(windows)), key=lambda number: (windows[number].begin - windows[number].end, number))
    scores = [0.0] * len(windows)
    with torch.inference_mode():
        for batch in _batches(order, [window.end - window.begin for window in windows], batch_size):
            for number, score in zip(batch, _score([windows[number] for number in batch], sequences, model), strict=True):
                if not math.isfinite(score):
                    place = windows[number].document + 1
                    raise InputError(f"document {place} of the held-out ones: its negative log-likelihood is {score}; {NOT_FINITE}")
                scores[number] = score
            report(len(batch))
    totals = [0.0] * len(sequences)
    for window, score in zip(windows, scores, strict=True):
        totals[window.document] += score
    return totals


def _batches(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield windows from the longest to the shortest, at most batch_size at once, and none that is more than a quarter padding."""
    batch: list[int] = []
    for number in order:
        if batch and (len(batch) == batch_size or lengths[number] < 0.75 * lengths[batch[0]]):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _score(windows: Sequence[Window], sequences: Sequence[Sequence[int]], model: Any) -> list[float]:
    import torch

    longest = max(window.end - window.begin for window in windows)
    ids_BS = torch.zeros((len(windows), longest), dtype=torch.long)  # B windows, S positions, V vocabulary
    mask_BS = torch.zeros_like(ids_BS)
    for row, window in enumerate(windows):
        length = window.end - window.begin
        ids_BS[row, :length] = torch.tensor(sequences[window.document][window.begin : window.end])
        mask_BS[row, :length] = 1
    logits_BSV = model(input_ids=ids_BS.to(model.device), attention_mask=mask_BS.to(model.device), use_cache=False).logits
    scores = []
    for row, window in enumerate(windows):
        first, last = window.score_from - window.begin, window.end - window.begin
        logits_TV = logits_BSV[row, first - 1 : last - 1].float()
        targets_T = ids_BS[row, first:last].to(logits_TV.device)
        nll_T = torch.nn.functional.cross_entropy(logits_TV, targets_T, reduction="none")
        scores.append(nll_T.double().sum().item())
    return scores


def perplexity_results(ids: Sequence[str], texts: Sequence[str], token_counts: Sequence[int], nll: Sequence[float]) -> Results:
    """Gather the documents' scores into metrics and samples."""
    byte_counts = [len(text.encode("utf-8")) for text in texts]
    per_token, token_error = _ratio(nll, token_counts)
    per_byte, byte_error = _ratio([value / math.log(2) for value in nll], byte_counts)
    if per_token > math.log(sys.float_info.max):
        raise InputError(f"nll_per_token={per_token:.4g} is too large for a perplexity; {NOT_FINITE}")
    perplexity = math.exp(per_token)
    found = [
        ("nll_per_token", per_token, token_error),
        ("perplexity", perplexity, None if token_error is None else perplexity * token_error),
        ("bits_per_byte", per_byte, byte_error),
    ]
    return Results(
        metrics=tuple(
            Metric(task=PERPLEXITY, name=name, value=value, stderr=error, n=len(ids), higher_is_better=False)
            for name, value, error in found
        ),
        samples=tuple(
            Sample(
                task=PERPLEXITY,
                id=id,
                content=hashlib.sha256(text.encode("utf-8")).hexdigest(),
                values={"nll": value, "tokens": tokens, "bytes": size},
            )
            for id, text, tokens, size, value in zip(ids, texts, token_counts, byte_counts, nll, strict=True)
        ),
    )


def _ratio(tops: Sequence[float], bottoms: Sequence[int]) -> tuple[float, float | None]:
    """Return sum(tops) / sum(bottoms) and its standard error (ratio estimator, linearized; documents are the units drawn)."""
    total, count = sum(bottoms), len(tops)
    ratio = sum(tops) / total
    if count < 2:
        return ratio, None
    spread = sum((top - ratio * bottom) ** 2 for top, bottom in zip(tops, bottoms, strict=True))
    return ratio, math.sqrt(spread * count / (count - 1)) / total
