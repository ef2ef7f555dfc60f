"""Train a language model by reinforcement learning, operate on it, say what the surgeon was worth."""

import sys

from agents.cli import main

if __name__ == "__main__":
    sys.exit(main())
