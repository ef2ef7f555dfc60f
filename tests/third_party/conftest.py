"""A stored tiny model and small sizes for the libraries to train on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.patients import store_tiny_patient

ENV_ID = "avatarl_env:AttentionSurgery-v0"


@pytest.fixture(scope="session")
def keywords(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Keywords of `gymnasium.make`: a tiny patient, operations of two steps."""
    folder = store_tiny_patient(tmp_path_factory.mktemp("model"))
    sizes = {"n_prompts": 2, "prompt_length": 8, "n_new": 4, "episode_length": 2}
    return {"lm": folder, **sizes}
