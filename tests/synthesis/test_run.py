"""tools/synthesize.py with the scripted engine: every text once, chains as the method says, nothing lost, clear refusals."""

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_instruct.manifest import read_manifest
from megatron_instruct.records import MShotExample
from megatron_instruct.synthesis.content_words import WORDS, words_of

Synthesize = Callable[..., tuple[int, str]]


def shot_ids(bench: Any, output: str = "out") -> list[list[str]]:
    return [[shot["id"] for shot in example["shots"]] for example in bench.lines(f"{output}/examples.jsonl")]


def test_texts_become_chains_across_blocks_with_their_pairs(bench: Any, synthesize: Synthesize) -> None:
    status, printed = synthesize(bench.corpus(7), rounds=3)
    assert status == 0, printed
    assert shot_ids(bench) == [["t000", "t003", "t005"], ["t001", "t004", "t006"], ["t002"]]
    example = MShotExample.from_json(bench.lines("out/examples.jsonl")[0], where="examples.jsonl:1")
    assert [pair.question for pair in example.shots[1].pairs] == ["What is entry t003?", "Which bug is told of?"]
    assert example.shots[1].pairs[0].provenance["round"] == 2
    manifest = read_manifest(bench.folder / "out" / "manifest.json", stage="synthesize")
    assert {name: manifest.counts[name] for name in ("records_in", "texts", "texts_with_pairs", "pairs", "examples", "requests")} == {
        "records_in": 7,
        "texts": 7,
        "texts_with_pairs": 7,
        "pairs": 14,
        "examples": 3,
        "requests": 7,
    }
    assert manifest.rejected == {"incomplete pair": 7}
    assert {(row["where"], row["content"]) for row in bench.lines("out/rejects.jsonl")} == {("completion", "<QUE> Cut")}


@pytest.mark.parametrize(("texts", "rounds"), [(1, 3), (2, 5), (5, 2), (9, 4), (10, 1)])
def test_the_shard_size_changes_no_example(bench: Any, synthesize: Synthesize, texts: int, rounds: int) -> None:
    corpus = bench.corpus(texts)
    for shard_size in (1, 3, 100):
        assert synthesize(corpus, f"out{shard_size}", rounds=rounds, shard_size=shard_size)[0] == 0
    contents = [bench.outputs(f"out{size}") for size in (1, 3, 100)]
    assert contents[0]["examples.jsonl"] == contents[1]["examples.jsonl"] == contents[2]["examples.jsonl"]
    assert sorted(itertools.chain(*shot_ids(bench, "out3"))) == [f"t{n:03d}" for n in range(texts)]
    assert sorted(contents[0]) == ["examples.jsonl", "manifest.json", "rejects.jsonl"]


def test_a_text_without_pairs_stays_raw_and_the_chain_waits(bench: Any, synthesize: Synthesize) -> None:
    bench.script(completions={"t001": "no pair at all"})
    assert synthesize(bench.corpus(3), rounds=3)[0] == 0
    assert shot_ids(bench) == [["t000", "t002"], ["t001"]]
    assert bench.lines("out/examples.jsonl")[1]["shots"][0]["pairs"] == []


def test_a_failed_request_is_asked_again_then_set_aside_and_its_text_stays(bench: Any, synthesize: Synthesize) -> None:
    bench.script(failures={"t001": 2, "t003": 3})
    status, printed = synthesize(bench.corpus(6), rounds=1)
    assert status == 0
    assert "request failed 1" in printed
    failed = [row for row in bench.lines("out/rejects.jsonl") if row["reason"] == "request failed"]
    assert [(row["id"], row["detail"]) for row in failed] == [("t003", "the script lets this request fail")]
    pairs = {example["id"]: len(example["shots"][0]["pairs"]) for example in bench.lines("out/examples.jsonl")}
    assert pairs == {"t000": 2, "t001": 2, "t002": 2, "t003": 0, "t004": 2, "t005": 2}


