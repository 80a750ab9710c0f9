#!/usr/bin/env python
"""Encode a corpus into Megatron indexed data sets; see --help and docs/preprocessing.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.preprocessing.run import main

if __name__ == "__main__":
    sys.exit(main())
