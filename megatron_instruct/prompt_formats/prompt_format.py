"""Prompt formats: how a text is put to a synthesizer and how its pairs are written. Data: formats/NAME.yaml, or a user's own file.

Comes in: a name or a path. Goes out: a checked `PromptFormat`; what is wrong in a file is an error that names file and line.
Does not know: tokenizers, models.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_instruct.errors import ConfigError, InputError, did_you_mean
from megatron_instruct.prompt_formats.format_file import plain_value, read_fields
from megatron_instruct.prompt_formats.parsing import PairLayout, kind_of, parse_pairs, write_pairs
from megatron_instruct.records import InstructionPair, OneShotExample
from megatron_instruct.templates.yaml_nodes import Node, read_yaml

StructuredOutput = Literal["none", "form", "extractive"]
FORMATS = Path(__file__).parent / "formats"
"""Folder of the formats that come with the package, NAME.yaml each."""
_SLOT = re.compile(r"\{(text|question|answer)\}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What structured output forces on each completion."""

    pairs: int = 2
    """Pairs asked of a text."""
    questions: tuple[str, ...] = (r"[^\n?<]{8,160}\?",)
    """Regular expressions of the questions, one for each pair; the last one holds for all further pairs."""
    answer: str = r"[^\n<]{1,400}"
    """Regular expression of an answer; of no effect where answers are taken from the text."""
    shortest: int = 25
    """Characters of the shortest sentence of the text that may be an answer."""
    longest: int = 260
    """Characters of the longest one."""
    no_answer: tuple[str, ...] = ()
    """Beginnings of sentences that are no answers, such as "See also"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeRequest:
    """How a model is asked whether a pair is right."""

    request: str
    """The user's message; holds {text}, {question} and {answer}."""
    keep: str
    """First word of a verdict that keeps the pair."""
    drop: str
    """First word of a verdict that drops it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptFormat:
    """How a text is put to a synthesizer and how its pairs are written."""

    name: str
    fingerprint: str
    """SHA-256 of the file."""
    kind: Literal["markers", "chat"]
    """markers: plain text between BOS and EOS. chat: turns of the model's own chat template."""
    language: str
    pair: PairLayout
    text: str = ""
    """markers: what a text becomes; holds {text}."""
    hide: tuple[str, ...] = ()
    """Further strings that must not be met in a text; like the markers of the format, they are made harmless there."""
    system: str = ""
    """chat: the system message; left out when empty, and put in front of the first text where the template takes none."""
    request: str = ""
    """chat: the user's message; holds {text}."""
    second_answer: str = ""
    """chat: the user's message that asks for the answer to a question alone; holds {text} and {question}. For the filter second_answer."""
    judge: JudgeRequest | None = None
    """chat: for the filter judge."""
    template_arguments: Mapping[str, str | bool | int] = field(default_factory=dict)
    """chat: what the template is told besides, so that prompts do not depend on the day, say."""
    examples: tuple[OneShotExample, ...] = ()
    """chat: shown in front of every text."""
    structured_output: StructuredOutput = "none"
    structure: Structure = Structure()

    @property
    def markers(self) -> tuple[str, ...]:
        """The strings that make no sense of a text where they are met in it."""
        around = _SLOT.split(self.text)[::2] if self.kind == "markers" else []
        own = (self.pair.question, self.pair.answer, self.pair.end) if self.kind == "markers" else ()
        return tuple(dict.fromkeys(part for part in (*(piece.strip() for piece in around), *own, *self.hide) if part.strip()))


def fill(template: str, **values: str) -> str:
    """Put values in the place of {text}, {question} and {answer}; slots that a value spells are left as they are."""
    return _SLOT.sub(lambda match: values[match[1]], template)


def load_prompt_format(name_or_path: str, structured_output: StructuredOutput | None = None) -> PromptFormat:
    """Load a format by its name, or from a file that ends in .yaml.

    structured_output: in the place of what the file says. Raises ConfigError for an unknown name, InputError for a file with a fault.
    """
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"prompt_format {path}: no such file.")
    else:
        path = FORMATS / f"{name_or_path}.yaml"
        names = sorted(file.stem for file in FORMATS.glob("*.yaml"))
        if name_or_path not in names:
            more = "Or give the path of a .yaml file."
            raise ConfigError(f"prompt_format={name_or_path!r} is no known format{did_you_mean(name_or_path, names, more=more)}")
    format_ = _prompt_format(read_yaml(path, "a prompt format"), name=path.stem, fingerprint=hashlib.sha256(path.read_bytes()).hexdigest())
    return format_ if structured_output is None else dataclasses.replace(format_, structured_output=structured_output)


