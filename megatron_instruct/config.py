"""Settings of a stage: defaults < YAML file < command-line flags -> one frozen dataclass.

Comes in: a frozen, keyword-only dataclass (its docstrings become the help) and the command line. A field that is itself
a dataclass is a named group in --help; its fields are flags without a prefix. Goes out: an instance of it.
A YAML file holds the same names as the flags, with underscores, in one flat mapping. What neither knows is refused, and so is a number
that is not finite.
Does not know: any stage. What a setting means is checked by the dataclass itself, in `__post_init__`.
"""

import dataclasses
import inspect
import itertools
import math
import os
import re
import select
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from megatron_instruct.errors import ConfigError, InputError, MegatronInstructError, did_you_mean

YamlText = typing.NewType("YamlText", str)
"""A value with a structure of its own, which the stage reads: a mapping in the file of settings, YAML in one word on the command line."""

_OWN_FLAGS = ("config", "print_config")
_SEQUENCES = {tuple, list}
_MAPPINGS = {dict, Mapping}
_NUMBER = re.compile(r"-[\d.]+([eE][+-]?\d+)?")
_MUST_BE_BOOL = "is neither true nor false; write one of them, without quotes."
_IS_BOOL = "is true or false, which is no value of this setting; put text such as 'yes' in quotes."