def test_an_engine_that_fails_every_request_stops_the_run(bench: Any, synthesize: Synthesize) -> None:
    bench.script(failures={f"t{n:03d}": 9 for n in range(6)})
    status, printed = synthesize(bench.corpus(6), rounds=1)
    assert status == 5
    assert "every one of 6 requests failed" in printed
    assert not (bench.folder / "out" / "manifest.json").exists()


def test_an_engine_that_dies_is_started_again(bench: Any, synthesize: Synthesize) -> None:
    corpus = bench.corpus(12)
    assert synthesize(corpus, "calm")[0] == 0
    bench.script(dead_after=5, log=str(bench.folder / "log"))
    status, printed = synthesize(corpus, restarts=2)
    assert status == 0, printed
    assert "The engine died and is started again (2 of 2)" in printed
    assert bench.outputs("out")["examples.jsonl"] == bench.outputs("calm")["examples.jsonl"]


def test_an_engine_that_dies_for_good_stops_the_run_and_what_it_answered_is_kept(bench: Any, synthesize: Synthesize) -> None:
    corpus = bench.corpus(12)
    assert synthesize(corpus, "calm", shard_size=4)[0] == 0
    log = bench.folder / "log"
    bench.script(dead_after=9, log=str(log))
    settings = {"shard_size": 4, "restarts": 0}
    assert synthesize(corpus, **settings)[0] == 5
    shards = bench.folder / "out" / "shards"
    answered = [json.loads(line)["id"] for journal in shards.glob("*.journal") for line in journal.read_text().splitlines()]
    answered += [shot["id"] for path in shards.glob("0*/examples.jsonl") for shot in example_shots(path)]
    assert len(answered) == 9
    log.unlink()
    status, printed = synthesize(corpus, **settings)
    assert status == 0, "nine requests are enough for what is left"
    assert sorted(log.read_text().split()) == sorted({f"t{n:03d}" for n in range(12)} - set(answered))
    assert "of 3 shards are finished already" in printed
    assert bench.outputs("out")["examples.jsonl"] == bench.outputs("calm")["examples.jsonl"]


def example_shots(path: Path) -> list[dict[str, Any]]:
    return [shot for line in path.read_text().splitlines() for shot in json.loads(line)["shots"]]


def test_pairs_that_filters_drop_are_kept_with_their_reason(bench: Any, synthesize: Synthesize) -> None:
    bench.script(completion="<QUE> What is a bug? <ANS> A purple elephant dancing. </END>\n\n<QUE> Which bug? <ANS> Number one. </END>")
    assert synthesize(bench.corpus(2))[0] == 0
    rejects = bench.lines("out/rejects.jsonl")
    assert [(row["where"], row["reason"], row["content"]) for row in rejects] == [
        ("filter", "answer not grounded in the text", "What is a bug?\nA purple elephant dancing.")
    ] * 2


def test_long_texts_are_split_at_sentence_ends_and_nothing_is_lost(bench: Any, synthesize: Synthesize) -> None:
    text = " ".join(f"Sentence {n} tells of a bug that was found." for n in range(40))
    corpus = bench.corpus([{"id": "long", "text": text}, {"id": "short", "text": "A bug."}, {"id": "one", "text": "word " * 200}])
    assert synthesize(corpus, max_model_len=600, max_new_tokens=100, rounds=1)[0] == 0
    texts = {shot["id"]: shot["text"] for example in bench.lines("out/examples.jsonl") for shot in example["shots"]}
    pieces = [texts[name] for name in texts if name.startswith("long#")]
    assert len(pieces) > 2
    assert all(piece.startswith("Sentence ") and piece.endswith(".") for piece in pieces)
    assert " ".join(pieces) == text
    assert texts["short"] == "A bug."
    assert [(row["id"], row["reason"]) for row in bench.lines("out/rejects.jsonl") if row["where"] == "corpus"] == [
        ("one#1", "sentence too long")
    ]


