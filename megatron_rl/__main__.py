"""`python -m megatron_rl`: the command line, also where the package is not installed as a command."""

import sys

from megatron_rl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
