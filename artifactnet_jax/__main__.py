"""`python -m artifactnet_jax`: the command."""

import sys

from artifactnet_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
