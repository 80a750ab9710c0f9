"""The example data and the scripts: questions from forms of sentences, answers out of the context, a dry run that describes its run."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
POD = """=head1 NAME

perlfaq - x

=head2 Why is C<int()> B<broken>?

Your C<int()> is most probably working just fine. To see the reason, print the number with more digits.

    print int(0.6);

The numbers are written in binary. If a number has no end in binary, it is cut off.

=head2 Read this

No question here. None at all. Really.
"""
RST = """
What is Python?
---------------

Python is an interpreted language.  See the `guide
<https://example.org/guide>`_ for ``more`` of it.  The interpreter uses a stack.

.. only:: html

   nothing

"""


@pytest.fixture
def example_data(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of examples/synthesizer_data."""
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "synthesizer_data"))
    import pairs
    import sources

    return pairs, sources


def test_questions_and_prose_of_pod_and_rst_are_found(example_data: Any) -> None:
    _, sources = example_data
    first, second = sources.pod_questions(POD)
    assert first.heading == "Why is int() broken?"
    assert first.paragraphs[1] == "The numbers are written in binary. If a number has no end in binary, it is cut off."
    assert second.heading == "Read this"
    (entry,) = sources.rst_questions(RST)
    assert entry.heading == "What is Python?"
    assert entry.paragraphs == ("Python is an interpreted language. See the guide for more of it. The interpreter uses a stack.",)


def test_a_row_has_the_authors_question_and_questions_made_from_sentences(example_data: Any) -> None:
    pairs, sources = example_data
    row = pairs.faq_row(next(sources.pod_questions(POD)), "perl")
    assert [(pair["Q"], pair["A"]) for pair in row["QA_list"]] == [
        ("Why is int() broken?", "Your int() is most probably working just fine."),
        ("How do you see the reason?", "To see the reason, print the number with more digits."),
        ("How are the numbers written?", "The numbers are written in binary."),
        ("What happens if a number has no end in binary?", "If a number has no end in binary, it is cut off."),
    ]
    assert all(pair["A"] in row["context"] for pair in row["QA_list"])


@pytest.mark.parametrize(
    ("sentence", "question"),
    [
        ("The parser uses a table of states.", "What does the parser use?"),
        ("RTSP was developed by three companies.", "Who developed RTSP?"),
        ("A stack is used to keep return addresses.", "What is a stack used for?"),
        ("You can also stop the job by pressing a key.", "How can you stop the job?"),
        ("The disk is slow because it must turn.", "Why is the disk slow?"),
        ("It uses a table of states.", None),
        ("Nothing here asks anything at all.", None),
    ],
)
def test_forms_of_sentences_ask_their_question(example_data: Any, sentence: str, question: str | None) -> None:
    assert example_data[0]._question(sentence) == question


def test_sources_are_pinned_and_evaluations_held_out() -> None:
    known = yaml.safe_load((ROOT / "examples" / "synthesizer_data" / "sources.yaml").read_text(encoding="utf-8"))
    assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for source in known.values() for digest in source["files"].values())
    assert all(source["licence"] for source in known.values())
    assert {name for name, source in known.items() if source.get("held_out")} == {"python-faq", "jargon"}


def test_the_7b_script_describes_its_run_without_gpus_model_or_data() -> None:
    command = ["bash", str(ROOT / "examples" / "tune_synthesizer_7b.sh"), "--dry-run"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}, check=False)
    assert result.returncode == 0, result.stderr
    assert "Model: 7.242 billion parameters (mistral)" in result.stdout
    assert "Batch: 4 sequences of 4,096 = 16,384 tokens a step" in result.stdout
    assert "--prepend-bos --append-eod --pack-sequence-length 4096" in result.stdout
