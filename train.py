"""Train a language model by RL, operate on it, and say what the surgeon was worth."""

import os
import sys

# Read when torch loads OpenMP. Threads that spin while they wait make a step up to four times
# slower on cores that other programs use too.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

if __name__ == "__main__":
    try:
        from agents.cli.main import main

        code = main()
    except KeyboardInterrupt:  # it takes a moment until the command line has begun
        sys.stderr.write("train.py: interrupted\n")
        code = 130
    sys.exit(code)
