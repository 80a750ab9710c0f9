"""Rows become documents: the text and the tokens of synthesis, roles, caps, cuts, and what is set aside."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_instruct.manifest import read_manifest
from megatron_instruct.preprocessing.run import main as preprocess
from megatron_instruct.prompt_formats.parsing import parse_pairs
from megatron_instruct.prompt_formats.prompt_format import load_prompt_format
from megatron_instruct.records import InstructionPair, OneShotExample
from megatron_instruct.synthesis.prompts import load_prompts
from megatron_instruct.tokenizer import load_tokenizer
from megatron_instruct.tuning.questions import main as make_questions
from megatron_instruct.tuning.run import main
from tests.tuning.conftest import lines, row, write_rows


def prepare(rows: Path, output: Path, tokenizer: Path, *flags: str) -> int:
    return main(["--input", str(rows), "--output-dir", str(output), "--tokenizer-model", str(tokenizer), *flags])


def encoded(documents: Path, prefix: Path, tokenizer: Path, *flags: str) -> tuple[list[int], list[int]]:
    """Return tokens and roles of a data set."""
    command = ["--input", str(documents), "--output-prefix", str(prefix), "--tokenizer-model", str(tokenizer), "--workers", "1"]
    assert preprocess([*command, "--prepend-bos", "--append-eod", *flags]) == 0
    base = f"{prefix}_text_document"
    return np.fromfile(f"{base}.bin", dtype=np.uint16).tolist(), np.fromfile(f"{base}.roles", dtype=np.uint8).tolist()


def test_what_is_trained_on_is_what_synthesis_prompts_with(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    rows = [
        row(1, "bugs"),
        row(2, "bugs", context="A text that spells </END> and <QUE>.\n\nIt ends so.", pairs=[("Why <ANS>?", "It ends so.")]),
    ]
    assert prepare(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", synthesizer_tokenizer) == 0
    tokens, roles = encoded(tmp_path / "out" / "documents" / "bugs.jsonl", tmp_path / "data", synthesizer_tokenizer)
    tokenizer, format_ = load_tokenizer(synthesizer_tokenizer), load_prompt_format("instruction-synthesizer")
    prompts = load_prompts(format_, tokenizer, synthesizer_tokenizer)
    shots = [
        OneShotExample(id=str(n), text=one["context"], pairs=tuple(InstructionPair(question=p["Q"], answer=p["A"]) for p in one["QA_list"]))
        for n, one in enumerate(rows)
    ]
    first, both = prompts.encode((), shots[0].text), prompts.encode(shots[:1], shots[1].text)
    assert tokens[: len(first)] == first, "the prompt of the first text"
    assert tokens[: len(both)] == both, "the first example, then the prompt of the second text: a sequence is a few-shot prompt"
    assert {*roles[: len(first)]} == {0}, "no loss on what the prompt gives"
    learnt = [token for token, role in zip(tokens[len(both) :], roles[len(both) :], strict=True) if role in (1, 2)]
    parsed = parse_pairs(tokenizer.decode(learnt), format_.pair, stopped=True)
    assert [(prompts.escaping.restore(p.question), p.answer) for p in parsed.pairs] == [("Why <ANS>?", "It ends so.")]
    assert (tokens[-1], roles[-1]) == (tokenizer.eod, 4)
    asked = prompts.encode_question(shots[1].text, shots[1].pairs[0], shots[:1])
    assert tokens[: len(asked)] == asked, "a question to be answered alone, too"


def test_loss_falls_on_pairs_and_their_end_only(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    rows = [row(number, "bugs") for number in range(30)]
    prepare(write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out", synthesizer_tokenizer, "--seq-length", "300")
    documents = tmp_path / "out" / "documents" / "bugs.jsonl"
    tokens, roles = encoded(documents, tmp_path / "data", synthesizer_tokenizer, "--pack-sequence-length", "300")
    tokenizer = load_tokenizer(synthesizer_tokenizer)
    pairs = sum(len(tokenizer.encode(line["text"][line["spans"][1][0] :])) for line in lines(documents))
    counts = np.bincount(roles, minlength=6)
    assert counts[1] + counts[2] == pairs
    assert (counts[3], counts[4], len(tokens) % 300) == (0, 30, 0)
    assert counts[0] == sum(len(tokenizer.encode(line["text"][: line["spans"][1][0]] + "<")) for line in lines(documents)), (
        "and BOS for '<'"
    )


def test_examples_of_a_data_set_are_capped_by_the_seed_and_not_by_order(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    rows = [row(number, "large") for number in range(20)] + [row(number, "small") for number in range(3)]
    corpus = write_rows(tmp_path / "rows.jsonl", rows)
    drawn = []
    for seed in ("0", "0", "1"):
        output = tmp_path / f"out{len(drawn)}"
        prepare(corpus, output, synthesizer_tokenizer, "--max-examples", "5", "--seed", seed)
        drawn.append([line["id"] for line in lines(output / "documents" / "large.jsonl")])
        assert len(lines(output / "documents" / "small.jsonl")) == 3
        manifest = read_manifest(output / "manifest.json")
        assert manifest.counts["examples"] + manifest.counts["rows_not_drawn"] == manifest.counts["rows"] == 23
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1] != drawn[2]


def test_long_contexts_are_cut_at_a_word_or_set_aside(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    pairs = [("What comes first?", "The bug comes first."), ("What comes last?", "The end comes last.")]
    long = row(1, "bugs", context="The bug comes first. " + "There is more text here. " * 60 + "The end comes last.", pairs=pairs)
    corpus = write_rows(tmp_path / "rows.jsonl", [long, row(2, "bugs")])
    assert prepare(corpus, tmp_path / "cut", synthesizer_tokenizer, "--seq-length", "320") == 0
    cut, whole = lines(tmp_path / "cut" / "documents" / "bugs.jsonl")
    tokens = len(load_tokenizer(synthesizer_tokenizer).encode(cut["text"])) + 2
    assert 300 < tokens <= 320
    assert cut["text"].startswith(" <CON> The bug comes first. There is")
    assert "What comes first?" in cut["text"]
    assert "What comes last?" not in cut["text"], "its answer was cut off"
    assert "Bug 2" in whole["text"]
    assert [line["reason"] for line in lines(tmp_path / "cut" / "rejects.jsonl")] == ["answer cut off"]
    assert prepare(corpus, tmp_path / "aside", synthesizer_tokenizer, "--seq-length", "320", "--long-contexts", "reject") == 0
    assert len(lines(tmp_path / "aside" / "documents" / "bugs.jsonl")) == 1
    assert read_manifest(tmp_path / "aside" / "manifest.json").rejected == {"row: too long": 1}


@pytest.mark.parametrize("words", ["研究者在村里发现了一口古井。", "one-word-", "a line\n"])
def test_long_contexts_without_blanks_are_cut_and_never_empty(tmp_path: Path, synthesizer_tokenizer: Path, words: str) -> None:
    long = row(1, "bugs", context=words * 300, pairs=[("Is it old?", "It may be.")])
    corpus = write_rows(tmp_path / "rows.jsonl", [long])
    assert prepare(corpus, tmp_path / "cut", synthesizer_tokenizer, "--seq-length", "320") == 0
    (cut,) = lines(tmp_path / "cut" / "documents" / "bugs.jsonl")
    assert 300 < len(load_tokenizer(synthesizer_tokenizer).encode(cut["text"])) + 2 <= 320
    assert cut["text"].startswith(f" <CON> {words}")


BAD_ROWS: list[tuple[object, str]] = [
    ({"QA_list": [], "rc_name": "x"}, "missing text"),
    ({"context": "text", "rc_name": "x"}, "no pairs"),
    ({"context": "text", "QA_list": [{"Q": "q"}]}, "broken pair"),
    ({"context": "text", "QA_list": ["q"]}, "broken pair"),
    ({"context": "text", "QA_list": [], "rc_name": 3}, "name is no string"),
    ('{"context"', "not JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_a_bad_row_is_named_or_set_aside(
    tmp_path: Path, synthesizer_tokenizer: Path, capsys: pytest.CaptureFixture[str], bad: object, reason: str
) -> None:
    corpus = write_rows(tmp_path / "rows.jsonl", [row(1, "bugs"), bad])
    assert prepare(corpus, tmp_path / "stop", synthesizer_tokenizer) == 3
    assert "rows.jsonl:2" in capsys.readouterr().err
    assert prepare(corpus, tmp_path / "aside", synthesizer_tokenizer, "--on-error", "reject") == 0
    (rejected,) = lines(tmp_path / "aside" / "rejects.jsonl")
    assert rejected["what"] == "row"
    assert reason in rejected["reason"] or reason == "not JSON"


def test_pairs_that_synthesis_could_not_parse_are_left_out_and_counted(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    thinks = "Is it small?\nLet's think step by step."
    pairs = [
        ("What?", "A bug."),
        ("what?", "Again."),
        (" ", "empty"),
        (thinks, "It is.\nTherefore, the answer is yes"),
        (thinks + " ", "no end"),
    ]
    corpus = write_rows(tmp_path / "rows.jsonl", [row(1, "bugs", pairs=pairs), row(2, "none", pairs=[("", "")])])
    assert prepare(corpus, tmp_path / "out", synthesizer_tokenizer) == 0
    manifest = read_manifest(tmp_path / "out" / "manifest.json")
    assert manifest.counts["pairs"] == 2
    assert manifest.rejected["row: no pair left"] == 1
    assert manifest.rejected["pair: repeated question"] == 1
    assert manifest.rejected["pair: no answer after the rationale"] == 1
    assert [path.name for path in (tmp_path / "out" / "documents").iterdir()] == ["bugs.jsonl"]


def test_parquet_rows_give_the_documents_of_json_lines(tmp_path: Path, synthesizer_tokenizer: Path) -> None:
    rows = [row(number, "bugs") for number in range(4)]
    write_rows(tmp_path / "a" / "rows.jsonl", rows)
    (tmp_path / "b").mkdir()
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b" / "rows.parquet")
    texts = []
    for name in ("a", "b"):
        assert prepare(tmp_path / name, tmp_path / f"out-{name}", synthesizer_tokenizer) == 0
        texts.append([line["text"] for line in lines(tmp_path / f"out-{name}" / "documents" / "bugs.jsonl")])
    assert texts[0] == texts[1]


def test_a_second_run_does_nothing_and_other_settings_are_refused(
    tmp_path: Path, synthesizer_tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_rows(tmp_path / "rows.jsonl", [row(1, "bugs")])
    assert prepare(corpus, tmp_path / "out", synthesizer_tokenizer) == 0
    assert prepare(corpus, tmp_path / "out", synthesizer_tokenizer) == 0
    assert "Finished already" in capsys.readouterr().out
    assert prepare(corpus, tmp_path / "out", synthesizer_tokenizer, "--seed", "7") == 2
    assert "seed=0" in capsys.readouterr().err
    assert prepare(corpus, tmp_path / "chat", synthesizer_tokenizer, "--prompt-format", "chat") == 2
    assert "is a chat format" in capsys.readouterr().err


def test_names_that_become_one_file_are_refused(tmp_path: Path, synthesizer_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = write_rows(tmp_path / "rows.jsonl", [row(1, "a/b"), row(2, "a b")])
    assert prepare(corpus, tmp_path / "out", synthesizer_tokenizer) == 3
    assert "a_b.jsonl" in capsys.readouterr().err


def test_documents_of_others_are_kept(tmp_path: Path, synthesizer_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    mine = write_rows(out / "documents" / "mine.jsonl", [row(1, "bugs")])
    for _ in range(2):
        assert prepare(mine, out, synthesizer_tokenizer) == 3
        assert f"{out / 'documents'} exists already and has no manifest" in capsys.readouterr().err
    assert [str(path.relative_to(out)) for path in sorted(out.rglob("*"))] == ["documents", "documents/mine.jsonl"]
    mine = mine.rename(out / "mine.jsonl")
    mine.with_name("documents").rmdir()
    assert prepare(mine, out, synthesizer_tokenizer) == 0
    (out / "manifest.json").unlink()  # as a run leaves it that was killed before its manifest
    assert prepare(mine, out, synthesizer_tokenizer) == 0
    assert len(lines(out / "documents" / "bugs.jsonl")) == 1


def test_an_output_within_the_input_is_refused(tmp_path: Path, synthesizer_tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "rows" / "a.jsonl", [row(1, "bugs")])
    assert prepare(tmp_path / "rows", tmp_path / "rows" / "out", synthesizer_tokenizer) == 2
    assert f"lies in the input {tmp_path / 'rows'}" in capsys.readouterr().err
    assert make_questions(["--input", str(tmp_path / "rows" / "*.jsonl"), "--output-dir", str(tmp_path / "rows")]) == 2
    assert "lies in the input" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "rows").iterdir()] == ["a.jsonl"]
