#!/usr/bin/env python
"""Draw the curves of runs into one page, also while they run; see --help and docs/training.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.training.report import main

if __name__ == "__main__":
    sys.exit(main())
