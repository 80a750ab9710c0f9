"""The template bank: families of styles and the probabilities of layouts, read from YAML files.

Comes in: the path of a bank, and perhaps of one that extends it. Goes out: a `Bank`, checked whole; an error names file and line.
`FAMILIES` is the table of what a bank holds. docs/templates.md explains it to those who write one.
Does not know: examples, or how styles are put together into a document.
"""

import hashlib
import itertools
import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, did_you_mean
from megatron_instruct.templates.numbering import NUMBERINGS
from megatron_instruct.templates.slots import Template, parse
from megatron_instruct.templates.yaml_nodes import MOST_TEXTS, Node, read_yaml

BANKS = Path(__file__).parent / "banks"
"""Folder of the banks that come with the package, LANGUAGE.yaml each."""
LAYOUTS_OF_ONE, LAYOUTS_OF_SEVERAL = ("classic", "dialogue"), ("classic", "dialogue", "numbered", "few_shot", "next_turn")
"""Layouts where the smallest number of pairs of a one-shot example is 1, and where it is 2 or more."""

type Style = Mapping[str, Template]
"""One template by the name of its field; a family of plain texts has the one field "text"."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """What the styles of a family consist of."""

    fields: Mapping[str, frozenset[str]]
    """Each field of a style, and the slots that its text may have."""
    needs: frozenset[str] = frozenset()
    """Slots that every style has in at least one of its fields."""


def _family(needs: str = "", **fields: str) -> Family:
    return Family(fields={name: frozenset(slots.split()) for name, slots in fields.items()}, needs=frozenset(needs.split()))


FAMILIES: dict[str, Family] = {
    "free_form": _family("question", ask="question answer", reply="question answer"),
    "options": _family("question options answer", ask="question options", reply="answer"),
    "chain_of_thought": _family("question rationale answer", ask="question", reply="rationale answer"),
    "options_chain_of_thought": _family("question options rationale answer", ask="question options", reply="rationale answer"),
    "numbered_questions": _family(open="", close=""),
    "next_turn": _family("answer", open="asker answerer", close="asker answerer", reply="answer"),
    "few_shot": _family("question answer", open="", ask="question", reply="answer", close=""),
    "few_shot_explained": _family(
        "question rationale answer", open="", ask="question", reply="rationale answer", plain_reply="answer", close=""
    ),
    "reading_prefixes": _family(text=""),
    "bridges": _family(text=""),
    "inversions": _family(text=""),
    "option_headers": _family(text=""),
    "option_labels": _family(numbering="", label="n", answer="n option"),
    "option_ends": _family(text=""),
    "question_numbers": _family("n", numbering="", question="n", answer="n"),
    "dialogue_headers": _family(text="asker answerer"),
    "speakers": _family(asker="", answerer=""),
    "turns": _family("name", text="name"),
    "none_of_these": _family(text=""),
    "text_separators": _family(text=""),
    "pair_separators": _family(text=""),
    "shot_separators": _family(text=""),
}
"""What a bank holds. Everything of it must be there; a bank that extends another may hold any part of it."""

_MAY_BE_BLANK = {
    ("free_form", "ask"),
    ("numbered_questions", "open"),
    ("next_turn", "open"),
    ("few_shot", "open"),
    ("few_shot", "close"),
    ("few_shot_explained", "open"),
    ("few_shot_explained", "close"),
    ("option_headers", "text"),
    ("question_numbers", "answer"),
}
_PROBABILITIES = ("layouts_of_one", "layouts_of_several", "inversion", "reading_prefix", "bridge")


@dataclass(frozen=True, kw_only=True)
class Probabilities:
    """How often each layout and each optional part is drawn."""

    layouts_of_one: Mapping[str, float]
    """Layouts of a document in which some one-shot example has a single pair."""
    layouts_of_several: Mapping[str, float]
    """Layouts of a document in which every one-shot example has two pairs or more."""
    inversion: float
    """Pairs first, then the text."""
    reading_prefix: float
    """Some words before the text."""
    bridge: float
    """Some words between the text and its pairs."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """All templates of one language."""

    language: str
    version: int
    fingerprint: str
    """SHA-256 of the files that it was read from."""
    families: Mapping[str, tuple[Style, ...]]
    none_of_these: frozenset[str]
    """Phrases that say that no option is right, as `comparable` makes them."""
    probabilities: Probabilities

    def may_say_none_of_these(self, options: Sequence[str]) -> bool:
        """Return False where no option is in `none_of_these`, for nearly all options and without comparing them one by one."""
        joined = "\n".join(options)
        joined = joined if joined.isascii() else unicodedata.normalize("NFKC", joined)
        return "" in self._words_of_none or not self._words_of_none.isdisjoint(_words(joined.casefold()))

    @cached_property
    def _words_of_none(self) -> frozenset[str]:
        """Words such that each phrase of none_of_these has one of them in it."""
        return frozenset(max(_words(phrase), key=len, default="") for phrase in self.none_of_these)  # "": a phrase without words


def _words(text: str) -> list[str]:
    """Return the words of a text, without the full stops that `comparable` may leave out."""
    return text.replace(".", " ").replace("。", " ").split()


def comparable(text: str) -> str:
    """Return the text without what a model that repeats an option often changes: case, blanks, width, a full stop at the end."""
    text = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split()).rstrip(" .。")


def shipped_bank(language: str) -> Path:
    """Return the file of the bank of a language that comes with the package."""
    path = BANKS / f"{language}.yaml"
    known = [file.stem for file in BANKS.glob("*.yaml")]
    if language not in known:
        more = "Or give a bank of your own with --bank."
        raise ConfigError(f"language={language!r} has no bank here{did_you_mean(language, known, more=more)}")
    return path


def load_bank(path: Path, *, extension: Path | None = None) -> Bank:
    """Read a bank, and add the styles and probabilities of `extension` to it. Raises InputError with file and line."""
    root = read_yaml(path)
    entries = root.known_items(("version", "language", "probabilities", *FAMILIES), required=True)
    families = {name: list(_styles(name, entries[name])) for name in FAMILIES}
    probabilities = _probabilities(entries["probabilities"])
    for name, styles in families.items():
        if not styles:
            entries[name].fail(f"{name} is empty; it needs at least one text.")
    files = [path]
    if extension is not None:
        files.append(extension)
        added = read_yaml(extension).known_items(("probabilities", *FAMILIES), required=False)
        for name in FAMILIES.keys() & added.keys():
            families[name] += _styles(name, added[name])
        if "probabilities" in added:
            probabilities |= _probabilities(added["probabilities"], required=False)
    return Bank(
        language=entries["language"].text(),
        version=_version(entries["version"]),
        fingerprint=hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest(),
        families={name: tuple(styles) for name, styles in families.items()},
        none_of_these=frozenset(comparable(style["text"].fill({})) for style in families["none_of_these"]),
        probabilities=Probabilities(**probabilities),
    )


def _version(node: Node) -> int:
    value = node.number()
    if not 1 <= value < math.inf or value != int(value):
        node.fail(f"version {value:g} must be a whole number from 1 on.")
    return int(value)


def _probabilities(node: Node, *, required: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in node.known_items(_PROBABILITIES, required=required).items():
        if name.startswith("layouts"):
            layouts = LAYOUTS_OF_ONE if name == "layouts_of_one" else LAYOUTS_OF_SEVERAL
            weights = {layout: weight.probability() for layout, weight in value.known_items(layouts, required=True).items()}
            if abs(sum(weights.values()) - 1) > 1e-9:
                value.fail(f"the probabilities of {name} add up to {sum(weights.values()):g}; they must add up to 1.")
            found[name] = weights
        else:
            found[name] = value.probability()
    return found


def _styles(name: str, node: Node) -> Iterator[Style]:
    """Yield the styles of a family: each entry of a family with several fields makes every combination of their texts."""
    family = FAMILIES[name]
    if list(family.fields) == ["text"]:
        for text, place in node.texts():
            yield _checked(name, {"text": (text, place)})
        return
    for entry in node.sequence():
        fields = entry.known_items(tuple(family.fields), required=True)
        texts = [[(field, text) for text in fields[field].texts()] for field in family.fields]
        if (count := math.prod(map(len, texts))) > MOST_TEXTS:
            entry.fail(f"{name}: the texts of this entry's fields make {count:,} styles, more than {MOST_TEXTS:,}; split or shorten them.")
        for combination in itertools.product(*texts):
            yield _checked(name, dict(combination))


def _checked(name: str, texts: Mapping[str, tuple[str, Node]]) -> Style:
    """Parse the texts of one style and check it against the rules of its family."""
    family, style = FAMILIES[name], {}
    for field, (text, place) in texts.items():
        try:
            style[field] = parse(text)
        except ValueError as error:
            place.fail(f"{name}: {error}.")
        for slot in style[field].slots - family.fields[field]:
            known = ", ".join(f"{{{slot}}}" for slot in sorted(family.fields[field])) or "none"
            place.fail(f"{name}: {field} {text!r} has the slot {{{slot}}}; slots that it may have: {known}.")
        if not text and (name, field) not in _MAY_BE_BLANK:
            place.fail(f"{name}: an empty {field}; give it a text.")
    place = next(iter(texts.values()))[1]
    for slot in sorted(family.needs - frozenset().union(*(template.slots for template in style.values()))):
        place.fail(f"{name}: the slot {{{slot}}} is missing in {' + '.join(repr(text) for text, _ in texts.values())}.")
    for field in ("reply", "plain_reply"):
        if field in style and not style[field].slots:
            texts[field][1].fail(f"{name}: {field} {texts[field][0]!r} has no slot, so every response would be the same.")
    if "numbering" in style:
        _check_numbering(name, style, {field: place for field, (_, place) in texts.items()})
    return style


def _check_numbering(name: str, style: Style, places: Mapping[str, Node]) -> None:
    numbering = style["numbering"].source
    if numbering not in NUMBERINGS:
        places["numbering"].fail(f"{name}: unknown numbering {numbering!r}{did_you_mean(numbering, NUMBERINGS)}")
    if name == "question_numbers" and numbering == "none":
        places["numbering"].fail("question_numbers: numbering 'none' would number nothing.")
    if name == "option_labels":
        distinct = "n" in style["label"].slots and numbering != "none"
        if not style["answer"].slots & ({"n", "option"} if distinct else {"option"}):
            places["answer"].fail(
                f"option_labels: the answer {style['answer'].source!r} does not tell the options labelled {style['label'].source!r} apart; "
                "use {option}" + (" or {n}." if distinct else ".")
            )
