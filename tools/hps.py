#!/usr/bin/env python3
"""The `hps` command from a source tree; an installed package has it as `hps`."""

import sys

from hierarchical_parameter_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
