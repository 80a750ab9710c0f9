"""Questions made of documents: right, fair, and independent of one another."""

import cProfile
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.evaluation.config import MakeTaskConfig
from megatron_instruct.evaluation.questions import CONTINUATION_CHARACTERS, MASK, Document, _shuffled, make_questions
from megatron_instruct.evaluation.task import main, run


@pytest.fixture
def documents(jargon: list[dict[str, str]]) -> list[Document]:
    return [Document(id=row["id"], text=row["text"], title=row["title"]) for row in jargon[7::30]]


def test_the_right_choice_continues_its_document_and_the_others_come_from_other_documents(documents: list[Document]) -> None:
    made = make_questions(documents, style="continuation", choices=4, seed=1)
    texts = {document.id: " ".join(document.text.split()) for document in documents}
    assert len(made.asked) > 40
    for question in made.asked:
        assert len(set(question.choices)) == len(set(question.sources)) == 4
        for number, (choice, source) in enumerate(zip(question.choices, question.sources, strict=True)):
            assert choice.startswith(" ") and choice.strip() in texts[source]
            assert (source == question.id) == (number == question.gold)
            assert CONTINUATION_CHARACTERS - 24 <= len(choice) - 1 <= CONTINUATION_CHARACTERS, "length gives nothing away"
        assert texts[question.id].startswith(question.query + question.choices[question.gold])


def test_a_definition_does_not_name_its_headword(documents: list[Document]) -> None:
    made = make_questions(documents, style="definition", choices=4, seed=1)
    for question in made.asked:
        title = question.choices[question.gold].strip()
        if len(title) > 3 and title.isalpha():
            assert title.casefold() not in question.query.replace(MASK, "").casefold().split()
    untitled = make_questions([Document(id="1", text="x " * 200)], style="definition", choices=4, seed=1)
    assert untitled.rejected == {"1": "no title"}


def test_every_position_is_right_about_equally_often(jargon: list[dict[str, str]]) -> None:
    documents = [Document(id=row["id"], text=row["text"]) for row in jargon[::2]]
    counts = Counter(question.gold for question in make_questions(documents, style="continuation", choices=4, seed=1).asked)
    expected = counts.total() / 4
    assert sum((count - expected) ** 2 / expected for count in counts.values()) < 16.3, "chi-squared, 3 degrees of freedom, p = 0.001"


def test_a_question_depends_neither_on_the_order_nor_on_how_many_are_asked(documents: list[Document]) -> None:
    calm = make_questions(documents, style="continuation", choices=4, seed=1)
    turned = make_questions(documents[::-1], style="continuation", choices=4, seed=1)
    few = make_questions(documents, style="continuation", choices=4, seed=1, max_questions=10)
    assert sorted(calm.asked, key=lambda question: question.id) == sorted(turned.asked, key=lambda question: question.id)
    assert len(few.asked) == 10 and set(few.asked) <= set(calm.asked) and few.left_over == len(calm.asked) - 10
    assert make_questions(documents, style="continuation", choices=4, seed=2).asked != calm.asked


def test_only_the_questions_that_are_asked_are_made(documents: list[Document]) -> None:
    with cProfile.Profile() as profile:
        few = make_questions(documents, style="continuation", choices=4, seed=1, max_questions=10)
    made = {entry.code.co_name: entry.callcount for entry in profile.getstats() if not isinstance(entry.code, str)}
    assert made["_question"] == len(few.asked) == 10 and few.left_over + len(few.rejected) + 10 == len(documents)


def test_a_question_costs_the_same_among_many_documents(jargon: list[dict[str, str]]) -> None:
    documents = [Document(id=row["id"], text=row["text"]) for row in jargon]
    with cProfile.Profile() as profile:
        made = make_questions(documents, style="continuation", choices=4, seed=1)
    draws = sum(entry.callcount for entry in profile.getstats() if "getrandbits" in str(entry.code))
    assert len(made.asked) > 1000 and draws < 100 * len(made.asked), "a few choices, and their order"


