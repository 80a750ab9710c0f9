"""Filters: each keeps what is good, and drops what is bad for its own reason."""

import json
import random
from pathlib import Path
from unicodedata import normalize

import msgspec
import pytest

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.records import InstructionPair
from megatron_instruct.synthesis.contamination import Contamination, Overlap
from megatron_instruct.synthesis.content_words import plain_words
from megatron_instruct.synthesis.filter_rules import FILTERS
from megatron_instruct.synthesis.filter_settings import DEFAULT_FILTERS, STAGES, FilterSettings
from megatron_instruct.synthesis.filters import Filters
from megatron_instruct.synthesis.second_pass import CHECKS

TEXT = (
    "kluge\n\nA kluge is a clumsy repair that works for the wrong reasons. Hackers write kluges when a deadline is near. "
    "The word was known in the navy of the 1940s, where it meant any device that failed at sea."
)
GOOD = InstructionPair(question="What is a kluge?", answer="A clumsy repair that works for the wrong reasons.")


def reasons(*pairs: InstructionPair, text: str = TEXT, language: str = "en", **settings: object) -> list[str]:
    return [piece.reason for piece in Filters(FilterSettings(**settings), language=language).keep(pairs, text)[1]]  # type: ignore[arg-type]


def pair(question: str, answer: str, *options: str) -> InstructionPair:
    return InstructionPair(question=question, answer=answer, options=options, kind="options" if options else "free_form")


def test_a_good_pair_passes_every_filter() -> None:
    kept, dropped = Filters(FilterSettings(), language="en").keep([GOOD], TEXT)
    assert (kept, dropped) == ([GOOD], [])


BAD = {
    "question too long": pair("What is a kluge " * 30 + "?", GOOD.answer),
    "answer too long": pair(GOOD.question, "A clumsy repair. " * 80),
    "repetition": pair(GOOD.question, "a clumsy repair is a clumsy repair is a clumsy repair is"),
    "question without content": pair("What is it?", GOOD.answer),
    "answer is a question": pair(GOOD.question, "A clumsy repair?"),
    "answer repeats the question": pair("Kluge repair", "kluge repair"),
    "answer says that there is none": pair(GOOD.question, "The kluge is not mentioned in the text."),
    "options repeat or leave no choice": pair(GOOD.question, "repair", "repair", "Repair."),
    "answer is not among the options": pair(GOOD.question, "repair", "device", "sea"),
    "answer not grounded in the text": pair(GOOD.question, "A musical instrument from Hungary."),
    "question not about the text": pair("What is photon pressure?", "A device that failed at sea."),
    "question not about its answer": pair("What did hackers repair?", "Something failed at sea."),
}


@pytest.mark.parametrize("reason", BAD)
def test_each_fault_is_found_for_its_own_reason(reason: str) -> None:
    text = (
        TEXT
        + " Nothing else was ever told of it in all the long years since the boats came home and were broken up for scrap iron and rope, "
        * 2
    )
    assert reasons(BAD[reason], text=text + "Something failed at sea.") == [reason]


def test_duplicates_are_measured_against_the_pairs_kept_before() -> None:
    same = pair("What is the kluge?", "A device that failed at sea.")
    again = pair("Why do hackers write kluges?", GOOD.answer)
    assert reasons(GOOD, same, again) == ["duplicate question", "duplicate answer"]
    bad_first = pair("What is a kluge?", "A musical instrument from Hungary.")
    assert reasons(bad_first, GOOD) == ["answer not grounded in the text"]


def test_options_of_a_good_question_pass() -> None:
    assert reasons(pair("When do hackers write kluges?", "near a deadline", "at sea", "near a deadline")) == []


def test_an_answer_without_content_words_is_not_judged() -> None:
    assert reasons(pair("Does a kluge work?", "No.")) == []


def test_a_language_without_spaces_is_measured_too() -> None:
    text = "水在一百摄氏度沸腾。"
    assert reasons(pair("水在多少度沸腾？", "一百摄氏度"), text=text, language="zh", min_relevance=0.3) == []
    assert reasons(pair("水在多少度沸腾？", "零下三十华氏度"), text=text, language="zh", min_relevance=0.3) == [
        "answer not grounded in the text"
    ]


def test_the_measure_of_a_drop_is_told() -> None:
    (dropped,) = Filters(FilterSettings(), language="en").keep([BAD["answer not grounded in the text"]], TEXT)[1]
    assert dropped.detail == "0.00 of its 3 n-grams"


def test_longer_ngrams_ground_only_what_stands_together() -> None:
    scattered = pair("What do hackers repair?", "A clumsy deadline, wrong navy device.")
    together = pair("What do hackers write?", "A kluge is a clumsy repair that works.")
    assert reasons(scattered, together, filters=("grounding",)) == []
    assert reasons(scattered, together, filters=("grounding",), grounding_ngram=2) == ["answer not grounded in the text"]


