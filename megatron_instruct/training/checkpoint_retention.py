"""Which checkpoints of a run are kept, and how the others go. Does not know: torch.

A checkpoint that goes is renamed first: no folder with a checkpoint's name ever is half there. Its files are then removed while training
goes on, since that takes a disk its time; what a killed process leaves of them is removed by the next one.
"""

import os
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from megatron_instruct.models.checkpoint_folder import iteration_folder, iterations

_GOING = ".deleted"


def expendable(saved: Iterable[int], *, keep_last: int | None, retain_interval: int | None) -> list[int]:
    """Return the iterations to delete, oldest first: all but the newest `keep_last` (1 where only the interval is given) and the
    multiples of `retain_interval`. Without either, none; the newest never.
    """
    if keep_last is None and retain_interval is None:
        return []
    older = sorted(saved)[: -(keep_last or 1)]
    return [number for number in older if retain_interval is None or number % retain_interval]


def delete_expendable(folder: Path, *, keep_last: int | None, retain_interval: int | None) -> threading.Thread | None:
    """Delete what is not to be kept of a folder whose newest checkpoint is whole. For one process only.

    The checkpoints are gone when this returns; the thread, where there is one, removes their files.
    """
    present = [number for number in iterations(folder) if iteration_folder(folder, number).is_dir()]
    unwanted = expendable(present, keep_last=keep_last, retain_interval=retain_interval)
    for number in unwanted:
        _set_aside(iteration_folder(folder, number))
    if not unwanted:
        return None
    removing = threading.Thread(target=clear_deleted, args=(folder,), name="removes old checkpoints")
    removing.start()
    return removing


def delete(path: Path) -> None:
    """Delete a checkpoint, or what is there under its name; nothing where there is nothing."""
    if path.exists():
        _set_aside(path)
    clear_deleted(path.parent)


def _set_aside(path: Path) -> None:
    going = path.with_name(path.name + _GOING)
    shutil.rmtree(going, ignore_errors=True)
    os.replace(path, going)


def clear_deleted(folder: Path) -> None:
    """Remove what is left of checkpoints that were being deleted."""
    for going in folder.glob(f"iter_*{_GOING}"):
        shutil.rmtree(going, ignore_errors=True)
