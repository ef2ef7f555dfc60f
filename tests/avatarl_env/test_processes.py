"""Environments in child processes, started in every way, after torch has used its threads.

Every program runs in a process with a time limit, because the fault to detect is a deadlock.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.patients import store_tiny_patient

SECONDS = 120  # to start three interpreters on a busy machine; the fault was to wait for ever
PRELUDE = """
    import functools, multiprocessing, os, sys
    import gymnasium, numpy as np, torch
    import avatarl_env

    torch.set_num_threads(2)
    WORDS = {"lm": sys.argv[1], "n_prompts": 2, "prompt_length": 8, "n_new": 4, "episode_length": 2}
    make = functools.partial(gymnasium.make, "avatarl_env:AttentionSurgery-v0", **WORDS)

    def use():
        "Compute on both threads, as a larger patient would."
        torch.ones(600, 600) @ torch.ones(600, 600)
        env = make()
        env.reset(seed=0)
        observation = env.step(np.zeros(env.action_space.shape))[0]
        env.close()
        return observation
"""
PROGRAMS = {
    "AsyncVectorEnv": """
        for method in ("fork", "forkserver", "spawn"):
            envs = gymnasium.vector.AsyncVectorEnv([make, make], context=method)
            observations, _ = envs.reset(seed=0)
            print(method, observations.shape[0], torch.get_num_threads())
            envs.close()
    """,
    "environment handed over": """
        env = make()
        env.reset(seed=0)
        def child(queue):
            torch.ones(600, 600) @ torch.ones(600, 600)
            queue.put(env.step(np.zeros(env.action_space.shape))[1])
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        process = context.Process(target=child, args=(queue,))
        process.start()
        print(queue.get(), torch.get_num_threads())
        process.join()
    """,
    "DataLoader": """
        class Rows(torch.utils.data.Dataset):
            def __len__(self):
                return 4
            def __getitem__(self, i):
                return float(use()[-1])
        loader = torch.utils.data.DataLoader(Rows(), num_workers=2)
        print(sum(len(batch) for batch in loader), torch.get_num_threads())
    """,
}
EXPECTED = {
    "AsyncVectorEnv": "fork 2 2\nforkserver 2 2\nspawn 2 2",
    "environment handed over": "0.0 2",
    "DataLoader": "4 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_tiny_patient(tmp_path_factory.mktemp("model"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.parametrize("program", PROGRAMS)
def test_children_answer_after_torch_has_used_two_threads(
    program: str, folder: str, tmp_path: Path
) -> None:
    text = textwrap.dedent(PRELUDE) + '\nif __name__ == "__main__":\n    use()\n'
    text += textwrap.indent(textwrap.dedent(PROGRAMS[program]), "    ")
    path = tmp_path / "program.py"
    path.write_text(text, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(path), folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    )
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        pytest.fail(f"no answer after {SECONDS} s")
    assert process.returncode == 0, err
    assert out.strip() == EXPECTED[program]


@pytest.mark.slow
def test_the_import_changes_no_setting_of_this_process() -> None:
    code = (
        "import torch, os; torch.set_num_threads(2); before = dict(os.environ)\n"
        "import avatarl_env\n"
        "assert torch.get_num_threads() == 2 and dict(os.environ) == before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)


def test_a_child_of_a_process_without_torch_loads_none() -> None:
    code = (
        "import avatarl_env, os, sys\n"
        "assert 'torch' not in sys.modules\n"
        "child = os.fork()\n"
        "if not child: os._exit('torch' in sys.modules)\n"
        "sys.exit(os.waitpid(child, 0)[1])\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=SECONDS)
