"""Where a result goes: a folder that is new, on a disk with room for it, made on a machine with memory for it."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import LOCK, atomic_folder, locked

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
"""Of one parameter."""
_LIBRARIES = 1_000_000_000  # bytes that torch, megatron-core and a process of transformers take


def require_new(target: Path) -> None:
    """Raise InputError where the target holds anything; an empty folder is removed to make room for the result."""
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    if target.exists():
        raise InputError(f"{target} holds something else already; give another --save, or remove it.")


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a folder that takes the target's name when the block succeeds. Raises ConfigError where another run is making it."""
    mark = target.with_name(f"{target.name}.{LOCK}")
    with locked(mark):
        try:
            with atomic_folder(target) as folder:
                yield folder
        finally:
            (mark / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # what else lies there is not ours
                mark.rmdir()


def require_room(target: Path, size: int) -> None:
    """Raise ConfigError where the disk has no room for so many bytes of values."""
    place = next(folder for folder in (target, *target.absolute().parents) if folder.is_dir())
    needed, free = 1.05 * size, shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"{place} has {free / 1e9:.2f} GB free, and the result takes about {needed / 1e9:.2f} GB; free room, or give another --save."
        )


def require_memory(elements: int) -> None:
    """Raise ConfigError where the work does not fit the free memory: twice the largest tensor, in fp32, and the libraries."""
    import psutil

    needed, free = 2 * 4 * elements + _LIBRARIES, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"this conversion takes about {needed / 1e9:.1f} GB of memory (twice its largest tensor of {elements / 1e6:.0f}M values, and "
            f"libraries), and {free / 1e9:.1f} GB are free; free some, or use a larger machine."
        )


@contextlib.contextmanager
def refusals_named(file: Path) -> Iterator[None]:
    """Let what the system says of a write to a file name it. (torch.save hides it behind a RuntimeError of its own.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:
        refusal = error if isinstance(error, OSError) else error.__context__
        if not isinstance(refusal, OSError):
            raise
        if refusal.filename is None:
            refusal.filename = str(file)
        raise refusal from None
