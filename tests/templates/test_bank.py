"""The banks that come with the package are whole and varied; a bank of one's own is checked, with file and line."""

from functools import cache
from pathlib import Path

import pytest
import yaml

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.templates.bank import FAMILIES, Bank, Style, load_bank, shipped_bank
from megatron_instruct.templates.numbering import NUMBERINGS, letters

AT_LEAST = {
    "free_form": 79,
    "options": 48,
    "chain_of_thought": 210,
    "options_chain_of_thought": 240,
    "numbered_questions": 11,
    "next_turn": 15,
    "few_shot": 10,
    "few_shot_explained": 10,
    "reading_prefixes": 100,
    "bridges": 168,
    "option_headers": 16,
    "option_labels": 87,
    "option_ends": 3,
    "question_numbers": 64,
    "dialogue_headers": 15,
    "speakers": 50,
    "inversions": 2,
    "none_of_these": 2,
    "shot_separators": 2,
}
"""How many styles the paper's reference has of each family (for prefixes and bridges, half of those are empty)."""
SAMPLE = {
    "question": "Why?",
    "answer": "So.",
    "options": "A. So.\nB. No.",
    "rationale": "It follows.",
    "asker": "X",
    "answerer": "Y",
    "name": "Z",
    "option": "So.",
}


@cache
def shipped(language: str) -> Bank:
    return load_bank(shipped_bank(language))


def seen(family: str, style: Style) -> tuple[str, ...]:
    """What a reader sees of a style; how an answer repeats a label is not counted as variety."""
    numbering = NUMBERINGS[style["numbering"].text] if "numbering" in style else str
    counted = [name for name in style if name != "numbering" and (family not in ("option_labels", "question_numbers") or name != "answer")]
    return tuple(style[name].fill({**SAMPLE, "n": numbering(number)}) for name in counted for number in (1, 2, 4))


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("family", FAMILIES)
def test_distinct_renderings_are_as_many_as_the_reference_has(language: str, family: str) -> None:
    styles = shipped(language).families[family]
    rendered = [seen(family, style) for style in styles]
    assert len(set(rendered)) >= AT_LEAST.get(family, 1)
    if family != "option_labels":
        assert len(set(rendered)) == len(rendered), "a text stands in the bank twice"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_probabilities_are_those_of_the_method(language: str) -> None:
    probabilities = shipped(language).probabilities
    assert probabilities.layouts_of_one == {"classic": 0.95, "dialogue": 0.05}
    others = dict.fromkeys(("dialogue", "numbered", "few_shot", "next_turn"), 0.05)
    assert probabilities.layouts_of_several == {"classic": 0.8, **others}
    assert (probabilities.inversion, probabilities.reading_prefix, probabilities.bridge) == (0.05, 0.5, 0.5)


def test_some_free_form_styles_ask_for_the_question() -> None:
    styles = shipped("en").families["free_form"]
    kinds = {("answer" in style["ask"].slots, style["reply"].slots) for style in styles}
    question, answer = frozenset({"question"}), frozenset({"answer"})
    assert kinds == {(False, answer), (True, question), (False, question | answer), (False, question)}


@pytest.mark.parametrize("name", [name for name in NUMBERINGS if name != "none"])
def test_numberings_never_end_and_never_repeat(name: str) -> None:
    numerals = [NUMBERINGS[name](number) for number in range(1, 2001)]
    assert len(set(numerals)) == 2000
    assert all(numerals)


@pytest.mark.parametrize(
    ("name", "number", "numeral"),
    [
        ("upper_letters", 26, "Z"),
        ("upper_letters", 27, "AA"),
        ("lower_letters", 703, "aaa"),
        ("lower_roman", 1949, "mcmxlix"),
        ("upper_roman", 4, "IV"),
        ("chinese", 10, "十"),
        ("chinese", 19, "十九"),
        ("chinese", 20, "二十"),
        ("chinese", 105, "一百零五"),
        ("chinese", 110, "一百一十"),
        ("chinese", 1010, "一千零一十"),
        ("chinese", 2000, "二千"),
        ("heavenly_stems", 3, "丙"),
    ],
)
def test_numerals(name: str, number: int, numeral: str) -> None:
    assert NUMBERINGS[name](number) == numeral
    assert letters(number, "0") == "0" * number, "any set of symbols does"


