#!/usr/bin/env python
"""Write instruction-response pairs for raw texts; see --help and docs/synthesis.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.synthesis.run import main

if __name__ == "__main__":
    sys.exit(main())
