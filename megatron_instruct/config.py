"""Settings of a stage: defaults < YAML file < command-line flags -> one frozen dataclass.

Comes in: a frozen, keyword-only dataclass (its docstrings become the help) and the command line. A field that is itself
a dataclass is a named group in --help; its fields are flags without a prefix. Goes out: an instance of it.
A YAML file holds the same names as the flags, with underscores, in one flat mapping.
Does not know: any stage. What a setting means is checked by the dataclass itself, in `__post_init__`.
"""

import dataclasses
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml

from megatron_instruct.errors import ConfigError, InputError, MegatronInstructError, did_you_mean

_OWN_FLAGS = ("config", "print_config")


def run_tool[Config](config_type: type[Config], stage: Callable[[Config], object], argv: Sequence[str] | None = None, *, prog: str) -> int:
    """Parse the command line into `config_type`, run `stage` with it, and return the process's exit status.

    0 done, 1 the system refused (disk full, no permission), 2 to 6 an error that the user can mend (see errors.py), 130 Ctrl-C.
    """
    try:
        config = parse(config_type, sys.argv[1:] if argv is None else argv, prog=prog)
        if config is not None:
            stage(config)
    except MegatronInstructError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return error.exit_status
    except OSError as error:
        print(f"{prog}: error: {error}; finished work is kept: mend this and run the same command again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; finished work is kept: run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


def parse[Config](config_type: type[Config], argv: Sequence[str], *, prog: str) -> Config | None:
    """Return the resolved settings, or None after --print-config has written them to standard output."""
    command_type = dataclasses.make_dataclass(
        "Command",
        [
            ("stage", tyro.conf.OmitArgPrefixes[config_type]),  # type: ignore[misc, valid-type]
            ("config", typing.Annotated[Path | None, tyro.conf.arg(help="YAML file of settings; flags override it.")], None),
            ("print_config", typing.Annotated[bool, tyro.conf.arg(help="Print the resolved settings as YAML and exit.")], False),
        ],
        frozen=True,
        kw_only=True,
    )
    arguments = [*_yaml_as_flags(_config_file(argv), config_type), *argv]
    command: Any = tyro.cli(
        command_type,
        args=arguments,
        prog=prog,
        description=config_type.__doc__,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
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


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    return value


def _field_names(config_type: Any) -> list[str]:
    hints = typing.get_type_hints(config_type)
    names: list[str] = []
    for field in dataclasses.fields(config_type):
        nested = dataclasses.is_dataclass(hints[field.name])
        names += _field_names(hints[field.name]) if nested else [field.name]
    return names


def _config_file(argv: Sequence[str]) -> Path | None:
    """Find the value of --config before the full parse, which needs the file's settings to go before the flags."""
    for position, word in enumerate(argv):
        if word == "--config" and position + 1 < len(argv):
            return Path(argv[position + 1])
        if word.startswith("--config="):
            return Path(word.removeprefix("--config="))
    return None


def _yaml_as_flags(path: Path | None, config_type: type) -> list[str]:
    """Return the file's settings spelled as flags, so that one parser checks both and a later flag wins."""
    if path is None:
        return []
    if not path.is_file():
        raise InputError(f"--config {path}: no such file; give the path of a YAML file.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} is not valid YAML: {error}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise ConfigError(f"--config {path} holds a {type(settings).__name__}; the file must be a mapping of setting: value.")
    known = _field_names(config_type)
    flags: list[str] = []
    for name, value in settings.items():
        if name not in known or name in _OWN_FLAGS:
            raise ConfigError(f"--config {path}: unknown setting {name!r}{did_you_mean(str(name), known)}")
        flags += _as_flags(str(name), value)
    return flags


def _as_flags(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else flag.replace("--", "--no-", 1)]
    if isinstance(value, dict):
        return [flag, *(word for key, item in value.items() for word in (str(key), str(item)))]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