def test_the_names_of_pieces_depend_on_no_order(bench: Any, synthesize: Synthesize) -> None:
    rows = [
        {"id": "L", "text": " ".join(f"Sentence {n} tells of a bug that was found." for n in range(20))},
        *({"id": name, "text": f"A bug is told of in {name}."} for name in ("L#1", "L#1#", "L#2##")),
    ]
    results = []
    for number, order in enumerate(itertools.permutations(rows)):
        status, printed = synthesize(bench.corpus(order), f"out{number}", max_model_len=600, max_new_tokens=100, rounds=1)
        assert status == 0, printed
        results.append({shot["id"]: shot["text"] for line in bench.lines(f"out{number}/examples.jsonl") for shot in line["shots"]})
    assert all(result == results[0] for result in results)
    assert results[0]["L#1"] == "A bug is told of in L#1."
    assert results[0]["L#1##"].startswith("Sentence 0 tells")
    assert "L#2" in results[0]


def test_long_texts_can_be_set_aside(bench: Any, synthesize: Synthesize) -> None:
    corpus = bench.corpus([{"id": "long", "text": "A bug is told of. " * 99}, {"id": "short", "text": "A bug."}])
    assert synthesize(corpus, max_model_len=600, max_new_tokens=100, long_texts="reject")[0] == 0
    assert shot_ids(bench) == [["short"]]
    assert bench.lines("out/rejects.jsonl")[0]["reason"] == "text too long"


def test_history_that_does_not_fit_is_cut_from_its_oldest(bench: Any, synthesize: Synthesize) -> None:
    """A prompt of one such text takes about 75 tokens and an example about 190: room for one example, not for two."""
    corpus = bench.corpus([{"id": f"t{n:03d}", "text": f"Entry t{n:03d} is about a bug. The bug number one is told of."} for n in range(4)])
    assert synthesize(corpus, rounds=4, max_model_len=500, max_new_tokens=100)[0] == 0
    assert shot_ids(bench) == [["t000", "t001", "t002", "t003"]]
    assert synthesize(corpus, "narrow", rounds=4, max_model_len=300, max_new_tokens=100)[0] == 0
    assert shot_ids(bench, "narrow") == [["t000"], ["t001"], ["t002"], ["t003"]]


def test_a_text_with_the_markers_breaks_neither_prompt_nor_parse(bench: Any, synthesize: Synthesize) -> None:
    text = "Entry a </CON>\n\n<QUE> What? <ANS> This. </END></s><s> <CON> is about a bug. The bug number one is told of."
    assert synthesize(bench.corpus([{"id": "a", "text": text}, {"id": "b", "text": text.replace("Entry a", "Entry b")}]), rounds=2)[0] == 0
    shots = bench.lines("out/examples.jsonl")[0]["shots"]
    assert [shot["id"] for shot in shots] == ["a", "b"]
    assert shots[0]["text"] == text


BAD_RECORDS = {
    '{"text": "cut': "broken JSON",
    '{"id": "x", "body": "y"}': "missing text",
    '{"id": "x", "text": "  "}': "empty text",
    '{"id": "t000", "text": "again"}': "repeated id",
    '{"id": " ", "text": "y"}': "broken id",
    '{"id": "\\ud800x", "text": "y"}': "lone surrogate",
    '{"id": "x\\u0000", "text": "y"}': "NUL character",
    '{"id": "x", "text": "y", "question": " \\n"}': "broken question",
    '{"id": "x", "text": "y", "question": "\\ud800?"}': "lone surrogate",
    '{"id": "x", "text": "y", "question": "\\u0000?"}': "NUL character",
    '{"id": "x", "text": "y", "pairs": [{"question": "a?", "answer": "\\udc00"}]}': "lone surrogate",
    '{"id": "x", "text": "y", "pairs": [{"question": "a?", "answer": "b", "options": ["\\u0000"]}]}': "NUL character",
}


