#!/usr/bin/env python
"""Convert a model between a Hugging Face folder and a Megatron checkpoint, with a proof; see --help and docs/conversion.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.conversion.run import main

if __name__ == "__main__":
    sys.exit(main())
