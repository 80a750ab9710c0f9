#!/usr/bin/env python
"""Verify indexed data sets and print what they hold; see --help and docs/preprocessing.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.preprocessing.inspection import main

if __name__ == "__main__":
    sys.exit(main())
