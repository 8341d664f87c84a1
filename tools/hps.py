#!/usr/bin/env python3
"""The `hps` command from a source tree; an installed package has it as `hps`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hps_command import main

if __name__ == "__main__":
    sys.exit(main())
