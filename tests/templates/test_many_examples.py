"""A thousand random examples of every shape, and their tokens: nothing is lost, roles tile the document and hold after tokenization."""

import itertools
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from megatron_instruct.errors import InputError
from megatron_instruct.preprocessing.documents import Spans
from megatron_instruct.preprocessing.roles import STRADDLES, token_roles
from megatron_instruct.records import ROLE_CODES, AugmentedText, InstructionPair, MShotExample, OneShotExample, PairKind
from megatron_instruct.templates.bank import Bank, load_bank, shipped_bank
from megatron_instruct.templates.rendering import render
from megatron_instruct.tokenizer import load_tokenizer

KINDS: tuple[PairKind, ...] = ("free_form", "options", "chain_of_thought", "options_chain_of_thought")
WORDS = [
    "apple",
    "Ärger",
    "<QUE>",
    "</END>",
    "{question}",
    "%s",
    "}{",
    "漢字",
    "🙂",
    "\\n",
    "</s>",
    "42",
    "none",
    "a\nb",
    "Let's think",
    "---",
]


@cache
def bank(language: str) -> Bank:
    return load_bank(shipped_bank(language))


def random_text(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(1, 6)))


def random_pair(generator: random.Random) -> InstructionPair:
    kind = generator.choice(KINDS)
    options = tuple(random_text(generator) for _ in range(generator.randint(0, 5))) if "options" in kind else ()
    answer = (
        generator.choice(options) if options and generator.random() < 0.8 else generator.choice([random_text(generator), "None of these"])
    )
    rationale = random_text(generator) if "chain" in kind and generator.random() < 0.9 else None
    return InstructionPair(question=random_text(generator), answer=answer, kind=kind, options=options, rationale=rationale)


def random_example(number: int) -> MShotExample:
    generator = random.Random(number)
    most = 40 if number % 50 == 0 else 5
    shots = tuple(
        OneShotExample(
            id=f"{number}.{shot}",
            text=f" {random_text(generator)}\n",
            pairs=tuple(random_pair(generator) for _ in range(generator.randint(0, most))),
        )
        for shot in range(generator.randint(1, 3))
    )
    return MShotExample(id=f"{number}", shots=shots)


def spans_of(document: AugmentedText, role: str) -> list[str]:
    return [document.text[span.start : span.end] for span in document.spans if span.role == role]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_a_thousand_examples_lose_nothing(language: str) -> None:
    seen: Counter[str] = Counter()
    for number in range(1000):
        example = random_example(number)
        rendering = render(example, bank(language), seed=3)
        document = rendering.document
        assert document.text.strip()
        assert (document.spans[0].start, document.spans[-1].end) == (0, len(document.text))
        assert all(one.end == other.start and one.role != other.role for one, other in itertools.pairwise(document.spans))
        assert spans_of(document, "context") == [shot.text for shot in example.shots]
        assert rendering.pairs + len(rendering.set_aside) == sum(len(shot.pairs) for shot in example.shots)
        responses = spans_of(document, "response")
        assert len(responses) == rendering.pairs
        aside = {id(one.pair) for one in rendering.set_aside}
        kept = [pair for shot in example.shots for pair in shot.pairs if id(pair) not in aside]
        for pair, response in zip(kept, responses, strict=True):
            assert (pair.rationale or "") in response
            assert pair.question in document.text
            assert all(option in document.text for option in pair.options)
            if not pair.options and (pair.rationale or rendering.layout != "classic"):
                assert pair.answer in response, "only in the classic layout some styles ask for the question instead"
        smallest = min(
            (count for count in (sum(id(pair) not in aside for pair in shot.pairs) for shot in example.shots) if count), default=0
        )
        assert (rendering.layout == "raw") == (smallest == 0)
        assert smallest != 1 or rendering.layout in ("classic", "dialogue")
        seen[rendering.layout] += 1
        seen.update(one.reason for one in rendering.set_aside)
        seen["none of these"] += any(pair.answer == "None of these" and pair.options for pair in kept)
    expected = {"raw", "classic", "dialogue", "numbered", "few_shot", "next_turn"}
    expected |= {"answer is no option", "options missing", "repeated option", "rationale missing"}
    assert expected <= seen.keys()
    assert seen["none of these"] or language == "zh", "every branch was taken"