def run_tool[Config](config_type: type[Config], stage: Callable[[Config], object], argv: Sequence[str] | None = None, *, prog: str) -> int:
    """Parse the command line into `config_type`, run `stage` with it, and return the process's exit status.

    0 done, 1 the system refused (disk full, no permission), 2 to 7 an error that the user can mend (see errors.py), 130 Ctrl-C, 141 nobody
    reads what is printed any more.
    """
    try:
        config = parse(config_type, sys.argv[1:] if argv is None else argv, prog=prog)
        if config is not None:
            stage(config)
    except MegatronInstructError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 128 + signal.SIGPIPE
        print(f"{prog}: error: {error}; finished work is kept: mend this and run the same command again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; finished work is kept: run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def _nobody_reads() -> bool:
    """Say whether standard output is a pipe that nobody reads any more, as after `| head`; then Python does not complain at its end."""
    output = select.poll()
    output.register(1, 0)
    if not any(event & select.POLLERR for _, event in output.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    return True


def parse[Config](config_type: type[Config], argv: Sequence[str], *, prog: str) -> Config | None:
    """Return the resolved settings, or None after --print-config has written them to standard output."""
    command_type = dataclasses.make_dataclass(
        "Command",
        [
            ("stage", typing.Annotated[config_type, tyro.conf.arg(name="")]),
            ("config", typing.Annotated[Path | None, tyro.conf.arg(help="YAML file of settings; flags override it.")], None),
            ("print_config", typing.Annotated[bool, tyro.conf.arg(help="Print the resolved settings as YAML and exit.")], False),
        ],
        frozen=True,
        kw_only=True,
    )
    fields = _field_types(config_type)
    _refuse_unknown_flags(argv, fields)
    arguments = [*_yaml_as_flags(_config_file(argv), fields), *argv]
    command: Any = tyro.cli(
        command_type,
        args=arguments,
        prog=prog,
        description=inspect.getdoc(config_type),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    _refuse_what_is_not_finite(command.stage)
    if command.print_config:
        print(as_yaml(command.stage), end="")
        return None
    return typing.cast(Config, command.stage)


def flat(config: object) -> dict[str, Any]:
    """Return the settings of a (nested) dataclass as one flat mapping of JSON types, in the order of declaration."""
    return {field.name: _plain(value) for field, value in _leaves(config)}


def as_yaml(config: object) -> str:
    """Return the settings in the form that --config reads."""
    return str(yaml.safe_dump(flat(config), sort_keys=False, allow_unicode=True))


def _leaves(config: Any) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield field, value


def _refuse_what_is_not_finite(config: object) -> None:
    """NaN passes most comparisons that a stage makes, and infinity half of them."""
    for name, value in flat(config).items():
        items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if any(isinstance(item, float) and not math.isfinite(item) for item in items):
            raise ConfigError(f"{name}={value} must be finite; give a number, or leave the setting out for its default.")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _field_types(config_type: Any) -> dict[str, Any]:
    """Return the type of each setting by its name, groups flattened."""
    hints = typing.get_type_hints(config_type)
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        hint = hints[field.name]
        found.update(_field_types(hint) if dataclasses.is_dataclass(hint) else {field.name: hint})
    return found


def _refuse_unknown_flags(argv: Sequence[str], fields: Mapping[str, Any]) -> None:
    """Name the flag that was probably meant, before anything else is looked at: a mistyped flag also looks like a missing one."""
    names = [*fields, *_OWN_FLAGS, *(f"no_{name}" for name, hint in fields.items() if hint is bool)]
    known = [*("--" + name.replace("_", "-") for name in names), "--no-print-config", "--help"]
    for word in argv:
        flag = word.partition("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in known:
            raise ConfigError(f"unknown flag {word.partition('=')[0]}{did_you_mean(flag, known)}")


def _config_file(argv: Sequence[str]) -> Path | None:
    """Find the value of --config before the full parse, which needs the file's settings to go before the flags."""
    found: list[str] = []
    for word, following in itertools.pairwise([*argv, ""]):
        if word == "--config" and following:
            found.append(following)
        elif word.startswith("--config="):
            found.append(word.removeprefix("--config="))
    if len(found) > 1:
        raise ConfigError(f"--config is given {len(found)} times: {', '.join(found)}; give one file, and override it with flags.")
    return Path(found[0]) if found else None


def _yaml_as_flags(path: Path | None, fields: Mapping[str, Any]) -> list[str]:
    """Return the file's settings spelled as flags, so that one parser checks both and a later flag wins."""
    if path is None:
        return []
    if not path.is_file():
        raise InputError(f"--config {path}: no such file; give the path of a YAML file.")
    try:
        content = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(content)
        _refuse_repeated_keys(yaml.compose(content, Loader=yaml.SafeLoader), path)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not valid YAML: {error}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path} holds a {type(settings).__name__}; the file must be a mapping of setting: value.")
    flags: list[str] = []
    for name, value in settings.items():
        if name not in fields:
            raise ConfigError(f"--config {path}: unknown setting {name!r}{did_you_mean(str(name), fields)}")
        flags += _as_flags(name, value, fields[name], where=f"--config {path}: {name}={value!r}")
    return flags


def _refuse_repeated_keys(node: yaml.Node | None, path: Path) -> None:
    """The parser keeps the last of two equal keys without a word."""
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        repeated = [key for key in dict.fromkeys(keys) if keys.count(key) > 1]
        if repeated:
            raise ConfigError(f"--config {path}: {repeated[0]!r} is set {keys.count(repeated[0])} times; keep one.")


def _as_flags(name: str, value: Any, hint: Any, *, where: str) -> list[str]:
    """Spell one setting of the file as a flag; `where` opens the message of a value whose shape is not the field's."""
    flag = "--" + name.replace("_", "-")
    choices = _choices(hint)
    if isinstance(value, bool) != (bool in choices) and value is not None:
        raise ConfigError(f"{where} {_MUST_BE_BOOL if bool in choices else _IS_BOOL}")
    if isinstance(value, bool) and hint is bool:
        return [flag if value else flag.replace("--", "--no-", 1)]
    if value is None and type(None) not in choices:
        raise ConfigError(f"{where}: null is no value of this setting; give one, or leave the line out for the default.")
    if isinstance(value, dict):
        return [flag, *_words([word for pair in value.items() for word in pair], fits=not choices.isdisjoint(_MAPPINGS), where=where)]
    if isinstance(value, list) and YamlText in typing.get_args(hint):
        value = [
            yaml.safe_dump(item, default_flow_style=True, width=math.inf).strip() if isinstance(item, dict) else item for item in value
        ]
    if isinstance(value, list):
        return [flag, *_words(value, fits=not choices.isdisjoint(_SEQUENCES), where=where)]
    return [f"{flag}={_word(value)}"]


def _choices(hint: Any) -> set[Any]:
    """Return the plain types that a field takes: {tuple, NoneType} for tuple[int, ...] | None."""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return {typing.get_origin(member) or member for member in members}


def _words(items: Iterable[Any], *, fits: bool, where: str) -> list[str]:
    if not fits:
        raise ConfigError(f"{where} is a list or a mapping, and this setting takes a single value or another shape; see --help.")
    words: list[str] = []
    for item in items:
        word = _word(item)
        if item is None or isinstance(item, list | dict):
            raise ConfigError(f"{where}: {item!r} inside it is no plain value; put text that only looks like YAML in quotes.")
        if word.startswith("-") and not _NUMBER.fullmatch(word):
            raise ConfigError(f"{where}: {word!r} begins with '-', so it would be read as a flag; write it another way, such as ./{word}.")
        words.append(word)
    return words


def _word(value: Any) -> str:
    """Floats are spelled as YAML does, 1.0e-05, because YAML reads 1e-05 back as text."""
    return str(yaml.safe_dump(value)).split("\n", 1)[0] if isinstance(value, float) and math.isfinite(value) else str(value)
