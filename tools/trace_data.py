#!/usr/bin/env python
"""Say which documents the steps of a run were made of; see --help and docs/training.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.training.trace import main

if __name__ == "__main__":
    sys.exit(main())
