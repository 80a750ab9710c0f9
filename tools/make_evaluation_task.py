#!/usr/bin/env python
"""Make a multiple-choice task for lm-eval out of held-out documents; see --help and docs/evaluation.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.evaluation.task import main

if __name__ == "__main__":
    sys.exit(main())
