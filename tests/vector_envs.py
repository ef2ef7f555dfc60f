"""The tiny patient on several tables at once."""

from __future__ import annotations

from typing import Any

from avatarl_env.patient import Patient
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import SIZES, tiny_patient


def tiny_vector_env(
    num_envs: int = 3, patient: Patient | None = None, **keywords: Any
) -> AttentionSurgeryVectorEnv:
    """Return a vector environment on ``patient``, or on a new tiny one."""
    return AttentionSurgeryVectorEnv(num_envs, patient or tiny_patient(), **{**SIZES, **keywords})
