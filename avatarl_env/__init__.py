"""avatarl_env: surgery on the attention weights of a language model, as a Gymnasium environment.

Importing this package registers `AttentionSurgery-v0`; everything else loads on first use. It
changes no setting of this process. Processes forked from it start with one torch thread.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

import gymnasium

if TYPE_CHECKING:
    from avatarl_env.env import AttentionSurgeryEnv
    from avatarl_env.lm.gpt import GPT, GPTConfig
    from avatarl_env.lm.tokenizer import CharTokenizer
    from avatarl_env.patient import Patient
    from avatarl_env.surgery import HeadGain, Overlay, SurgicalTheater, find_targets
    from avatarl_env.text.corpus import Corpus, load_corpus
    from avatarl_env.vector_env import AttentionSurgeryVectorEnv

ENV_ID = "AttentionSurgery-v0"

_HOMES = {
    "AttentionSurgeryEnv": "avatarl_env.env",
    "AttentionSurgeryVectorEnv": "avatarl_env.vector_env",
    "CharTokenizer": "avatarl_env.lm.tokenizer",
    "Corpus": "avatarl_env.text.corpus",
    "GPT": "avatarl_env.lm.gpt",
    "GPTConfig": "avatarl_env.lm.gpt",
    "HeadGain": "avatarl_env.surgery",
    "Overlay": "avatarl_env.surgery",
    "Patient": "avatarl_env.patient",
    "SurgicalTheater": "avatarl_env.surgery",
    "find_targets": "avatarl_env.surgery",
    "load_corpus": "avatarl_env.text.corpus",
}

__all__ = [
    "ENV_ID",
    "GPT",
    "AttentionSurgeryEnv",
    "AttentionSurgeryVectorEnv",
    "CharTokenizer",
    "Corpus",
    "GPTConfig",
    "HeadGain",
    "Overlay",
    "Patient",
    "SurgicalTheater",
    "find_targets",
    "load_corpus",
]

if ENV_ID not in gymnasium.registry:
    gymnasium.register(
        ENV_ID,
        entry_point="avatarl_env.env:AttentionSurgeryEnv",
        vector_entry_point="avatarl_env.vector_env:AttentionSurgeryVectorEnv",
    )


def _compute_on_one_thread() -> None:
    """Set torch to one thread, in a forked child."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


# A forked child has only the thread that called fork(). If torch has used several threads before,
# the child's first large product would wait for the others forever, for example in an environment
# that AsyncVectorEnv forks on Linux. The parent and spawned processes keep their threads; a child
# that needs several can call torch.set_num_threads().
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_on_one_thread)


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
