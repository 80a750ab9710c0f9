#!/usr/bin/env python
"""Score a model in a Hugging Face folder; see --help and docs/evaluation.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.evaluation.run import main

if __name__ == "__main__":
    sys.exit(main())