def test_of_a_chain_of_thought_the_steps_are_grounded_and_not_the_result() -> None:
    steps = InstructionPair(question="How long?", answer="60 years", rationale="The navy of the 1940s.", kind="chain_of_thought")
    assert reasons(steps, filters=("grounding",)) == []
    assert reasons(msgspec.structs.replace(steps, rationale="Elephants live long lives."), filters=("grounding",)) != []


def test_none_of_the_options_may_be_right() -> None:
    assert reasons(pair("What is a kluge?", "None of these", "a boat", "a rope"), filters=("answer", "options")) == []


GERMAN = "Ein Notbehelf ist eine ungeschickte Lösung, die aus den falschen Gründen funktioniert. Hacker bauen sie, wenn die Zeit knapp ist."
CHINESE = "权宜之计是一种笨拙的修补，它能用，但理由不对。黑客在截止日期临近时写这样的东西。"
RUSSIAN = "Костыль это неуклюжая починка, которая работает не по той причине. Её пишут, когда времени уже не осталось."
IN_ANOTHER = [
    (TEXT, "Was ist ein Kluge?", "Eine Lösung, die nicht schön ist und sich nicht lohnt.", "question in another language"),
    (TEXT, "What is a kluge?", "Eine ungeschickte Lösung, die nicht schön ist.", "answer in another language"),
    (TEXT, "什么是权宜之计？", "A clumsy repair.", "question in another language"),
    (GERMAN, "What is a Notbehelf and how does it work?", "Eine ungeschickte Lösung.", "question in another language"),
    (GERMAN, "Was ist ein Notbehelf?", "Eine ungeschickte Lösung.", None),
    (GERMAN, "Notbehelf?", "Hacker", None),
    (CHINESE, "What is it?", "一种笨拙的修补", "question in another language"),
    (CHINESE, "什么是权宜之计？", "A clumsy repair.", "answer in another language"),
    (CHINESE, "什么是权宜之计？", "一种笨拙的修补", None),
    (CHINESE + "HTTP", "HTTP是什么？", "HTTP", None),
    (RUSSIAN, "Что такое костыль?", "Неуклюжая починка.", None),
    (RUSSIAN, "What is that?", "Неуклюжая починка.", "question in another language"),
    (TEXT, "What did the navy call it?", "Kluge", None),
    (TEXT, "Which year?", "1940", None),
    ("1940 – 1945: 12 / 17", "Which years are these?", "The years of the war.", None),
    ("ኢትዮጵያ", "Which country is it?", "It is Ethiopia.", None),
    (
        "The German word der Notbehelf, die Lösung und das Werk are nouns of the tongue.",
        "Which noun is it?",
        "der Notbehelf, die Lösung",
        None,
    ),
]


@pytest.mark.parametrize(("text", "question", "answer", "reason"), IN_ANOTHER)
def test_a_pair_is_in_the_language_of_its_text(text: str, question: str, answer: str, reason: str | None) -> None:
    assert reasons(pair(question, answer), text=text, filters=("language",)) == ([] if reason is None else [reason])


UNLISTED = [
    ("ja", "日本の首都は東京である。東京には多くの人が住んでいる。", "日本の首都はどこですか？", "東京です。"),
    ("ko", "대한민국의 수도는 서울이다. 가장 높은 산은 한라산이다.", "가장 높은 산은 무엇인가요?", "한라산이에요."),
    ("th", "กรุงเทพมหานครเป็นเมืองหลวงของประเทศไทย", "เมืองใดเป็นเมืองหลวง?", "เมืองหลวงคือกรุงเทพมหานคร"),
    ("ru", RUSSIAN, "Что же такое этот костыль?", "Неуклюжая починка."),
]


@pytest.mark.parametrize(("language", "text", "question", "answer"), UNLISTED)
def test_a_language_without_word_lists_loses_no_right_pair(language: str, text: str, question: str, answer: str) -> None:
    assert reasons(pair(question, answer), text=text, language=language) == []
    filters = Filters(FilterSettings(), language=language)
    assert filters.silent == ["grounding", "relevance"]
    assert filters.passed == [name for name in DEFAULT_FILTERS if name not in ("grounding", "relevance", "contamination")]
    assert Filters(FilterSettings(), language="zh").silent == []


def test_words_keep_their_marks() -> None:
    assert plain_words("राजधानी क्या है?") == ["राजधानी", "क्या", "है"]
    assert plain_words("1\ufe0f\u20e3 snake_case, Größe") == ["1", "snake", "case", "grösse"]
    assert plain_words("ที่นี่ 東京の") == ["ที่", "นี่", "東", "京", "の"]
    assert plain_words(normalize("NFD", "Größe, が, 서울")) == ["grösse", "が", "서", "울"]


def test_what_is_composed_and_what_is_not_are_the_same() -> None:
    text = normalize("NFD", "Die Brücke über die Mühle wurde früher für Züge gebaut, später für Fußgänger geöffnet.")
    right = pair("Für wen wurde die Brücke geöffnet?", "Für Fußgänger, früher für Züge.")
    settings = {"text": text, "language": "en"}
    assert reasons(right, filters=("grounding",), **settings) == []  # type: ignore[arg-type]
    again = pair(normalize("NFD", right.question), normalize("NFD", right.answer))
    assert reasons(right, again, filters=("duplicate",), **settings) == ["duplicate question"]  # type: ignore[arg-type]
    assert reasons(pair("Größe", normalize("NFD", "größe")), filters=("answer",)) == ["answer repeats the question"]


