"""Pre-trains several times in the same processes: importing torch and megatron-core costs more than a tiny run.

    torchrun several_runs.py RUNS.json

RUNS.json: a list of {"flags": [...], "of": FOLDER or null, "at": ITERATION} and maybe "faults": TEXT; with "of", the run's --save folder is
first made to look like FOLDER killed some steps after that iteration; "faults" are made on purpose. How each run ended is written to
RUNS.json.ends.
"""

import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_instruct.config import parse
from megatron_instruct.errors import MegatronInstructError
from megatron_instruct.platform import noise
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.rehearsal import VARIABLE
from megatron_instruct.training.run import run
from megatron_instruct.training.stopping import StoppedEarly


def stop_at(source: Path, iteration: int, target: Path) -> None:
    """Copy a finished run as if it had been killed some steps after this iteration."""
    target.mkdir()
    name = f"iter_{iteration:07d}"
    shutil.copytree(source / name, target / name)
    shutil.copytree(source / "tokenizer", target / "tokenizer")
    for path in source.glob("*.json*"):
        if path.name != "manifest.json":
            shutil.copyfile(path, target / path.name)
    (target / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")


def _end_groups() -> None:
    """End all process groups of a run but that of all processes: gloo's threads wake up a hundred times a second."""
    import torch.distributed
    from torch.distributed.distributed_c10d import _world

    torch.distributed.barrier()
    for group in [group for group in _world.pg_map if group is not torch.distributed.group.WORLD]:
        torch.distributed.destroy_process_group(group)


def main() -> None:
    noise.silence()
    import torch
    from megatron.core import parallel_state

    from megatron_instruct.platform import device

    device.initialize(timeout_minutes=2)
    ends = []
    for description in json.loads(Path(sys.argv[1]).read_text()):
        os.environ[VARIABLE] = description.get("faults", "")
        config = parse(PretrainConfig, description["flags"], prog="pretrain.py")
        assert config is not None
        if description["of"] and torch.distributed.get_rank() == 0:
            stop_at(Path(description["of"]), description["at"], config.checkpoint.save)
        torch.distributed.barrier()
        try:
            run(config)
            ends.append("done")
        except StoppedEarly as stop:
            ends.append(f"75 {stop}")
        except MegatronInstructError as error:
            ends.append(f"{error.exit_status} {error}")
            parallel_state.destroy_model_parallel()
        _end_groups()
    if os.environ.get("RANK", "0") == "0":
        Path(f"{sys.argv[1]}.ends").write_text(json.dumps(ends))


if __name__ == "__main__":
    main()
