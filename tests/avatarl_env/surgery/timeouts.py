"""Programs on a model under an alarm that rings at a random moment and raises.

    python -m tests.avatarl_env.surgery.timeouts 1000 0

Prints how many of so many programs the alarm broke off, and fails if any left something behind.
"""

from __future__ import annotations

import contextlib
import random
import signal
import sys

import torch
from torch import nn

from avatarl_env.surgery import SurgicalTheater
from tests.avatarl_env.surgery.edits import (
    EDITS,
    SHAPE_CHANGING,
    Snapshot,
    optimizer_step,
    run_in_thread,
    shared,
    small,
)

GENTLE = [edit for edit in EDITS if edit not in (*SHAPE_CHANGING, optimizer_step, shared)]


def program(model: nn.Sequential, rng: random.Random) -> None:
    """Open theaters in theaters, edit in every way, commit to what the outermost undoes."""
    names = [name for name, _ in model.named_parameters()]
    with SurgicalTheater(model, [model]) as outer:
        for _ in range(rng.randrange(1, 4)):
            # Edits of what is not there any more, commits of what does not fit.
            with (
                contextlib.suppress(AttributeError, RuntimeError, ValueError),
                SurgicalTheater(model, rng.sample(names, rng.randrange(1, 5))) as inner,
            ):
                rng.choice(GENTLE)(model, rng.choice([outer, inner]))
                if rng.random() < 0.3:
                    inner.commit()


def ring(signum: int, frame: object) -> None:
    """Do as the handlers of timeouts do."""
    raise TimeoutError


def main(n_programs: int, seed: int) -> int:
    """Return how many timeouts broke a program off."""
    torch.set_num_threads(1)
    model, rng = small(), random.Random(seed)
    before, struck = Snapshot(model), 0
    elsewhere = SurgicalTheater(model, [model])

    def operate_elsewhere() -> None:
        with elsewhere:
            pass

    signal.signal(signal.SIGALRM, ring)
    for number in range(n_programs):
        try:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 1.5e-3))
                program(model, rng)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except TimeoutError:
            struck += 1
            before.assert_same()
        assert signal.getsignal(signal.SIGALRM) is ring
        if number % 50 == 0:  # no theater is left open: another thread is not refused
            assert run_in_thread(operate_elsewhere) is None
    before.assert_same()
    return struck


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2])))  # noqa: T201
