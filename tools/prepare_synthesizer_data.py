#!/usr/bin/env python
"""Write context-based task data as documents to tune an instruction synthesizer on; see --help and docs/tuning.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.tuning.run import main

if __name__ == "__main__":
    sys.exit(main())