@pytest.mark.parametrize("line", BAD_RECORDS)
def test_a_bad_record_stops_the_run_or_is_set_aside_by_flag(bench: Any, synthesize: Synthesize, line: str) -> None:
    corpus = bench.corpus(2)
    corpus.write_text(corpus.read_text() + line + "\n")
    keys = {"question_key": "question", "pairs_key": "pairs"}
    status, printed = synthesize(corpus, **keys)
    assert status == 3
    assert f"corpus.jsonl:3: {BAD_RECORDS[line]}" in printed
    assert "--on-error reject" in printed
    assert synthesize(corpus, "other", on_error="reject", **keys)[0] == 0
    manifest = read_manifest(bench.folder / "other" / "manifest.json")
    assert (manifest.counts["records_in"], manifest.counts["texts"], manifest.rejected[BAD_RECORDS[line]]) == (3, 2, 1)


def test_a_backslash_before_u0000_is_no_nul(bench: Any, synthesize: Synthesize) -> None:
    pairs = [{"question": r"What is \u0000?", "answer": r"\\u0000"}]
    assert synthesize(bench.corpus([{"id": r"\u0000", "text": "A bug.", "pairs": pairs}]), pairs_key="pairs")[0] == 0
    (pair,) = bench.lines("out/examples.jsonl")[0]["shots"][0]["pairs"]
    assert (pair["question"], pair["answer"]) == (pairs[0]["question"], pairs[0]["answer"])


def test_an_answer_with_a_nul_is_set_aside(bench: Any, synthesize: Synthesize) -> None:
    bench.script(completion="<QUE> Which bug is told of? <ANS> The bug\0 number one. </END>", completions={"q": "It is\0 one. </END>"})
    rows = [{"id": "w", "text": "The bug number one is told of."}, {"id": "q", "text": "A bug is told of.", "question": "Which?"}]
    assert synthesize(bench.corpus(rows), question_key="question")[0] == 0
    assert [(row["id"], row["where"], row["reason"]) for row in bench.lines("out/rejects.jsonl")] == [
        ("w", "completion", "NUL character"),
        ("q", "completion", "NUL character"),
    ]


def test_a_second_run_does_nothing_and_other_settings_are_refused(bench: Any, synthesize: Synthesize) -> None:
    corpus = bench.corpus(4)
    assert synthesize(corpus)[0] == 0
    before = bench.outputs("out")
    status, printed = synthesize(corpus)
    assert (status, "Finished already" in printed, bench.outputs("out") == before) == (0, True, True)
    status, printed = synthesize(corpus, rounds=3)
    assert status == 2
    assert "rounds=2" in printed
    assert bench.outputs("out") == before


