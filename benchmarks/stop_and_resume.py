"""Does a run that is stopped and resumed again and again end exactly as an undisturbed run?

Every case starts in a fresh folder with a small version of the default preset: with the default
corpus, with a text given by its relative path, or with a run folder that is moved after each stop.
The run is stopped at random moments by Ctrl-C, SIGTERM and kill -9 in turn, and resumed by the
command that it printed (after kill -9 by the same one). In the end weights, metrics (except times)
and samples are compared bit for bit with those of an undisturbed run.

    python benchmarks/stop_and_resume.py --stops 4
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from avatarl_env.text.corpus import load_corpus

HOME = Path(__file__).resolve().parents[1]
SHORT = shlex.split(
    "--threads 1 --checkpoint-seconds 0.5 --lm.width 32 --lm.n-layers 1 "
    "--curriculum.bootstrap-updates 150 --curriculum.surgery-rounds 2 --curriculum.joint-rounds 2 "
    "--curriculum.updates-per-round 10 --curriculum.n-rows 4 --curriculum.paired-prompts 8 "
    "--curriculum.evaluate-every 20"
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
CLOCKS = ("seconds", "time/tokens_per_second")


def start(command: str, place: Path) -> subprocess.Popen[str]:
    """Start a command in a folder."""
    return subprocess.Popen(
        f"exec {command}",
        shell=True,
        cwd=place,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop(
    child: subprocess.Popen[str], number: int, metrics: Path, rng: random.Random
) -> str | None:
    """Send a signal some time after the run has written more; return stderr, None if it ended."""
    size = metrics.stat().st_size if metrics.exists() else 0
    while child.poll() is None and not (metrics.exists() and metrics.stat().st_size != size):
        time.sleep(0.05)
    time.sleep(rng.uniform(0.2, 4.0))
    if child.poll() is None:
        child.send_signal(number)
    _, err = child.communicate()
    return None if child.returncode == 0 else err


def outcome(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]], bytes]:
    """Return the results that do not depend on time: final weights, metrics and samples."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    rows = [
        {name: x for name, x in json.loads(line).items() if name not in CLOCKS} for line in lines
    ]
    weights = {
        f"{name}/{key}": tensor
        for name in ("best", "final")
        for key, tensor in load_file(folder / "checkpoints" / name / "model.safetensors").items()
    }
    return weights, rows, (folder / "samples.txt").read_bytes()


def same(folder: Path, other: Path) -> bool:
    """Whether two runs have the same weights, metrics and samples."""
    (left, *rest), (right, *others) = outcome(folder), outcome(other)
    equal = all(torch.equal(left[name], right[name]) for name in right)
    return left.keys() == right.keys() and equal and rest == others


def disturbed(
    place: Path, words: list[str], n_stops: int, rng: random.Random, *, moves: bool
) -> Any:
    """Start a run, stop it n times and let it end; return its folder and the signals sent."""
    sent: list[str] = []
    folder = place / "runs" / "first"
    command = shlex.join([sys.executable, str(HOME / "train.py"), *words, "--out", "runs/first"])
    for k in range(n_stops + 1):
        child = start(command, place)
        if k == n_stops:
            _, err = child.communicate()
            if child.returncode:
                raise SystemExit(err)
            break
        number = SIGNALS[k % 3]
        said = stop(child, number, folder / "metrics.jsonl", rng)
        if said is None:
            break
        sent.append(signal.Signals(number).name)
        found = re.search(r"stopped; [a-z ]+ with: (.*)\n", said)  # none before the first step
        sent[-1] += " with a checkpoint" if found else ""
        command = resume_command(folder.relative_to(place))
        if found and found[1] != command:
            raise SystemExit(f"the run printed {found[1]}, not {command}")
        if moves:
            folder = folder.rename(place / "runs" / f"moved {k}")
            command = resume_command(folder.relative_to(place))
    return folder, sent


def resume_command(folder: Path) -> str:
    """Return the command that a stopped run must print."""
    return shlex.join([sys.executable, str(HOME / "train.py"), "--resume", str(folder)])


def main() -> None:
    """Print one line for each case, then the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stops", type=int, default=4, help="of each run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of stopping")
    asked = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # A background job ignores Ctrl-C, and so would the runs that it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    rng, result = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        text = load_corpus("playwright").text[:60_000]
        wholes: dict[str, Path] = {}
        for case in ("default corpus", "relative path", "moved folder"):
            place = root / case
            place.mkdir()
            (place / "my.txt").write_text(text, encoding="utf-8")
            words = [*SHORT, *(["--corpus", "my.txt"] if case == "relative path" else [])]
            kind = "text" if case == "relative path" else "default"
            if kind not in wholes:
                command = shlex.join([sys.executable, str(HOME / "train.py"), *words])
                child = start(f"{command} --out whole", place)
                _, err = child.communicate()
                if child.returncode:
                    raise SystemExit(err)
                wholes[kind] = place / "whole"
            moves = case == "moved folder"
            folder, sent = disturbed(place, words, asked.stops, rng, moves=moves)
            equal = same(folder, wholes[kind])
            n_rows = len(outcome(folder)[1])
            print(f"{case:<15} {len(sent)} stops ({', '.join(sent)}), {n_rows} rows: equal {equal}")
            result.append({"case": case, "stops": sent, "rows": n_rows, "equal": equal})
    about = {"python": platform.python_version(), "torch": torch.__version__}
    print(json.dumps({"command": shlex.join(sys.argv), **about, "cases": result}))
    sys.exit(not all(case["equal"] for case in result))


if __name__ == "__main__":
    main()
