#!/usr/bin/env python
"""Pre-train a model on megatron-core. Start it with torchrun; see --help and docs/architecture.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.training.run import main

if __name__ == "__main__":
    sys.exit(main())