def changed_bank(tmp_path: Path, old: str, new: str) -> tuple[Path, int]:
    """Write the English bank with one change; return the file and the line of the change."""
    content = shipped_bank("en").read_text(encoding="utf-8")
    assert content.count(old) >= 1, old
    path = tmp_path / "bank.yaml"
    path.write_text(content.replace(old, new, 1), encoding="utf-8")
    return path, content[: content.index(old)].count("\n") + 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            '"Someone asks: {question}\\n',
            '"Someone asks: {qestion}\\n',
            r"the slot \{qestion\}; slots that it may have: \{answer\}, \{question\}",
        ),
        ('"Someone asks: {question}\\n', '"Someone asks: {question\\n', r"a single '\{'"),
        ('"Going by the text: {question}\\n"', '"Going by the text.\\n"', r"the slot \{question\} is missing"),
        ('"Text:\\n"', "12", r"'12' is no text for YAML; put it in quotes"),
        ('"Text:\\n"', '""', r"an empty text"),
        ('"Text:\\n"', "{jion: []}", r"unknown name 'jion'; did you mean 'join'"),
        ("inversion: 0.05", "inversion: 5", "5 is no probability"),
        ("inversion: 0.05", "inversion: often", "a number is needed here"),
        ("{classic: 0.95, dialogue: 0.05}", "{classic: 0.95, dialogue: 0.06}", "add up to 1.01"),
        ("{classic: 0.95, dialogue: 0.05}", "{classic: 0.95, dialog: 0.05}", "unknown name 'dialog'; did you mean 'dialogue'"),
        ("{classic: 0.95, dialogue: 0.05}", "{classic: 1}", "'dialogue' missing"),
        ("numbering: greek", "numbering: greeek", "unknown numbering 'greeek'; did you mean 'greek'"),
        ('answer: "{option}"', 'answer: "{n}"', r"does not tell the options .* apart; use \{option\}"),
        ("option_headers:", "option_header:", "unknown name 'option_header'; did you mean 'option_headers'"),
        ("version: 2", "version: 0", "must be a whole number from 1 on"),
        ("version: 2", "version: inf", "must be a whole number from 1 on"),
        ("version: 2", "version: nan", "must be a whole number from 1 on"),
        ('"Text:\\n"', '"Te\\0xt"', "holds a NUL character, which no document may"),
        ('option_ends: ["\\n"', 'option_headers: ["\\n"', "'option_headers' stands here a second time"),
        ('turns: ["{name}: "', 'turns: ]["{name}: "', "is not valid YAML"),
    ],
)
def test_a_mistake_is_named_with_file_and_line(tmp_path: Path, old: str, new: str, words: str) -> None:
    path, line = changed_bank(tmp_path, old, new)
    with pytest.raises(InputError, match=words) as caught:
        load_bank(path)
    if "not valid YAML" not in words:
        assert str(caught.value).startswith(f"{path}:{line}: ")


def test_what_a_style_must_have(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text('free_form:\n  - ask: "{question}"\n    reply: "Yes"\n')
    with pytest.raises(InputError, match=r"mine.yaml:3: free_form: reply 'Yes' has no slot"):
        load_bank(shipped_bank("en"), extension=path)
    path.write_text('free_form:\n  - ask: "{question}"\n')
    with pytest.raises(InputError, match=r"mine.yaml:2: 'reply' missing"):
        load_bank(shipped_bank("en"), extension=path)
    path.write_text("bridges:\n  join: " + "[[" * 3 + "]]" * 3 + "\n")
    with pytest.raises(InputError, match=r"mine.yaml:"):
        load_bank(path)
    path.write_text("")
    with pytest.raises(InputError, match=r"mine.yaml is empty"):
        load_bank(path)
    with pytest.raises(InputError, match=r"absent.yaml: no such file"):
        load_bank(tmp_path / "absent.yaml")


def test_an_explosion_of_texts_is_refused(tmp_path: Path) -> None:
    many = yaml.safe_dump([f"{number} " for number in range(100)], default_flow_style=True, width=10_000)
    path = tmp_path / "big.yaml"
    path.write_text(f"bridges:\n  join: [&m {many.strip()}, *m, *m, *m, *m, *m]\n")
    with pytest.raises(InputError, match=r"big.yaml:2: this makes more than 20,000 texts"):
        load_bank(shipped_bank("en"), extension=path)
    path.write_text("bridges: &b\n  - *b\n")
    with pytest.raises(InputError, match=r"big.yaml:\d+: nested more than 20 deep"):
        load_bank(shipped_bank("en"), extension=path)
    path.write_text("bridges: " + "[" * 1000 + "]" * 1000)
    with pytest.raises(InputError, match=r"big.yaml is nested too deeply to be read"):
        load_bank(shipped_bank("en"), extension=path)
    path.write_text(f"free_form:\n  - ask: {{join: [&m {many.strip()}, *m, '{{question}}']}}\n    reply: [&r '{{answer}}', *r, *r]\n")
    with pytest.raises(InputError, match=r"big.yaml:2: free_form: the texts of this entry's fields make 30,000 styles, more than 20,000"):
        load_bank(shipped_bank("en"), extension=path)


def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes('bridges:\n  - "ä"\n  - "caf'.encode() + b'\xe9"\n')
    with pytest.raises(InputError, match=r"mine.yaml:3 is not UTF-8 text: invalid continuation byte; save the file as UTF-8"):
        load_bank(shipped_bank("en"), extension=path)


def test_an_extension_adds_at_the_end_and_changes_the_fingerprint(tmp_path: Path) -> None:
    base = shipped("en")
    path = tmp_path / "mine.yaml"
    path.write_text('probabilities: {bridge: 1}\nbridges:\n  - "Off we go:\\n"\n')
    bank = load_bank(shipped_bank("en"), extension=path)
    assert bank.families["bridges"][:-1] == base.families["bridges"]
    assert bank.families["bridges"][-1]["text"].source == "Off we go:\n"
    assert (bank.probabilities.bridge, bank.probabilities.reading_prefix) == (1, 0.5)
    assert bank.fingerprint != base.fingerprint


def test_an_unknown_language_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"language='fr' has no bank here; known: en, zh"):
        shipped_bank("fr")


def test_the_documentation_counts_what_is_there_and_its_example_loads(tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "templates.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")]
    told = {name.strip(" `"): row for row in rows if len(row) == 4 for name in row[0].split(",")}
    for column, language in ((2, "en"), (3, "zh")):
        counts = {name: len({seen(name, style) for style in styles}) for name, styles in shipped(language).families.items()}
        separators = ", ".join(str(counts.pop(f"{part}_separators")) for part in ("text", "pair", "shot"))
        assert told["text_separators"][column] == separators
        assert {name: int(told[name][column]) for name in counts} == counts
    example = tmp_path / "mine.yaml"
    example.write_text(text.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    bank = load_bank(shipped_bank("en"), extension=example)
    assert bank.families["free_form"][-1]["ask"].source == "Nurse, {question}\n"
