"""Settings that change nothing, since what they belong to is off: refused, so that nobody takes it to be on."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from megatron_instruct.errors import ConfigError


def check_idle(options: Any, names: Iterable[str], *, needs: str) -> None:
    """Raise ConfigError where one of these fields differs from its default. needs: the setting without which they do nothing."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    for name in names:
        value = getattr(options, name)
        if value != defaults[name]:
            raise ConfigError(f"{name}={value} goes with {needs}; set it, or drop {name}.")
