#!/usr/bin/env python
"""Merge indexed data sets into one; see --help and docs/preprocessing.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.preprocessing.merge_datasets import main

if __name__ == "__main__":
    sys.exit(main())
