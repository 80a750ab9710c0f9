"""The folder of unfinished work: no leftovers of another run.

Comes in: a plan, any JSON value, that decides what the parts hold. A folder that holds the parts of the same plan is gone on with;
parts of another plan are removed.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_instruct.errors import ConfigError, InputError
from megatron_instruct.files import read_json, write_json

_PLAN = "plan.json"


def plan_of(folder: Path) -> Any:
    """Return the plan of the parts in `folder`, None where there is none."""
    return read_json(folder / _PLAN) if (folder / _PLAN).is_file() else None


def take_up(folder: Path, plan: Any, *, outputs: Sequence[Path], alone: bool = True) -> None:
    """Make `folder` hold `plan` and no parts but its own. alone: no other run is at work in the folder.

    Raises InputError where files of `outputs` exist already that no run of this folder began, ConfigError where others have another plan.
    """
    plan = json.loads(json.dumps(plan))
    found = plan_of(folder)
    if found is None:
        for output in outputs:
            if output.exists():
                raise InputError(
                    f"{output} exists already and has no manifest: it is not this tool's, or its manifest was removed; "
                    "choose another output_prefix or remove it."
                )
    elif found == plan:
        return
    elif not alone:
        raise ConfigError(f"another share is at work in {folder} with other inputs or settings; give all shares the same command.")
    else:
        print(f"Leftovers of an unfinished run with other inputs or settings are removed from {folder}.")
    for leftover in folder.iterdir():
        if leftover.is_dir():
            shutil.rmtree(leftover)
    write_json(folder / _PLAN, plan)
