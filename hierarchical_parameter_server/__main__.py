"""`python -m hierarchical_parameter_server` is the `hps` command."""

import sys

from hierarchical_parameter_server.cli import main

sys.exit(main())
