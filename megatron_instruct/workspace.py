"""The folder of unfinished work: no leftovers of another run, and nothing of anybody else's.

Comes in: a plan, {"settings": …, "inputs": …} and what else decides what the parts hold. A folder that holds the parts of the same plan is
gone on with; parts of another plan are removed, or refused where they were dear or its "stage" is another. What bears no mark of a run, its
plan or its lock, is neither removed nor written over.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import LOCK, TEMPORARY_SUFFIX, locked, read_json, write_json
from megatron_instruct.manifest import first_difference

_PLAN = "plan.json"


def plan_of(folder: Path) -> Any:
    """Return the plan of the parts in `folder`, None where there is none."""
    plan = read_json(folder / _PLAN) if (folder / _PLAN).is_file() else None
    return plan if isinstance(plan, dict) and "settings" in plan else None


def is_own(folder: Path, stage: str | None = None) -> bool:
    """Say whether `folder` is there and was made by a run: it holds a plan of this stage, or nothing but locks."""
    if not folder.is_dir():
        return False
    plan = plan_of(folder)
    return all(map(_is_mark, folder.iterdir())) if plan is None else plan.get("stage") == stage


def require_own(folder: Path, stage: str | None = None) -> None:
    """Raise InputError where `folder` holds what no run of this stage put there."""
    if folder.is_dir() and not is_own(folder, stage):
        if (plan := plan_of(folder)) is not None:
            whose = f"of {plan['stage']}" if plan.get("stage") else "of another tool"
            raise InputError(f"{folder} holds unfinished work {whose}; let its command finish it, choose another output or move it away.")
        first = min(entry.name for entry in folder.iterdir() if not _is_mark(entry))
        raise InputError(
            f"{folder} holds {first} and no {_PLAN} of a run, so it is not this tool's; choose another output or move it away."
        )


def require_absent(outputs: Sequence[Path]) -> None:
    """Raise InputError where one of these is there, although no run has begun to write it."""
    for output in outputs:
        if output.exists():
            raise InputError(
                f"{output} exists already and has no manifest: it is not this tool's, or its manifest was removed; "
                "choose another output or remove it."
            )


@contextlib.contextmanager
def held(folder: Path, outputs: Sequence[Path]) -> Iterator[None]:
    """Hold `folder` for a stage without parts. Raises InputError where `outputs` are there and no run has left its lock or its manifest."""
    if not any((folder / mark).is_file() for mark in (LOCK, "manifest.json")):
        require_absent(outputs)
    with locked(folder):
        yield


def take_up(folder: Path, plan: Any, *, outputs: Sequence[Path], alone: bool = True, dear: bool = False) -> None:
    """Make `folder` hold `plan` and no parts but its own. alone: no other run is at work in the folder. dear: what it holds took long.

    Raises InputError where `folder` or files of `outputs` exist already that no run began, ConfigError where others have another plan, or
    where what is dear has.
    """
    plan = json.loads(json.dumps(plan))
    found = plan_of(folder)
    if found == plan:
        return
    require_own(folder, plan.get("stage"))
    if found is None:
        require_absent(outputs)
    elif not alone:
        raise ConfigError(f"another share is at work in {folder} with other inputs or settings; give all shares the same command.")
    elif dear:
        difference = first_difference(found["settings"], plan["settings"])
        made = f"with {difference}" if difference is not None else "from other inputs"
        raise ConfigError(f"{folder} holds unfinished work made {made}; give the same ones, or remove {folder} to begin anew.")
    else:
        print(f"Leftovers of an unfinished run with other inputs or settings are removed from {folder}.")
        write_json(folder / _PLAN, {**plan, "settings": {}})  # nobody's, should this run be killed before all is removed
        _clear(folder)
    write_json(folder / _PLAN, plan)


def remove(folder: Path, stage: str | None = None) -> None:
    """Remove a folder of work, its plan last, and a link to it; what no run of this stage made is left as it is."""
    if is_own(folder, stage):
        _clear(folder)
        shutil.rmtree(folder.resolve())
        if folder.is_symlink():
            folder.unlink()


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif not _is_mark(entry):
            entry.unlink()


def _is_mark(entry: Path) -> bool:
    """Say whether a run leaves a file of this name before any part."""
    return entry.name in (_PLAN, _PLAN + TEMPORARY_SUFFIX, LOCK) or entry.name.startswith(f"{LOCK}.")
