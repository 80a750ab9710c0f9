"""tools/convert_checkpoint.py: a Hugging Face folder -> a Megatron checkpoint, or back; which of them, the source says.

The walk: settings -> direction -> source, checked by name and size -> weight table -> result under a temporary name -> proof -> commit.
"""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron_instruct.config import run_tool
from megatron_instruct.conversion.config import ConvertConfig, Direction
from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.manifest import Manifest

_HUGGINGFACE, _MEGATRON = "config.json", "latest_checkpointed_iteration.txt"


def direction_of(config: ConvertConfig) -> Direction:
    """Recognise what the source is and return what is made of it; --to must agree."""
    found = [name for name in (_HUGGINGFACE, _MEGATRON) if (config.load / name).is_file()]
    if not found:
        raise InputError(
            f"load={config.load} is neither a Hugging Face folder ({_HUGGINGFACE}) nor a checkpoint folder ({_MEGATRON}); "
            "give one of them. An iter_ folder is named by its parent and --iteration."
        )
    if len(found) == 2 and config.to is None:
        raise ConfigError(f"load={config.load} holds both {_HUGGINGFACE} and {_MEGATRON}; say with --to what to make.")
    directions: dict[str, Direction] = {_HUGGINGFACE: "megatron", _MEGATRON: "huggingface"}
    possible = [directions[name] for name in found]
    if config.to is not None and config.to not in possible:
        raise ConfigError(f"to={config.to!r}, but load={config.load} holds {found[0]}, which becomes {possible[0]!r}; drop --to.")
    direction = config.to or possible[0]
    if direction == "megatron" and config.iteration is not None:
        raise ConfigError(f"iteration={config.iteration} goes with a Megatron source, and {config.load} is a Hugging Face folder; drop it.")
    return direction


def run(config: ConvertConfig) -> Manifest:
    """Do the stage and return its manifest."""
    started = time.monotonic()
    direction = direction_of(config)
    with _quiet_libraries():
        # torch and megatron-core take seconds to import: --help and a wrong flag answer without them
        if direction == "megatron":
            from megatron_instruct.conversion.to_megatron import convert
        else:
            from megatron_instruct.conversion.to_huggingface import convert
        manifest = convert(config)
    proved = "proved" if manifest.facts["proof"]["proved"] else "NOT proved (--no-prove)"
    print(
        f"{config.save}: {manifest.counts['parameters'] / 1e6:,.1f}M parameters in {manifest.facts['dtype']}, for {direction}, {proved}; "
        f"{time.monotonic() - started:,.1f} s"
    )
    return manifest


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Leave out what megatron-core 0.19.2 and torch 2.13 say of themselves: missing GPU libraries and their own deprecations."""
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"megatron\.core|torch\.")
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return its exit status."""
    return run_tool(ConvertConfig, run, argv, prog="convert_checkpoint.py")
