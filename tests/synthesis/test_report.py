"""The page to look at: its numbers are those of the files, it needs nothing else, and no text can become part of it."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest

from megatron_instruct.synthesis.grounded_spans import grounded_spans, pieces
from megatron_instruct.synthesis.report import bars, read_answers
from megatron_instruct.synthesis.throughput import chart, round_up

EVIL = '</div><script>alert(1)</script><img src=x onerror="alert(2)">{{ 7 * 7 }}&lt;b&gt; \u202e'


class Page(HTMLParser):
    """What a browser would make of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.marked: list[str] = []
        self.text = ""
        self._in_mark = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "mark":
            self._in_mark = 1
            self.marked.append("")
        elif tag == "sup":
            self._in_mark = 0

    def handle_endtag(self, tag: str) -> None:
        self._in_mark = self._in_mark if tag != "mark" else 0
        self.text += " " if tag in ("b", "td", "li", "summary") else ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_mark:
            self.marked[-1] += data


@pytest.fixture
def page(bench: Any, synthesize: Callable[..., tuple[int, str]]) -> Callable[..., Page]:
    def make(corpus: Path, output: str = "out", **settings: Any) -> Page:
        path = bench.folder / f"{output}.html"
        status, printed = synthesize(corpus, output, report=path, **settings)
        assert status == 0, printed
        assert f"Report: {path}" in printed
        return Page(path.read_text(encoding="utf-8"))

    return make


def plain(text: str) -> str:
    return " ".join(text.split())


def test_the_page_says_what_the_files_say(bench: Any, page: Callable[..., Page]) -> None:
    bench.script(completions={"t002": "<QUE> What is a bug? <ANS> A purple elephant dancing. </END>", "t003": ""})
    shown = plain(page(bench.corpus(8), rounds=2).text)
    manifest = json.loads((bench.folder / "out" / "manifest.json").read_text())
    for fact in ("8 texts", "75% of them with pairs (6)", "12 pairs kept", "1.50 pairs per text"):
        assert fact in shown
    for reason, count in manifest["rejected"].items():
        assert re.search(rf"{reason} .*? {count} ", shown), reason
    assert "0.00 of its 3 n-grams" in shown, "what was measured about the first of its kind"
    assert "tokens generated a second on average" in shown
    assert "6 of the texts that have pairs, drawn with seed 0" in shown


def test_the_page_is_whole_and_no_text_becomes_part_of_it(bench: Any, page: Callable[..., Page]) -> None:
    row = {"id": f"t000{EVIL}", "text": f"{EVIL} Entry t000 is about a bug. The bug number one is told of."}
    bench.script(completion=f"<QUE> Which bug {EVIL}? <ANS> The bug number one. </END> <QUE> {EVIL}")
    shown = page(bench.corpus([row]), filters="length")
    assert not {"script", "img", "iframe", "object", "link", "b&gt;"} & set(shown.tags)
    names = {name for name, _ in shown.attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href"}
    assert shown.text.count(EVIL) >= 4, "id, text, question and reject, as they are"
    raw = (bench.folder / "out.html").read_text(encoding="utf-8")
    assert "http" not in re.sub(r"https?://www\.w3\.org/\S+", "", raw)
    assert "prefers-color-scheme: dark" in raw


def test_words_that_an_answer_repeats_are_marked_in_the_text(bench: Any, page: Callable[..., Page]) -> None:
    shown = page(bench.corpus(1))
    assert [plain(piece) for piece in shown.marked] == ["is about a bug", "The bug number one"]


def test_the_random_texts_are_the_same_every_time_and_as_many_as_asked_for(bench: Any, page: Callable[..., Page]) -> None:
    corpus = bench.corpus(60)
    drawn = []
    for output, settings in (("a", {}), ("b", {"shard_size": 7}), ("c", {"seed": 1})):
        shown = page(corpus, output, report_examples=5, **settings)
        drawn.append(re.findall(r"\bt\d{3}\b(?=\s*Entry)", shown.text))
        assert len(drawn[-1]) == 5
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_page_of_a_run_that_was_finished_before_says_what_it_cannot_know(bench: Any, page: Callable[..., Page]) -> None:
    corpus = bench.corpus(4)
    first = page(corpus)
    (bench.folder / "out.html").unlink()
    again = page(corpus)
    assert "this page was made later" in again.text
    assert "this page was made later" not in first.text
    assert first.marked == again.marked


def test_a_run_without_any_pair_has_a_page(bench: Any, page: Callable[..., Page]) -> None:
    bench.script(completion="")
    shown = plain(page(bench.corpus(2)).text)
    assert "0% of them with pairs" in shown
    assert "No text has a pair." in shown


TEXT = "A kluge is a clumsy repair that works for the wrong reasons. 水在一百摄氏度沸腾。"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("A Clumsy repair, that works!", ["a clumsy repair that works"]),
        ("kluge", ["kluge"]),
        ("clumsy work", []),
        ("It is a clumsy repair, and for the wrong reasons", ["is a clumsy repair", "for the wrong reasons"]),
        ("一百摄氏度", ["一百摄氏度"]),
        ("", []),
        ("?!", []),
    ],
)
def test_the_spans_of_an_answer(answer: str, found: list[str]) -> None:
    assert [TEXT[start:end] for start, end in grounded_spans(TEXT, answer)] == found


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        ("भारत की राजधानी नई दिल्ली है।", "राजधानी: नई दिल्ली", ["राजधानी नई दिल्ली"]),
        (normalize("NFD", "Die Höhe der Brücke ist groß."), "Höhe der Brücke", [normalize("NFD", "Höhe der Brücke")]),
        ("กรุงเทพเป็นเมืองหลวง", "เมืองหลวง", ["เมืองหลวง"]),
    ],
)
def test_the_spans_of_an_answer_keep_marks_and_find_what_is_composed(text: str, answer: str, found: list[str]) -> None:
    assert [text[start:end] for start, end in grounded_spans(text, answer)] == found


