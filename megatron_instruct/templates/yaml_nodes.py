"""A YAML file as nodes that know their line, so that every error in a bank names file and line.

A text expression of a bank is
    a string                          that text
    a sequence of expressions         each of their texts, one after another (alternatives)
    {join: [expression, …]}           every combination of their texts, put together
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_instruct.errors import InputError, did_you_mean

MOST_TEXTS = 20_000
_DEEPEST = 20


@dataclass(frozen=True)
class Node:
    """One node of a YAML file."""

    path: Path
    node: Any

    @property
    def where(self) -> str:
        return f"{self.path}:{self.node.start_mark.line + 1}"

    def fail(self, message: str) -> NoReturn:
        raise InputError(f"{self.where}: {message}")

    def items(self) -> dict[str, "Node"]:
        """Return the entries of a mapping; a repeated key is an error."""
        if not isinstance(self.node, yaml.MappingNode):
            self.fail(f"a mapping (name: value) is needed here, not {self._kind()}.")
        entries: dict[str, Node] = {}
        for key, value in self.node.value:
            name = Node(self.path, key).text()
            if name in entries:
                Node(self.path, key).fail(f"{name!r} stands here a second time.")
            entries[name] = Node(self.path, value)
        return entries

    def known_items(self, known: tuple[str, ...], *, required: bool) -> dict[str, "Node"]:
        """Return the entries of a mapping whose keys are all `known`; with `required`, all of them are there."""
        entries = self.items()
        for key, _ in self.node.value:
            if key.value not in known:
                Node(self.path, key).fail(f"unknown name {key.value!r}{did_you_mean(key.value, known)}")
        missing = [name for name in known if name not in entries]
        if required and missing:
            self.fail(f"{', '.join(map(repr, missing))} missing; add it here.")
        return entries

    def sequence(self) -> list["Node"]:
        if not isinstance(self.node, yaml.SequenceNode):
            self.fail(f"a sequence (- item) is needed here, not {self._kind()}.")
        return [Node(self.path, item) for item in self.node.value]

    def text(self) -> str:
        if not isinstance(self.node, yaml.ScalarNode):
            self.fail(f"a text is needed here, not {self._kind()}.")
        if self.node.tag != "tag:yaml.org,2002:str":
            self.fail(f"{self.node.value!r} is no text for YAML; put it in quotes.")
        text = str(self.node.value)
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            self.fail(f"{text!r} holds half of a surrogate pair, which is no text; write the whole character.")
        if "\0" in text:
            self.fail(f"{text!r} holds a NUL character, which no document may; leave it out.")
        return text

    def number(self) -> float:
        try:
            return float(self.node.value)
        except (ValueError, TypeError):
            self.fail(f"a number is needed here, not {self.node.value if isinstance(self.node, yaml.ScalarNode) else self._kind()!r}.")

    def probability(self) -> float:
        value = self.number()
        if not 0 <= value <= 1:
            self.fail(f"{value:g} is no probability; it must lie between 0 and 1.")
        return value

    def texts(self) -> list[tuple[str, "Node"]]:
        """Return the texts of an expression in order, each with the node that errors about it should name."""
        texts = list(itertools.islice(self._texts(_DEEPEST), MOST_TEXTS + 1))
        if len(texts) > MOST_TEXTS:
            self.fail(f"this makes more than {MOST_TEXTS:,} texts; split or shorten it.")
        return texts

    def _texts(self, depth: int) -> Iterator[tuple[str, "Node"]]:
        if depth == 0:
            self.fail(f"nested more than {_DEEPEST} deep; write it flatter.")
        if isinstance(self.node, yaml.SequenceNode):
            for item in self.sequence():
                yield from item._texts(depth - 1)
        elif isinstance(self.node, yaml.MappingNode):
            parts = self.known_items(("join",), required=True)["join"].sequence()
            choices = [list(itertools.islice(part._texts(depth - 1), MOST_TEXTS + 1)) for part in parts]
            for combination in itertools.product(*choices):
                yield "".join(text for text, _ in combination), self
        else:
            yield self.text(), self

    def _kind(self) -> str:
        kinds = {yaml.ScalarNode: "a single value", yaml.SequenceNode: "a sequence", yaml.MappingNode: "a mapping"}
        return kinds[type(self.node)]


def read_yaml(path: Path, what: str = "a template bank") -> Node:
    """Return the root of a YAML file; no object is built from it, so no tag in it can do anything.

    what: the file should hold, for the error about an empty one.
    """
    try:
        root = _composed(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise InputError(f"{path}:{line} is not UTF-8 text: {error.reason}; save the file as UTF-8.") from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply to be read; write it flatter.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise InputError(f"{where} is not valid YAML: {error}") from error
    if root is None:
        raise InputError(f"{path} is empty; {what} is needed.")
    return Node(path, root)


def _composed(content: str) -> yaml.Node | None:
    """Compose by libyaml where PyYAML has it, in a tenth of the time; what it refuses is for the other loader to describe."""
    if yaml.__with_libyaml__:
        try:
            return yaml.compose(content, Loader=yaml.CSafeLoader)
        except yaml.YAMLError:
            pass
    return yaml.compose(content, Loader=yaml.SafeLoader)
