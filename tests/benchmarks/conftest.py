"""The scripts find `measure` beside them, as Python has it when it runs one of them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
