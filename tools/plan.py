#!/usr/bin/env python
"""Find the best layouts of a model on a cluster, and what they cost, before a run; see --help and docs/planning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.planning.run import main

if __name__ == "__main__":
    sys.exit(main())
