#!/usr/bin/env python
"""Render examples of synthesis into instruction-augmented texts; see --help and docs/templates.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_instruct.templates.run import main

if __name__ == "__main__":
    sys.exit(main())
