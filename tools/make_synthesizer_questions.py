#!/usr/bin/env python
"""Write the texts that an instruction synthesizer is evaluated on; see --help and docs/tuning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.tuning.questions import main

if __name__ == "__main__":
    sys.exit(main())
