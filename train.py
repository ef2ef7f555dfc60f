"""Train a language model by RL, operate on it, and report what the surgeon was worth."""

import sys

from agents.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