def plain_examples() -> Iterator[MShotExample]:
    for number in range(80):
        pairs = tuple(
            InstructionPair(
                question=f"Which one is {place}?",
                answer=f"answer {place}",
                kind=KINDS[(number + place) % 4],
                options=("north", f"answer {place}", "South") if "options" in KINDS[(number + place) % 4] else (),
                rationale=f"Thing {place} says so" if "chain" in KINDS[(number + place) % 4] else None,
            )
            for place in range(number % 4 + 1)
        )
        yield MShotExample(
            id=str(number), shots=(OneShotExample(id="t", text="Some text, 漢字 and more.", pairs=pairs),) * (number % 2 + 1)
        )


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", ["tokenizer_folder", "smollm2_folder"])
def test_the_tokens_marked_response_are_the_responses(name: str, language: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(name)
    documents = [render(example, bank(language), seed=5).document for example in plain_examples()]
    texts = [document.text for document in documents]
    flat = load_tokenizer(folder).encode_flat(texts, ends=True)
    spans = {place: Spans(document.ends, document.roles) for place, document in enumerate(documents)}
    roles = token_roles(texts, spans, flat) & (STRADDLES - 1)
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = 0
    for document, length in zip(documents, flat.lengths, strict=True):
        tokens = slice(first, first + int(length))
        first += int(length)
        offsets = library.encode(document.text, add_special_tokens=False).offsets
        assert len(offsets) == length
        is_response = (roles[tokens] == ROLE_CODES["response"]).tolist()
        runs = [list(run) for marked, run in itertools.groupby(zip(offsets, is_response, strict=True), key=lambda one: one[1]) if marked]
        recovered = [document.text[run[0][0][0] : run[-1][0][1]].strip() for run in runs]
        assert recovered == [response.strip() for response in spans_of(document, "response")]
    assert np.isin(roles, [ROLE_CODES[role] for role in ("context", "instruction", "response", "glue")]).all()


def test_rendering_in_a_program_reads_no_file_and_needs_no_reader_of_files() -> None:
    root = Path(__file__).resolve().parents[2]
    document = (root / "docs" / "templates.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    record = {"id": "a", "shots": [{"id": "a", "text": "Raw.", "pairs": [{"question": "q?", "answer": "an answer"}]}]}
    code = f"record = {record}\n{document}\nimport sys\nassert rendering.pairs == 1\n"
    code += "loaded = [name for name in sys.modules if name.startswith('megatron_instruct.')]\n"
    code += "assert not [name for name in loaded if 'corpora' in name or 'files' in name or 'manifest' in name], loaded\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr


def test_records_are_taken_alike_whether_or_not_they_are_checked_field_by_field() -> None:
    for number in range(200):
        value = random_example(number).to_json()
        assert MShotExample.from_json(value, where="x:1") == MShotExample._checked_from_json(value, where="x:1") == random_example(number)
    for change in ({"options": None}, {"provenance": None}, {"kind": "free_form", "more": 1}):
        value = {"id": "a", "shots": [{"id": "a", "text": "t", "pairs": [{"question": "q", "answer": "b", **change}]}]}
        assert MShotExample.from_json(value, where="x:1").shots[0].pairs[0].options == ()
    for change in ({"answer": " "}, {"kind": "odd"}, {"rationale": 1}, {"options": "ab"}, {"options": [1]}):
        value = {"id": "a", "shots": [{"id": "a", "text": "t", "pairs": [{"question": "q", "answer": "b", **change}]}]}
        with pytest.raises(InputError, match=f"x:1: .*{next(iter(change))}"):
            MShotExample.from_json(value, where="x:1")
