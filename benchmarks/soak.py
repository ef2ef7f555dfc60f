"""Does the environment leak? Random use of all its features, for minutes.

Random operations, resets with and without seeds, commits, forks, saved and restored states, invalid
actions, rendering, closing and making environments: of the single environment, or of the vector
environment in all three autoreset modes. Memory, open file descriptors and threads are measured
throughout; after the warm-up (the first quarter) none may grow beyond a bound. Weights are compared
bit for bit after every move: only a commit may change them.

    python benchmarks/soak.py --kind single --minutes 15
    python benchmarks/soak.py --kind vector --minutes 15
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from measure import make_parser, publish

from avatarl_env import AttentionSurgeryEnv, AttentionSurgeryVectorEnv, Patient

SIZES: dict[str, Any] = {"n_prompts": 4, "prompt_length": 16, "n_new": 16}
MODES = ("NextStep", "SameStep", "Disabled")
WARM_UP = 0.25
"""Share of the time in which memory may grow."""
MAX_GROWTH = {"rss_mib": 16.0, "anonymous_mib": 16.0, "descriptors": 0.0, "threads": 0.0}
"""Bounds of the median of the last quarter minus that of the first, after the warm-up."""
REFUSED: tuple[Any, ...] = (None, "up", [1.0], float("nan"), {"a": 1}, 1j)


class Reading(NamedTuple):
    """The resources that the process holds."""

    seconds: float
    rss_mib: float
    anonymous_mib: float
    """Memory not backed by a file, including what is swapped out."""
    descriptors: float
    threads: float


def read(start: float) -> Reading:
    """Collect garbage and return the resources that the process holds (Linux)."""
    gc.collect()
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    rss, anonymous, swapped = (
        int(fields[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon", "VmSwap")
    )
    n_open = len(os.listdir("/proc/self/fd"))
    seconds, n_threads = time.monotonic() - start, float(fields["Threads"])
    return Reading(seconds, rss, anonymous + swapped, float(n_open), n_threads)


def fingerprint(patient: Patient) -> bytes:
    """Return a digest of every weight."""
    digest = hashlib.blake2b()
    for p in patient.model.parameters():
        digest.update(p.detach().contiguous().view(torch.uint8).numpy())
    return digest.digest()


class Soak:
    """Random moves on environments of one patient, one environment at a time."""

    def __init__(self, kind: str, seed: int) -> None:
        """Load the bundled patient."""
        self.kind = kind
        self.rng = np.random.default_rng(seed)
        self.patient = Patient.load("bundled")
        self.original = {k: v.clone() for k, v in self.patient.model.state_dict().items()}
        self.counts: Counter[str] = Counter()
        self.weights = fingerprint(self.patient)
        self.state: dict[str, Any] | None = None
        self.env: Any = self.make()
        self.moves: tuple[tuple[float, Callable[[], None]], ...] = (
            (60, self.step),
            (10, self.reset),
            (3, self.commit),
            (5, self.fork),
            (5, self.save),
            (5, self.restore),
            (6, self.fail),
            (4, self.render),
            (2, self.remake),
        )

    def make(self) -> Any:
        """Return an environment with random injury, operator, render and autoreset modes."""
        self.state = None
        rules = {
            **SIZES,
            "injury": float(self.rng.choice([0.0, 0.3])),
            "operator": str(self.rng.choice(["head_gain", "spectral_bands", "low_rank_seed"])),
            "render_mode": str(self.rng.choice(["ansi", "rgb_array"])),
        }
        if self.kind == "single":
            env: Any = AttentionSurgeryEnv(self.patient, **rules)
        else:
            mode = str(self.rng.choice(MODES))
            env = AttentionSurgeryVectorEnv(3, self.patient, autoreset_mode=mode, **rules)
        env.reset(seed=int(self.rng.integers(2**31)))
        return env

    def play(self) -> None:
        """Make a random move, and check the weights.

        Raises:
            AssertionError: if weights changed without a commit.
        """
        shares = np.array([share for share, _ in self.moves])
        _, move = self.moves[self.rng.choice(len(shares), p=shares / shares.sum())]
        self.counts[move.__name__] += 1
        move()
        if move != self.commit:
            assert fingerprint(self.patient) == self.weights, f"{move.__name__} changed weights"

    def step(self) -> None:
        """Make a step; reset if needed."""
        actions = self.rng.uniform(-1, 1, self.env.action_space.shape)
        try:
            ended = self.env.step(actions)[2]
        except RuntimeError:  # over or void, or in mode DISABLED unfinished
            self.counts["void"] += 1
            self.env.reset()
            return
        if self.kind == "single" and ended:
            self.env.reset()
        elif self.kind == "vector" and self.env.autoreset_mode.value == "Disabled" and ended.any():
            self.env.reset(options={"reset_mask": ended})

    def reset(self) -> None:
        """Reset, with a seed or without."""
        seed = int(self.rng.integers(2**31)) if self.rng.random() < 0.5 else None
        self.env.reset(seed=seed)

    def commit(self) -> None:
        """Commit an operation; restore the original weights after every tenth."""
        self.env.reset()
        self.env.step(self.rng.uniform(-0.2, 0.2, self.env.action_space.shape))
        if self.kind == "single":
            self.env.commit()
        else:
            self.env.commit(int(self.rng.integers(self.env.num_envs)))
        if self.counts["commit"] % 10 == 0:
            self.patient.model.load_state_dict(self.original)
            self.env.model_changed()
        self.weights = fingerprint(self.patient)
        self.env.reset()

    def fork(self) -> None:
        """Step a fork and close it; for the vector environment, which has none, make another."""
        other = self.env.fork() if self.kind == "single" else self.make()
        try:
            if self.kind == "vector":
                other.close()
                return
            other.step(np.zeros(other.action_space.shape))
        except RuntimeError:
            other.reset()
        finally:
            other.close()

    def save(self) -> None:
        """Save the state."""
        self.state = self.env.get_state()

    def restore(self) -> None:
        """Restore the latest state of this environment."""
        if self.state is not None:
            self.env.set_state(self.state)

    def fail(self) -> None:
        """Give an invalid action.

        Raises:
            AssertionError: if it is accepted.
        """
        refused = REFUSED[self.rng.integers(len(REFUSED))]
        try:
            self.env.step(refused)
        except (ValueError, RuntimeError):
            return
        raise AssertionError(f"{refused!r} was accepted")

    def render(self) -> None:
        """Render the operation."""
        self.env.render()

    def remake(self) -> None:
        """Close the environment and make another."""
        self.env.close()
        self.env = self.make()


def growth(readings: list[Reading]) -> dict[str, dict[str, float]]:
    """Return ends, growth and median slope per hour of each quantity after the warm-up."""
    total = readings[-1].seconds
    steady = [reading for reading in readings if reading.seconds >= WARM_UP * total]
    quarter = max(1, len(steady) // 4)
    hours = np.array([reading.seconds for reading in steady]) / 3600
    found = {}
    for name, bound in MAX_GROWTH.items():
        values = np.array([getattr(reading, name) for reading in steady])
        i, j = np.triu_indices(len(values), 1)
        slopes = (values[j] - values[i]) / (hours[j] - hours[i])
        found[name] = {
            "first": float(values[0]),
            "last": float(values[-1]),
            "growth": float(np.median(values[-quarter:]) - np.median(values[:quarter])),
            "median_slope_per_hour": float(np.median(slopes)) if slopes.size else 0.0,
            "bound": bound,
        }
    return found


def run(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Soak; return the result, and the names of quantities that grew beyond their bounds."""
    soak, readings, start = Soak(options.kind, options.seed), [], time.monotonic()
    end, due = 60 * options.minutes, 0.0
    while True:
        now = time.monotonic() - start
        if now >= due or now >= end:
            readings.append(read(start))
            print(
                f"{now:7.0f} s  rss {readings[-1].rss_mib:8.1f} MiB  "
                f"anonymous {readings[-1].anonymous_mib:8.1f} MiB  "
                f"descriptors {readings[-1].descriptors:3.0f}  "
                f"threads {readings[-1].threads:3.0f}  moves {sum(soak.counts.values()):7d}",
                flush=True,
            )
            due += options.every
        if now >= end:
            break
        soak.play()
    soak.env.close()
    found = growth(readings)
    scale = options.bound_scale
    too_much = [name for name, one in found.items() if one["growth"] > scale * one["bound"]]
    result = {
        "kind": options.kind,
        "minutes": options.minutes,
        "moves": dict(soak.counts),
        "growth": found,
        "readings": [tuple(round(value, 1) for value in reading) for reading in readings],
        "passed": not too_much,
    }
    return result, too_much


def main(argv: Sequence[str] | None = None) -> int:
    """Soak, print the result, and return 1 if something grew."""
    parser = make_parser(__doc__)
    parser.add_argument("--kind", choices=["single", "vector"], default="single")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between readings")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--bound-scale", type=float, default=1.0, help="multiplies the bounds on growth"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    result, too_much = run(options)
    publish(result, options)
    if too_much:
        print(f"grew beyond its bound: {', '.join(too_much)}", file=sys.stderr)
    return int(bool(too_much))


if __name__ == "__main__":
    sys.exit(main())