def _prompt_format(node: Node, *, name: str, fingerprint: str) -> PromptFormat:
    others = {
        "pair": _layout,
        "structure": _structure,
        "judge": _judge,
        "template_arguments": lambda child: {name: plain_value(value) for name, value in child.items().items()},
        "examples": lambda child: tuple(_example(item, number) for number, item in enumerate(child.sequence(), 1)),
    }
    format_ = PromptFormat(
        name=name, fingerprint=fingerprint, **read_fields(node, PromptFormat, others=others, left_out=("name", "fingerprint"))
    )
    needed: dict[str, tuple[str, ...]] = {"text": ("text",)} if format_.kind == "markers" else {"request": ("text",)}
    if format_.second_answer:
        needed["second_answer"] = ("text", "question")
    entries = node.items()
    for key, slots in needed.items():
        _check_slots(getattr(format_, key), key, slots, entries.get(key, node))
    for key in _CHAT_ONLY if format_.kind == "markers" else ("text",):
        if key in entries:
            entries[key].fail(f"{key!r} has no meaning where kind is {format_.kind}; remove it, or change the kind.")
    for number, example in enumerate(format_.examples):
        _check_example(example, format_.pair, entries["examples"].sequence()[number])
    return format_


_CHAT_ONLY = ("system", "request", "second_answer", "judge", "template_arguments", "examples")


def _check_slots(text: str, key: str, slots: tuple[str, ...], node: Node) -> None:
    for slot in slots:
        if text.count(f"{{{slot}}}") != 1:
            node.fail(f"{key}={text!r} must hold {{{slot}}} exactly once.")
    for slot in _SLOT.findall(text):
        if slot not in slots:
            node.fail(f"{key}={text!r} holds {{{slot}}}, which it has no value for; remove it.")


def _layout(node: Node) -> PairLayout:
    layout = PairLayout(**read_fields(node, PairLayout))
    markers = (layout.question, layout.answer, layout.end)
    if len(set(markers)) != 3 or not all(markers):
        node.fail(f"question, answer and end must be three different markers, not {markers}.")
    for first in markers:
        for second in markers:
            if first != second and first in second:
                node.fail(f"the marker {second!r} holds the marker {first!r}, so that they cannot be told apart; change one.")
    for key in ("options", "think", "therefore"):
        if not getattr(layout, key).strip():
            node.items()[key].fail(f"{key!r} is empty, so that nothing tells such pairs from others; write the words of its line.")
    pairs = tuple(InstructionPair(question=f"~{number}", answer=f"~{number}") for number in (1, 2))
    written = write_pairs(pairs, layout)
    parsed = parse_pairs(written, layout, stopped=True)
    if parsed.pairs != pairs or parsed.dropped:
        node.fail(f"pairs written so, {written!r}, do not come back when they are read; change the markers, or what stands around them.")
    return layout


def _structure(node: Node) -> Structure:
    structure = Structure(**read_fields(node, Structure))
    entries = node.items()
    for key, patterns in (("questions", structure.questions), ("answer", (structure.answer,))):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                entries[key].fail(f"{pattern!r} is no regular expression: {error}.")
    if not structure.questions or structure.pairs < 1:
        node.fail("at least one pair, and the expression of its question, are needed.")
    return structure


def _judge(node: Node) -> JudgeRequest:
    judge = JudgeRequest(**read_fields(node, JudgeRequest))
    _check_slots(judge.request, "request", ("text", "question", "answer"), node.items()["request"])
    keep, drop = judge.keep.casefold(), judge.drop.casefold()
    if keep.startswith(drop) or drop.startswith(keep):
        node.fail(f"keep={judge.keep!r} and drop={judge.drop!r} begin alike, so that verdicts cannot be told apart.")
    return judge


@dataclass(frozen=True, kw_only=True)
class _WrittenPair:
    """A pair as an example of a format writes it."""

    question: str
    answer: str
    options: tuple[str, ...] = ()
    rationale: str | None = None


def _example(node: Node, number: int) -> OneShotExample:
    entries = node.known_items(("text", "pairs"), required=True)
    written = [_WrittenPair(**read_fields(child, _WrittenPair)) for child in entries["pairs"].sequence()]
    pairs = tuple(InstructionPair(**dataclasses.asdict(pair), kind=kind_of(pair.options, pair.rationale)) for pair in written)
    return OneShotExample(id=f"example {number}", text=entries["text"].text(), pairs=pairs)


def _check_example(example: OneShotExample, layout: PairLayout, node: Node) -> None:
    """Refuse an example that would teach a form that the parser does not read."""
    parsed = parse_pairs(write_pairs(example.pairs, layout), layout, stopped=True)
    for number, pair in enumerate(example.pairs):
        if pair not in parsed.pairs:
            pair_node = node.items()["pairs"].sequence()[number]
            why = f" ({parsed.dropped[0].reason})" if parsed.dropped else ""
            pair_node.fail(f"this pair does not come back from the form that it is written in{why}; change its texts or the markers.")