def test_documents_are_drawn_equally_often_each_once() -> None:
    first = Counter(next(_shuffled(5, random.Random(seed))) for seed in range(2000))
    second = Counter(tuple(_shuffled(3, random.Random(seed))) for seed in range(2400))
    assert sorted(first) == list(range(5)) and min(first.values()) > 320
    assert len(second) == 6 and min(second.values()) > 320
    assert sorted(_shuffled(50, random.Random(1))) == list(range(50))


def test_a_language_without_blanks_works() -> None:
    documents = [Document(id=str(number), text="".join(chr(0x4E00 + number * 900 + place) for place in range(400))) for number in range(4)]
    made = make_questions(documents, style="continuation", choices=4, seed=1)
    assert len(made.asked) == 4
    for question in made.asked:
        text = documents[int(question.id)].text
        assert text.startswith(question.query + question.choices[question.gold])


def make(heldout: Path, folder: Path, **settings: Any) -> Any:
    return run(MakeTaskConfig(input=(str(heldout),), output_dir=folder, name="held", **settings))


def test_documents_in_are_questions_and_what_is_set_aside(tmp_path: Path, heldout: Path) -> None:
    path = tmp_path / "heldout.jsonl"
    path.write_text(heldout.read_text(encoding="utf-8") + '{"id": "short", "text": "Short."}\n{broken\n', encoding="utf-8")
    manifest = make(path, tmp_path / "task", max_questions=5)
    rejects = [json.loads(line) for line in (tmp_path / "task" / "rejects.jsonl").read_text().splitlines()]
    assert manifest.counts["questions"] == 5
    assert manifest.counts["documents_in"] == 5 + manifest.counts["left_over"] + len(rejects)
    assert sum(manifest.rejected.values()) == len(rejects)
    assert "broken JSON" in manifest.rejected and "short" in {line.get("id") for line in rejects}


def test_a_second_run_changes_nothing_and_other_settings_are_refused(
    tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(heldout, tmp_path / "task")
    before = {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "task").iterdir()}
    make(heldout, tmp_path / "task")
    assert "Finished already" in capsys.readouterr().out
    assert before == {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in (tmp_path / "task").iterdir()}
    with pytest.raises(ConfigError, match="seed=1234, and this run asks for seed=5"):
        make(heldout, tmp_path / "task", seed=5)
    task = yaml.safe_load((tmp_path / "task" / "held.yaml").read_text())
    assert Path(task["dataset_kwargs"]["data_files"]["test"]).is_absolute()


def test_documents_are_not_overwritten_by_their_questions(tmp_path: Path, heldout: Path) -> None:
    documents = tmp_path / "held.jsonl"
    documents.write_bytes(heldout.read_bytes())
    with pytest.raises(InputError, match=r"held.jsonl exists already and has no manifest"):
        make(documents, tmp_path)
    with pytest.raises(ConfigError, match=r"output .*/task lies in the input"):
        run(MakeTaskConfig(input=(str(tmp_path),), output_dir=tmp_path / "task", name="held"))
    assert [file.name for file in tmp_path.iterdir()] == ["held.jsonl"]
    assert documents.read_bytes() == heldout.read_bytes()


def test_bad_input_of_the_generator(tmp_path: Path, heldout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="letters, digits and underscores"):
        MakeTaskConfig(input=("x",), output_dir=tmp_path, name="a-b")
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    assert main(["--input", str(empty), "--output-dir", str(tmp_path / "t"), "--name", "a"]) == 3
    assert "no question can be made" in capsys.readouterr().err
    assert not (tmp_path / "t" / "manifest.json").exists()
    twice = tmp_path / "twice.jsonl"
    twice.write_bytes(heldout.read_bytes() * 2)
    with pytest.raises(InputError, match=r"the id 'jargon-\d+' is also at .*:1;"):
        make(twice, tmp_path / "t")
