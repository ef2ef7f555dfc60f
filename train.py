"""Train a language model by RL, operate on it, and say what the surgeon was worth."""

import os
import sys

# Read when torch loads OpenMP. Threads that spin while they wait make a step up to four times
# slower on cores that other programs use too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from agents.cli import main

if __name__ == "__main__":
    sys.exit(main())