def test_an_evaluation_in_another_script_is_measured_in_its_words(tmp_path: Path) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps({"q": "भारत की राजधानी नई दिल्ली में कौन रहता है", "a": "राजधानी नई दिल्ली"}) + "\n")
    found = Contamination([path], 13)
    assert found.find("राजधानी नई दिल्ली में है") is None, "three words are met by chance"
    assert found.find("बताओ: भारत की राजधानी नई दिल्ली में कौन रहता है?") is not None


def test_each_line_of_a_plain_text_is_a_text_of_an_evaluation(tmp_path: Path) -> None:
    (tmp_path / "exam.txt").write_text("Which of the bugs is told of?\nWho mended the small bug in the end?\n")
    found = Contamination([tmp_path / "exam.txt"], 13)
    assert found.find("Who mended the small bug in the end?") == Overlap("who mended the small bug in the end", "exam.txt")
    assert found.find(f"{'x ' * 3}of the bugs is told of? Who mended the small bug in the {'y ' * 9}") is not None, "the whole counts, too"


def test_a_pair_that_repeats_an_evaluation_is_dropped_with_the_ngram_and_the_file(tmp_path: Path) -> None:
    (tmp_path / "exam.jsonl").write_text(json.dumps({"id": 7, "doc": {"question": f"{WORDS}?", "choices": ["yes", "no"]}}) + "\n")
    (tmp_path / "task.yaml").write_text("- few: [One two three four five six seven]\n")
    settings = FilterSettings(decontaminate=(str(tmp_path / "exam.jsonl"), str(tmp_path / "task.yaml")), filters=("contamination",))
    filters = Filters(settings, language="en")
    copied = pair(f"Say: {WORDS.upper()}, and why?", "yes")
    whole = pair("Which?", "one, two three - four five (six) seven eight")
    near = pair(WORDS.replace("g ", "x "), "no")
    kept, dropped = filters.keep([copied, whole, near], TEXT)
    assert kept == [near]
    assert [piece.detail for piece in dropped] == [
        f"exam.jsonl: {' '.join(WORDS.split()[:13])}",
        "task.yaml: one two three four five six seven",
    ]


WORDS = "a b c d e f g h i j k l m n o p"


def test_any_window_of_thirteen_words_is_found_and_none_of_twelve(tmp_path: Path) -> None:
    path = tmp_path / "exam.txt"
    path.write_text(" ".join(f"word{number}" for number in range(40)))
    found = Contamination([path], 13)
    for start in range(28):
        window = [f"word{number}" for number in range(start, start + 13)]
        assert found.find(f"x {' '.join(window)} y") == Overlap(" ".join(window), "exam.txt")
        assert found.find(f"x {' '.join(window[:12])} y") is None
    assert found.find("") is None


@pytest.mark.parametrize(
    ("content", "message"), [('{"a": "cut', "broken JSON"), ('{"a": "short"}', "no text in it has 6 words"), ("", "empty file")]
)
def test_an_evaluation_file_that_cannot_be_used_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "exam.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        Filters(FilterSettings(decontaminate=(str(path),)), language="en")
    assert str(path) in str(caught.value)


def test_the_default_filters_can_be_named_together_and_added_to() -> None:
    assert FilterSettings(filters=("default", "near_duplicate")).names == (*DEFAULT_FILTERS, "near_duplicate")


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (("near_duplicate", "length"), "change the order"),
        (("judge", "default"), "come after those that look at a pair alone"),
        (("default", "length"), "'length' is named 2 times"),
        (("lenght",), "did you mean 'length'"),
    ],
)
def test_a_list_of_filters_that_cannot_be_worked_off_is_refused(filters: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FilterSettings(filters=filters)


def test_every_filter_of_the_list_has_its_function() -> None:
    assert tuple(FILTERS) == DEFAULT_FILTERS == STAGES[0]
    assert tuple(CHECKS) == STAGES[1]


def test_pairs_given_are_pairs_kept_and_dropped() -> None:
    for seed in range(300):
        draw = random.Random(seed)
        words = [*TEXT.split(), "photon", "？", "漢字", "wird und nicht", "\u2060", "a", "1940"]
        given = [pair(*(" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(draw.randint(2, 4)))) for _ in range(6)]
        kept, dropped = Filters(FilterSettings(), language=draw.choice(["en", "zh", "xx"])).keep(given, TEXT)
        assert len(kept) + len(dropped) == len(given)
        assert all(piece.reason for piece in dropped)


def test_filters_are_those_that_are_named_in_their_order() -> None:
    bad = BAD["answer not grounded in the text"]
    assert reasons(bad, filters=("length",)) == []
    with pytest.raises(ConfigError, match="did you mean 'grounding'"):
        FilterSettings(filters=("groundings",))
    with pytest.raises(ConfigError, match="min_grounding=2"):
        FilterSettings(min_grounding=2)
