"""avatarl_env: a language model on the operating table, as a Gymnasium environment.

Importing this package registers ``AttentionSurgery-v0``; everything else loads when it is used.
"""

from __future__ import annotations

import importlib
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


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