def test_pieces_of_a_text_are_the_text() -> None:
    cut = pieces(TEXT, ["a clumsy repair", "clumsy repair that", "nothing of it"])
    assert "".join(piece.text for piece in cut) == TEXT
    assert [(piece.text, piece.answers) for piece in cut if piece.answers] == [("a ", (1,)), ("clumsy repair", (1, 2)), (" that", (2,))]
    assert "".join(piece.text for piece in pieces("", ["a"])) == ""


def test_the_chart_cuts_pauses_out_and_ends_at_the_last_answer() -> None:
    drawn = chart({100: (1, 50), 101: (1, 150), 5000: (2, 100)})
    assert (drawn.seconds, drawn.pauses, drawn.interval) == (3, 1, 1)
    assert (drawn.mean, round(drawn.requests_per_second, 3)) == (100.0, 1.333)
    assert [label for _, label in drawn.levels] == ["0", "50", "100", "150", "200"]
    long = chart(dict.fromkeys(range(1000), (1, 8)))
    assert (long.interval, long.mean) == (13, 8.0)
    assert all(abs(float(point.split(",")[1])) < 1e-6 for point in long.line.split()), "an even rate is an even line at the top"


def test_the_top_of_the_chart_is_a_round_number_above() -> None:
    assert [round_up(value) for value in (0.3, 1, 3, 41, 799, 801)] == [0.4, 1, 4, 80, 800, 1000]


def test_bars_are_shares_of_the_longest() -> None:
    assert [(bar.share, bar.percent) for bar in bars({"a": 1, "b": 3})] == [(1 / 3, 25.0), (1.0, 75.0)]
    assert [bar.share for bar in bars({"a": 0})] == [0.0]


def test_the_seconds_of_all_shards_are_added_up(tmp_path: Path) -> None:
    for number, noted in enumerate(({"10": [1, 5], "11": [1, 7]}, {"11": [2, 3]})):
        (tmp_path / f"{number}.json").write_text(json.dumps(noted))
    assert read_answers(tmp_path.glob("*.json")) == {10: (1, 5), 11: (3, 10)}


def test_a_report_takes_the_place_of_no_data(bench: Any, synthesize: Callable[..., tuple[int, str]], corpus: Path) -> None:
    before = corpus.read_bytes()
    status, printed = synthesize(corpus, "out", report=corpus)
    assert (status, f"report={corpus} is written as a page; give it a name that ends in .html" in printed) == (2, True), printed
    assert (corpus.read_bytes(), (bench.folder / "out").exists()) == (before, False)