@pytest.mark.parametrize(
    ("settings", "status", "message"),
    [
        ({"max_new_tokens": 4096}, 2, "leaves no room for a text"),
        ({"max_model_len": 110, "max_new_tokens": 100}, 3, "the prompt format alone takes 17 tokens"),
        ({"prompt_format": "instruction-synthesiser"}, 2, "did you mean 'instruction-synthesizer'"),
        ({"prompt_format": "chat"}, 2, "has no chat template"),
        ({"model": "/no/such/folder"}, 3, "no such folder"),
        ({"input": "/no/such/file.jsonl"}, 3, "no such file"),
        ({"filters": "grounded"}, 2, "did you mean 'grounding'"),
        ({"script": "/no/such/script.yaml"}, 3, "no such file"),
        ({"rounds": 0}, 2, "rounds=0"),
        ({"threads": 0}, 2, "threads=0 must be at least 1"),
        ({"kv_cache_gib": -1}, 2, "kv_cache_gib=-1 must be at least 1"),
        ({"gpu_memory_utilization": 90}, 2, "gpu_memory_utilization=90.0 must be above 0, and 1 at most"),
        ({"repetition_penalty": 0}, 2, "repetition_penalty=0.0 must be above 0"),
    ],
)
def test_bad_settings_give_one_clear_message(
    bench: Any, synthesize: Synthesize, settings: dict[str, Any], status: int, message: str
) -> None:
    got, printed = synthesize(bench.corpus(2), **settings)
    assert got == status, printed
    assert message in printed
    assert not (bench.folder / "out" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("- a", "Expected `object`, got `array`; it is YAML with completion, completions, failures, "),
        ("completion: [1", "while parsing a flow sequence"),
        ("failures: {t000: often}", "Expected `int`, got `str` - at `$.failures[...]`"),
        ("completion: a\nanswers: b", "unknown field `answers`"),
        ("faults: {seed: 1, kill: 0.5}", "`death` and `kill` need `memory`, a file"),
    ],
)
def test_what_is_wrong_in_a_script_is_told(bench: Any, synthesize: Synthesize, script: str, message: str) -> None:
    (bench.folder / "wrong.yaml").write_text(script)
    status, printed = synthesize(bench.corpus(2), script=bench.folder / "wrong.yaml")
    assert (status, "wrong.yaml: " in printed, message in printed) == (3, True, True), printed


@pytest.mark.parametrize(("content", "status"), [("[]", 3), ('{"max_position_embeddings": 8192, "rope_scaling": "none"}', 0)])
def test_a_config_of_another_shape_is_refused_or_left_to_the_engine(bench: Any, synthesize: Synthesize, content: str, status: int) -> None:
    shutil.copytree(bench.model, model := bench.folder / "model")
    (model / "config.json").write_text(content)
    found, printed = synthesize(bench.corpus(2), model=model)
    assert (found, "config.json is not a JSON object" in printed) == (status, status == 3), printed


def test_more_tokens_than_the_model_has_positions_are_refused_unless_it_stretches_them(bench: Any, synthesize: Synthesize) -> None:
    shutil.copytree(bench.model, model := bench.folder / "model")
    (model / "config.json").write_text('{"max_position_embeddings": 2048}')
    status, printed = synthesize(bench.corpus(2), model=model)
    assert (status, "pass --max-model-len 2048 or less" in printed) == (2, True), printed
    assert not (bench.folder / "out" / "manifest.json").exists()
    assert synthesize(bench.corpus(2), model=model, max_model_len=2048)[0] == 0
    (model / "config.json").write_text('{"max_position_embeddings": 2048, "rope_scaling": {"type": "yarn", "factor": 4.0}}')
    assert synthesize(bench.corpus(2), "stretched", model=model)[0] == 0


@pytest.mark.parametrize("content", ["", '{"id": "a", "text": ""}\n{"id": "b", "text": " \\n"}\n'])
def test_an_empty_corpus_and_one_of_empty_texts_are_refused(bench: Any, synthesize: Synthesize, content: str) -> None:
    (bench.folder / "empty.jsonl").write_text(content)
    status, printed = synthesize(bench.folder / "empty.jsonl", on_error="reject")
    assert (status, "no text is left of" in printed, "empty" in printed.rpartition("no text is left")[2]) == (3, True, True), printed
    assert not (bench.folder / "out" / "manifest.json").exists()
    assert synthesize(bench.folder / "empty.jsonl")[0] == 3


def test_a_model_folder_without_a_tokenizer_is_refused(bench: Any, synthesize: Synthesize) -> None:
    (model := bench.folder / "model").mkdir()
    (model / "config.json").write_text("{}")
    status, printed = synthesize(bench.corpus(2), model=model)
    assert (status, "has neither tokenizer.json nor" in printed) == (3, True), printed
    assert not (bench.folder / "out" / "manifest.json").exists()


def test_the_limit_takes_records_from_the_beginning(bench: Any, synthesize: Synthesize) -> None:
    assert synthesize(bench.corpus(9), limit=3, rounds=1)[0] == 0
    assert shot_ids(bench) == [["t000"], ["t001"], ["t002"]]


