#!/usr/bin/env python
"""Measure what synthesizers wrote for evaluation texts; see --help and docs/tuning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.tuning.evaluate import main

if __name__ == "__main__":
    sys.exit(main())
