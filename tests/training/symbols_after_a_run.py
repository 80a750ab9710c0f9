"""Pre-trains as pretrain.py does, then says what the CPU seam replaced meanwhile.

    torchrun symbols_after_a_run.py RESULT.json FLAGS ...

RESULT.json: {"kind": "cpu" or "cuda", "installed": [...], "changed": [...]}; the last two name symbols of the table of replacements, those
that the seam says it replaced and those that are another object than before the run.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_instruct.config import parse
from megatron_instruct.platform import noise
from megatron_instruct.training.config import PretrainConfig
from megatron_instruct.training.run import run


def main() -> None:
    noise.silence()
    from megatron_instruct.platform import cpu_seam, device

    before = {replacement: replacement.current() for replacement in cpu_seam.REPLACEMENTS}
    config = parse(PretrainConfig, sys.argv[2:], prog="pretrain.py")
    assert config is not None
    run(config)
    changed = [replacement.symbol for replacement, value in before.items() if replacement.current() is not value]
    if os.environ.get("RANK", "0") == "0":
        found = {"kind": device.current().kind, "installed": cpu_seam._installed, "changed": changed}
        Path(sys.argv[1]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