def test_an_evaluation_that_says_nothing_is_refused_before_the_corpus_is_read(bench: Any, synthesize: Synthesize) -> None:
    (bench.folder / "tiny.txt").write_text("a b c\n")
    status, printed = synthesize(bench.corpus(2), decontaminate=bench.folder / "tiny.txt")
    assert (status, "tiny.txt: no text in it has 6 words" in printed) == (3, True), printed
    assert not (bench.folder / "out" / "shards" / "intake").exists()


def test_filters_that_know_no_words_of_a_language_are_named_once(bench: Any, synthesize: Synthesize) -> None:
    own = bench.folder / "own.yaml"
    pair = {"question": "[Q]", "answer": "[A]", "end": "[E]"}
    own.write_text(json.dumps({"kind": "markers", "language": "ja", "text": "[T]{text}", "hide": ["[T]"], "pair": pair}))
    bench.script(completion="[Q] 日本の首都はどこですか？ [A] 東京です。 [E]")
    rows = [{"id": f"t{n}", "text": f"日本の首都は東京である。{n}"} for n in range(2)]
    status, printed = synthesize(bench.corpus(rows), prompt_format=own, shard_size=1)
    assert status == 0
    assert printed.count("filters: grounding and relevance drop nothing") == 1
    assert "filters.yaml has no words of language='ja' (of prompt_format=own); add some there" in printed
    pairs = [pair for line in bench.lines("out/examples.jsonl") for shot in line["shots"] for pair in shot["pairs"]]
    assert len(pairs) == 2
    assert not {"grounding", "relevance"} & set(pairs[0]["provenance"]["filters"])
    assert "drop nothing" not in synthesize(bench.corpus(2), "english")[1]


def test_words_that_are_added_for_a_language_are_another_result_and_broken_ones_are_named(
    bench: Any, synthesize: Synthesize, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, words, shipped = bench.folder / "own.yaml", bench.folder / "filters.yaml", WORDS.read_text(encoding="utf-8")
    pair = {"question": "[Q]", "answer": "[A]", "end": "[E]"}
    own.write_text(json.dumps({"kind": "markers", "language": "de", "text": "[T]{text}", "hide": ["[T]"], "pair": pair}))
    corpus = bench.corpus(2)
    assert synthesize(corpus, prompt_format=own)[0] == 0
    monkeypatch.setattr("megatron_instruct.synthesis.content_words.WORDS", words)
    for german, status, message in (
        ("der die das", 2, "words="),
        ("[der, die]", 3, "filters.yaml:5: a text is needed here"),
        ("'der", 3, "YAML"),
    ):
        words.write_text(shipped.replace("function_words:\n", f"function_words:\n  de: {german}\n"))
        words_of.cache_clear()
        assert (got := synthesize(corpus, prompt_format=own))[0] == status, got
        assert message in got[1]
    words_of.cache_clear()


def test_a_format_of_the_users_own_is_taken(bench: Any, synthesize: Synthesize) -> None:
    own = bench.folder / "own.yaml"
    pair = {"question": "[Q]", "answer": "[A]", "end": "[E]"}
    own.write_text(json.dumps({"kind": "markers", "language": "en", "text": "[T]{text}", "hide": ["[T]"], "pair": pair}))
    bench.script(completion="[Q] Which bug? [A] Number one. [E]")
    assert synthesize(bench.corpus(2), prompt_format=own)[0] == 0
    assert bench.lines("out/examples.jsonl")[0]["shots"][0]["pairs"][0]["provenance"]["prompt_format"] == "own"


def test_the_tool_loads_neither_torch_nor_vllm_for_its_help(start: Callable[..., Any], tmp_path: Path) -> None:
    out, _ = start("synthesize.py", "--help").communicate(timeout=60)
    assert "--prompt-format" in out
