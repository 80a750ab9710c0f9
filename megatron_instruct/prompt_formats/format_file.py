"""A dataclass read from the node of a YAML file, by the types of its fields; what does not fit is an error that names file and line.

Comes in: a node, a dataclass. Goes out: values by the name of their field. Does not know: what the fields mean.
"""

import dataclasses
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from megatron_instruct.errors import did_you_mean
from megatron_instruct.templates.yaml_nodes import Node

type Read = Callable[[Node], Any]
"""Makes a value of a node."""


def read_fields(node: Node, kind: type[Any], *, others: Mapping[str, Read] | None = None, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields that the file gives, checked, and those that it must give.

    others: how to read fields whose types are not plain. left_out: fields that are not for the file.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in left_out}
    given = node.known_items(tuple(fields), required=False)
    missing = [name for name, field in fields.items() if name not in given and _is_needed(field)]
    if missing:
        node.fail(f"{', '.join(map(repr, missing))} missing; add it here.")
    read = others or {}
    return {name: read[name](child) if name in read else _plain(child, hints[name]) for name, child in given.items()}


def plain_value(node: Node) -> str | bool | int:
    """Return a text, a truth value or a whole number, whichever YAML takes it for."""
    tag = getattr(node.node, "tag", "")
    return _plain(node, bool) if tag.endswith(":bool") else _plain(node, int) if tag.endswith(":int") else node.text()


def _is_needed(field: "dataclasses.Field[Any]") -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _plain(node: Node, hint: Any) -> Any:
    """Read a field of type str, bool, int, Literal, or a tuple of texts, each perhaps also None."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return _plain(node, next(choice for choice in typing.get_args(hint) if choice is not type(None)))
    if origin is tuple:
        return tuple(item.text() for item in node.sequence())
    if origin is Literal:
        return _choice(node, typing.get_args(hint))
    if hint is str:
        return node.text()
    assert hint in (bool, int), "fields of other types are read by `others`"
    tag, value = getattr(node.node, "tag", ""), getattr(node.node, "value", "")
    if not tag.endswith(f":{hint.__name__}"):
        node.fail(f"{'true or false' if hint is bool else 'a whole number'} is needed here, not {value!r}.")
    return value.lower() in ("true", "yes", "on") if hint is bool else int(value, 0)


def _choice(node: Node, choices: tuple[str, ...]) -> str:
    text = node.text()
    if text not in choices:
        node.fail(f"{text!r} is none of {', '.join(choices)}{did_you_mean(text, choices) if len(choices) > 3 else '.'}")
    return text
