"""Perplexity: every token once, equal to a plain transformers loop, whatever the batch size."""

import math
from pathlib import Path

import pytest
import torch
import transformers

from megatron_instruct.evaluation.perplexity import document_nll, perplexity_results, windows_of
from megatron_instruct.tokenizer import load_tokenizer


@pytest.mark.parametrize("length", [2, 7, 8, 9, 12, 13, 50])
@pytest.mark.parametrize(("seq_length", "stride"), [(8, 4), (8, 1), (8, 7)])
def test_windows_score_every_token_but_the_first_exactly_once(length: int, seq_length: int, stride: int) -> None:
    windows = windows_of(0, length, seq_length=seq_length, stride=stride)
    assert [place for window in windows for place in range(window.score_from, window.end)] == list(range(1, length))
    for window in windows:
        assert window.end - window.begin <= seq_length
        assert window.score_from - window.begin >= (1 if window.begin == 0 else seq_length - stride), "tokens seen before"


def plain_loop(model: torch.nn.Module, sequence: list[int], seq_length: int, stride: int) -> float:
    """The loop of the transformers guide on perplexity: labels masked by -100, the mean loss times the number of labels."""
    total, before = 0.0, 0
    ids = torch.tensor([sequence])
    for begin in range(0, len(sequence), stride):
        end = min(begin + seq_length, len(sequence))
        labels = ids[:, begin:end].clone()
        labels[:, : before - begin] = -100
        counted = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += model(ids[:, begin:end], labels=labels).loss.item() * counted if counted else 0.0
        before = end
        if end == len(sequence):
            break
    return total


def test_equal_to_a_plain_transformers_loop_at_any_batch_size(model: Path, jargon: list[dict[str, str]]) -> None:
    tokenizer = load_tokenizer(model)
    network = transformers.AutoModelForCausalLM.from_pretrained(model).eval()
    sequences = [[tokenizer.eod, *tokenizer.encode(row["text"])] for row in jargon[7::200]]
    assert max(map(len, sequences)) > 256 > min(map(len, sequences))
    expected = [plain_loop(network, sequence, 256, 128) for sequence in sequences]
    for batch_size in (1, 3, 64):
        found = document_nll(sequences, network, seq_length=256, stride=128, batch_size=batch_size)
        assert found == pytest.approx(expected, rel=1e-5)


def test_metrics_are_weighted_by_tokens_and_bytes_not_by_documents() -> None:
    results = perplexity_results(["a", "b"], ["xy", "é" * 3], [1, 3], [2.0, 3.0])
    values = {metric.name: metric.value for metric in results.metrics}
    assert values["nll_per_token"] == 5 / 4
    assert values["perplexity"] == math.exp(5 / 4)
    assert values["bits_per_byte"] == pytest.approx(5 / math.log(2) / 8)
    assert all(metric.n == 2 and metric.stderr is not None and metric.higher_is_better is False for metric in results.metrics)
