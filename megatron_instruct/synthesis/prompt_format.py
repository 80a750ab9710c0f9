"""Prompt formats: how a text is put to a synthesizer and how its pairs are written. Data: formats/NAME.yaml, or a user's own file.

Comes in: a name or a path. Goes out: a checked `PromptFormat`. Does not know: tokenizers, models.
"""

import dataclasses
import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from megatron_instruct.errors import ConfigError, InputError, did_you_mean
from megatron_instruct.records import InstructionPair, OneShotExample
from megatron_instruct.synthesis.parsing import PairLayout, parse_pairs, write_pairs

StructuredOutput = Literal["none", "form", "extractive"]


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
    """markers: strings that must not be met in a text; they are made harmless there."""
    system: str = ""
    """chat: the system message; left out when empty."""
    request: str = ""
    """chat: the user's message; holds {text}."""
    examples: tuple[OneShotExample, ...] = ()
    """chat: shown in front of every text."""
    structured_output: StructuredOutput = "none"
    structure: Structure = Structure()


def load_prompt_format(name_or_path: str) -> PromptFormat:
    """Load a format by its name, or from a file that ends in .yaml; raises ConfigError that names file, key, rule and remedy."""
    folder = resources.files("megatron_instruct.synthesis") / "formats"
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise InputError(f"prompt_format {path}: no such file.")
        name, content = path.stem, path.read_bytes()
    else:
        names = [file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")]
        if name_or_path not in names:
            raise ConfigError(
                f"prompt_format={name_or_path!r} is no known format{did_you_mean(name_or_path, names)}; or give the path of a .yaml file."
            )
        name, content = name_or_path, (folder / f"{name_or_path}.yaml").read_bytes()
    where = f"prompt format {name_or_path}"
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{where} is not valid YAML: {error}") from error
    return _prompt_format(value, where, name=name, fingerprint=hashlib.sha256(content).hexdigest())


def _prompt_format(value: Any, where: str, *, name: str, fingerprint: str) -> PromptFormat:
    keys = {field.name for field in dataclasses.fields(PromptFormat)} - {"name", "fingerprint"}
    given = _mapping(value, keys, where)
    for key in ("kind", "language", "pair"):
        if key not in given:
            raise ConfigError(f"{where}: the key {key!r} is missing.")
    kinds = ("markers", "chat")
    _choice(given["kind"], kinds, f"{where}: kind")
    _choice(given.get("structured_output", "none"), get_args(StructuredOutput), f"{where}: structured_output")
    given["pair"] = _layout(given["pair"], f"{where}: pair")
    given["structure"] = Structure(**_typed(given.get("structure", {}), Structure, f"{where}: structure"))
    given["hide"] = tuple(given.get("hide", ()))
    given["examples"] = tuple(
        OneShotExample.from_json({"id": f"example {number}", **_mapping(example, {"text", "pairs"}, where)}, where=where)
        for number, example in enumerate(given.get("examples", ()), 1)
    )
    format_ = PromptFormat(name=name, fingerprint=fingerprint, **given)
    holder, text = ("text", format_.text) if format_.kind == "markers" else ("request", format_.request)
    if text.count("{text}") != 1:
        raise ConfigError(f"{where}: {holder}={text!r} must hold {{text}} exactly once.")
    for example in format_.examples:
        _check_example(example, format_.pair, where)
    return format_


def _check_example(example: OneShotExample, layout: PairLayout, where: str) -> None:
    """Refuse an example that would teach a form that the parser does not read."""

    def bare(pairs: tuple[InstructionPair, ...]) -> list[tuple[Any, ...]]:
        return [(pair.question, pair.answer, pair.options, pair.rationale) for pair in pairs]

    parsed = parse_pairs(write_pairs(example.pairs, layout), layout, stopped=True)
    if parsed.dropped or bare(parsed.pairs) != bare(example.pairs):
        raise ConfigError(
            f"{where}: the pairs of {example.id} do not come back from the form that they are written in; mend {example.pairs}."
        )


def _layout(value: Any, where: str) -> PairLayout:
    layout = PairLayout(**_typed(value, PairLayout, where))
    markers = (layout.question, layout.answer, layout.end)
    if len(set(markers)) != 3 or not all(markers):
        raise ConfigError(f"{where}: question, answer and end must be three different markers, not {markers}.")
    return layout


def _typed(value: Any, kind: type[PairLayout] | type[Structure], where: str) -> dict[str, Any]:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    given = _mapping(value, fields.keys(), where)
    for key, item in given.items():
        default = fields[key].default
        wanted: type = type(default) if isinstance(default, bool | int) else list if isinstance(default, tuple) else str
        if type(item) is not wanted:
            raise ConfigError(f"{where}: {key}={item!r} must be of type {wanted.__name__}.")
        given[key] = tuple(map(str, item)) if isinstance(item, list) else item
    missing = [key for key, field in fields.items() if field.default is dataclasses.MISSING and key not in given]
    if missing:
        raise ConfigError(f"{where}: the key {missing[0]!r} is missing.")
    return given


def _mapping(value: Any, known: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{where} must be a mapping, not a {type(value).__name__}.")
    for key in value:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}{did_you_mean(str(key), known)}")
    return dict(value)


def _choice(value: Any, choices: tuple[str, ...], where: str) -> None:
    if value not in choices:
        raise ConfigError(f"{where}={value!r} is none of {', '.join(choices)}.")
