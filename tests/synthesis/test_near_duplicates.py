"""Near-duplicates across the corpus: what is found is what comparing every pair with every one before it finds, in whatever groups."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.manifest import read_manifest
from megatron_instruct.records import InstructionPair, MShotExample, OneShotExample
from megatron_instruct.synthesis import merge, near_duplicates
from megatron_instruct.synthesis.content_words import plain_words
from megatron_instruct.synthesis.filter_settings import FilterSettings
from megatron_instruct.synthesis.near_duplicates import rows_of_a_band, sift, similarity
from megatron_instruct.synthesis.run import main

SETTINGS = FilterSettings(filters=("default", "near_duplicate"))
WORDS = ["bug", "kernel", "daemon", "socket", "parser", "editor", "hacker", "printer", "compiler", "packet", "queue", "mutex", "cache"]


def example(name: str, *questions: str, answer: str = "So.") -> MShotExample:
    passed = {"filters": ["length"], "language": "en"}
    pairs = tuple(InstructionPair(question=question, answer=answer, provenance=passed) for question in questions)
    return MShotExample(id=name, shots=(OneShotExample(id=name, text=f"Text {name}.", pairs=pairs),))


def questions_of(examples: Iterator[Any]) -> list[str]:
    return [pair.question for left in examples for one in left.examples for shot in one.shots for pair in shot.pairs]


def corpus_of_questions(count: int) -> list[str]:
    """Questions of which many are variants of earlier ones: another ending, another word, another case."""
    draw, questions = random.Random(7), []
    for _ in range(count):
        if questions and draw.random() < 0.5:
            words = draw.choice(questions).split()
            words[draw.randrange(len(words))] = draw.choice(WORDS)
            questions.append(" ".join(words).upper() if draw.random() < 0.2 else " ".join(words))
        else:
            questions.append(f"What does the {' '.join(draw.choices(WORDS, k=7))} do?")
    return questions


def bare(question: str) -> str:
    return " ".join(word for word in plain_words(question) if word not in ("does", "the", "do"))


def test_what_is_found_is_what_comparing_all_with_all_finds(tmp_path: Path) -> None:
    questions = corpus_of_questions(300)
    kept: list[str] = []
    for question in questions:
        if not any(similarity(bare(question), bare(earlier)) > SETTINGS.max_similarity for earlier in kept):
            kept.append(question)
    assert 100 < len(kept) < 250, "the corpus has both"
    found = questions_of(sift([example(f"t{n}", question) for n, question in enumerate(questions)], tmp_path / "db", SETTINGS))
    assert found == kept
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("batch", [1, 7])
def test_the_groups_that_are_hashed_together_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    examples = [example(f"t{n}", question) for n, question in enumerate(corpus_of_questions(120))]
    expected = list(sift(examples, tmp_path / "db", SETTINGS))
    monkeypatch.setattr(near_duplicates, "_BATCH", batch)
    assert list(sift(examples, tmp_path / "db", SETTINGS)) == expected


def test_a_dropped_pair_names_what_it_repeats_and_a_kept_one_what_it_passed(tmp_path: Path) -> None:
    first, second = sift([example("a", "What is a bug?"), example("b", "what is a BUG", "Who?")], tmp_path / "db", SETTINGS)
    assert second.rejects[0].reason == "near-duplicate in the corpus"
    assert second.rejects[0].detail == "similarity 1.00 to a, pair 1: what bug"
    assert (second.rejects[0].id, second.rejects[0].content) == ("b", "what is a BUG\nSo.")
    assert [pair.question for pair in second.examples[0].shots[0].pairs] == ["Who?"]
    assert first.examples[0].shots[0].pairs[0].provenance["filters"] == ["length", "near_duplicate"]


def test_questions_about_other_numbers_are_other_questions(tmp_path: Path) -> None:
    years = [
        "What happened in the village in 1941?",
        "What happened in the village in 1942?",
        "What happened in that village in 1941?",
    ]
    assert questions_of(sift([example(year[-6:], year) for year in years], tmp_path / "db", SETTINGS)) == years[:2]


def test_questions_alone_or_with_their_answers_are_compared(tmp_path: Path) -> None:
    examples = [example("a", "What is it about?", answer="A bug in the kernel."), example("b", "What is it about?", answer="Tea towels.")]
    assert len(questions_of(sift(examples, tmp_path / "db", SETTINGS))) == 1
    pairs = FilterSettings(filters=("near_duplicate",), near_duplicate_of="pair")
    assert len(questions_of(sift(examples, tmp_path / "db", pairs))) == 2


def test_a_text_that_loses_its_last_pair_leaves_its_chain_and_stays(tmp_path: Path) -> None:
    shots = tuple(example(name, f"What is {name}?").shots[0] for name in ("alpha", "beta", "gamma"))
    chain = [example("x", "What is beta?"), MShotExample(id="alpha", shots=shots)]
    left = list(sift(chain, tmp_path / "db", SETTINGS))[1].examples
    assert [[shot.id for shot in one.shots] for one in left] == [["alpha", "gamma"], ["beta"]]
    assert [one.id for one in left] == ["alpha", "beta"]
    assert left[1].shots[0].pairs == ()


def test_what_the_corpus_gave_passes_by_and_the_counts_add_up(bench: Any) -> None:
    """No matter what the provenance of given pairs says."""
    same, text = "What is the main idea of this text about bugs?", "The bug number one is told of here. "
    rows: list[dict[str, Any]] = [{"id": f"q{n}", "text": f"{text}{n}.", "question": same} for n in range(2)]
    rows += [{"id": f"p{n}", "text": f"{text}{n}!", "pairs": [{"question": same, "answer": f"Gold {n}."}]} for n in range(2)]
    rows[-1]["pairs"][0]["provenance"] = {"filters": ["length"]}
    rows += [{"id": f"w{n}", "text": f"Bug {n}. {text}"} for n in range(2)]
    bench.script(completion=f"<QUE> {same} <ANS> The bug number one. </END>")
    arguments = bench.arguments(bench.corpus(rows), question_key="question", pairs_key="pairs")
    assert main([*arguments, "--filters", "length", "near_duplicate"]) == 0
    shots = {shot["id"]: shot["pairs"] for line in bench.lines("out/examples.jsonl") for shot in line["shots"]}
    assert {name: len(pairs) for name, pairs in shots.items()} == {"q0": 1, "q1": 1, "p0": 1, "p1": 1, "w0": 1, "w1": 0}
    passed = {name: [(pair["provenance"].get("given"), pair["provenance"].get("filters")) for pair in shots[name]] for name in shots}
    assert [passed["q1"], passed["p0"], passed["p1"]] == [[("question", [])], [("pair", None)], [("pair", ["length"])]]
    assert passed["w0"] == [(None, ["length", "near_duplicate"])]
    manifest = read_manifest(bench.folder / "out" / "manifest.json")
    names = ("pieces", "pairs", "texts_with_pairs", "texts_with_pairs_given")
    assert [manifest.counts[name] for name in names] == [4, 3, 3, 2]
    assert manifest.rejected == {"near-duplicate in the corpus": 1}


def test_bands_find_almost_all_pairs_at_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        rows = rows_of_a_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.995
    assert rows_of_a_band(0.9) > rows_of_a_band(0.5), "a higher threshold needs fewer comparisons"


def test_a_run_that_ends_while_it_looks_for_near_duplicates_does_it_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, filters = bench.corpus(9), ["--filters", "default", "near_duplicate"]
    assert main([*bench.arguments(corpus, "calm"), *filters]) == 0

    def cut_short(*arguments: Any) -> Iterator[Any]:
        (bench.folder / "out" / "shards" / "near-duplicates.sqlite").write_text("what a killed run leaves")
        yield from itertools.islice(sift(*arguments), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(merge, "sift", cut_short)
        assert main([*bench.arguments(corpus), *filters]) == 130
    (bench.folder / "out" / "shards" / "near-duplicates.sqlite").write_text("what a killed run leaves")
    assert not (bench.folder / "out" / "examples.jsonl").exists()
    assert main([*bench.arguments(corpus), *filters]) == 0
    assert bench.outputs("out") == bench.outputs("calm")


def test_the_result_of_the_tool_depends_neither_on_shards_nor_on_workers(bench: Any, synthesize: Callable[..., tuple[int, str]]) -> None:
    corpus = bench.corpus(14)
    results = []
    for number, settings in enumerate(({"shard_size": 1}, {"shard_size": 5}, {"shard_size": 100}, {"shard_size": 4, "replicas": 2})):
        arguments = bench.arguments(corpus, f"out{number}", rounds=2, near_duplicate_of="question", **settings)
        assert main([*arguments, "--filters", "default", "near_duplicate"]) == 0
        results.append({name: (bench.folder / f"out{number}" / name).read_bytes() for name in ("examples.jsonl", "rejects.jsonl")})
    assert results[0]["examples.jsonl"] == results[1]["examples.jsonl"] == results[2]["examples.jsonl"] == results[3]["examples.jsonl"]
    assert sorted(results[0]["rejects.jsonl"].splitlines()) == sorted(results[2]["rejects.jsonl"].splitlines())
    manifest = read_manifest(bench.folder / "out2" / "manifest.json")
    assert manifest.rejected == {"incomplete pair": 14, "near-duplicate in the corpus": 13}
    assert manifest.counts["pairs"] == 28 - 13
    assert manifest.counts["pieces"] == manifest.counts["pairs"] + sum(manifest.rejected.values())
    shots = [shot for line in results[0]["examples.jsonl"].splitlines() for shot in json.loads(line)["shots"]]
    assert sorted(shot["id"] for shot in shots) == [f"t{number:03d}" for number in range(14)]
    assert sum(len(shot["pairs"]) for shot in shots) == 15
