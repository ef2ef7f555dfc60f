"""AttentionSurgery-v0's vector environment: many operations side by side, in one forward.

Shapes: N rows, A coefficients, O numbers in an observation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import gymnasium
import numpy as np
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import nn

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.episode import Episode, Outcome
from avatarl_env.errors import (
    as_numbers,
    check_choice,
    check_integer,
    check_keywords,
    check_mask,
    check_options,
    check_seeds,
)
from avatarl_env.patient import Patient
from avatarl_env.rendering import RENDER_MODES
from avatarl_env.text.corpus import Corpus

AUTORESET_MODES = {mode.value: mode for mode in AutoresetMode}
Step = tuple[
    NDArray[np.float32],
    NDArray[np.float64],
    NDArray[np.bool_],
    NDArray[np.bool_],
    dict[str, Any],
]


class AttentionSurgeryVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.float32], Any]):
    """N operations on one model, each with its own prompts, noise and injury.

    Row i equals `AttentionSurgeryEnv` with that row's seed, up to the rounding of a larger batch.
    No weight is written: the operator's edits act on the rows of the batch. (An operator without
    `row_edits` operates row after row.)

    Autoreset modes:

    * NEXT_STEP, the default, as in Gymnasium and RLlib: the step after a row's last one ignores the
      row's action and begins its next operation, with reward 0. Do not learn from that transition.
    * SAME_STEP, as in Stable-Baselines3 (`SB3VecEnv` sets it itself): the next operation begins at
      once. The observation and info returned are the next operation's; those of the operation that
      ended are in `infos["final_obs"]` and `infos["final_info"]`.
    * DISABLED: rows that have ended wait for `reset(options={"reset_mask": ...})`, as TorchRL does.
    """

    metadata = {  # noqa: RUF012 - as Gymnasium declares it
        "render_modes": [*RENDER_MODES],
        "render_fps": 2,
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self,
        num_envs: int = 1,
        lm: str | Patient = "bundled",
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **keywords: Any,
    ) -> None:
        """Load the model and set the rules.

        Args:
            num_envs: N, at least 1.
            lm: as for `AttentionSurgeryEnv`.
            autoreset_mode: `"NextStep"`, `"SameStep"` or `"Disabled"`, or the enum member.
            max_episode_steps: truncate operations after this number of steps; default never.
            render_mode: None, `"ansi"` or `"rgb_array"`.
            **keywords: as for `AttentionSurgeryEnv`.

        Raises:
            ValueError: if an argument is unknown or out of range.
        """
        check_keywords("keyword", keywords, AttentionSurgeryVectorEnv, AttentionSurgeryEnv)
        num_envs = check_integer("num_envs", num_envs, 1)
        if max_episode_steps is not None:
            max_episode_steps = check_integer("max_episode_steps", max_episode_steps, 1)
        self.autoreset_mode = autoreset_mode
        single = AttentionSurgeryEnv(lm, render_mode=render_mode, **keywords)
        single.task.check_memory(num_envs)
        self.num_envs = num_envs
        self.task = single.task
        self.patient = single.patient
        self.config = single.config
        self.operator = single.operator
        self.render_mode = render_mode
        self.max_episode_steps = max_episode_steps
        self.single_observation_space = single.observation_space
        self.single_action_space = single.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator | None] = [None] * num_envs
        self._episodes: list[Episode | None] = [None] * num_envs
        self._is_done = np.zeros(num_envs, dtype=np.bool_)

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        tokenizer: Any,
        corpus: Corpus | str,
        num_envs: int = 1,
        **keywords: Any,
    ) -> Self:
        """Make an environment on a live model, which is shared with the caller, not copied.

        Args:
            model: any that `Patient` takes; it stays on its device.
            tokenizer: the model's.
            corpus: a corpus, its name or a path.
            num_envs: N.
            **keywords: as for the constructor.
        """
        return cls(num_envs, Patient(model, tokenizer, corpus), **keywords)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When a row begins its next operation after one has ended; set it before a `reset`."""
        mode: AutoresetMode = self.metadata["autoreset_mode"]
        return mode

    @autoreset_mode.setter
    def autoreset_mode(self, mode: AutoresetMode | str) -> None:
        if not isinstance(mode, AutoresetMode):
            check_choice("autoreset_mode", mode, AUTORESET_MODES)
            mode = AUTORESET_MODES[mode]
        self.metadata = {**self.metadata, "autoreset_mode": mode}

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin operations on the current model.

        Args:
            seed: row i gets `seed + i`; or a sequence with one seed for each row; None keeps the
                state of the generators.
            options: `{"reset_mask": (N,) bool}` resets only the rows where it is True.

        Raises:
            RuntimeError: if the environment is closed.
            ValueError: if there are not N seeds, the mask is not (N,) bool with a True, or there is
                another option.
        """
        self._check_open()
        seeds = check_seeds("seed", seed, self.num_envs)
        given = check_options(options, ["reset_mask"]).get("reset_mask")
        rows = np.flatnonzero(check_mask("reset_mask", given, self.num_envs)).tolist()
        with self._all_or_nothing():
            for row in rows:
                if seeds[row] is not None or self._rngs[row] is None:
                    self._rngs[row], _ = seeding.np_random(seeds[row])
            self._begin(rows)
        infos: dict[str, Any] = {}
        for row in rows:
            infos = self._add_info(infos, self._info(row), row)
        return self._observations(), infos

    def step(self, actions: NDArray[np.float32]) -> Step:
        """Make one step in every operation.

        Args:
            actions: (N, A), clipped to [-1, 1]: an array, lists, or a tensor of any dtype and
                device.

        Raises:
            RuntimeError: if a row has no operation under way (before `reset`, or after its end in
                mode DISABLED), the model changed since its `reset`, or the environment is closed.
            ValueError: if the actions have the wrong shape or are not finite.
        """
        self._check_open()
        moves, shape = as_numbers("actions", actions), self.action_space.shape
        if moves.shape != shape:
            raise ValueError(f"actions must have shape {shape}, got {moves.shape}")
        late = self._is_done.copy()  # rows whose next operation begins in this step
        if late.any() and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise RuntimeError(f"reset() is needed where operations are over, got {late.tolist()}")
        rows = np.flatnonzero(~late).tolist()
        episodes = [self.task.check_current(self._episodes[row]) for row in rows]
        with self._all_or_nothing():
            outcomes = self.task.step(episodes, list(moves[rows]))
            self._begin(np.flatnonzero(late).tolist())
            return self._conclude(dict(zip(rows, outcomes, strict=True)))

    def render(self) -> tuple[Any, ...] | None:
        """Return every row's operation, as a string or a picture, or None without a render mode.

        In mode SAME_STEP a row that has ended shows the operation that has just begun.

        Raises:
            RuntimeError: before the first `reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn("render() does nothing without a render_mode, such as 'ansi'")
            return None
        return tuple(self.task.render(self.render_mode, episode) for episode in self._episodes)

    def model_changed(self) -> None:
        """Report that the model's parameters changed, which voids operations under way."""
        self.patient.n_changes += 1

    def commit(self, row: int) -> None:
        """Write a row's operation to the weights; `reset` is then required.

        In mode SAME_STEP an operation that has ended is already replaced by the next one. Commit it
        with `env.patient.commit(env.operator, coefficients)`, coefficients from its `final_info`.

        Raises:
            ValueError: if there is no such row.
            RuntimeError: if no step has been made, or the model changed since `reset`.
        """
        if row not in range(self.num_envs) or isinstance(row, bool):
            raise ValueError(f"row must be one of 0 to {self.num_envs - 1}, got {row}")
        episode = self._episodes[row]
        self.task.commit(episode if episode is not None and episode.n_done else None)

    def get_state(self) -> dict[str, Any]:
        """Return a copy of everything that changes from step to step, except the model.

        Operations that are void because the model changed are left out.
        """
        episodes = [None if e is None or self.task.is_stale(e) else e for e in self._episodes]
        return copy.deepcopy({"rngs": self._rngs, "episodes": episodes, "is_done": self._is_done})

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_state` returned; the steps after it then repeat exactly."""
        state = copy.deepcopy(state)
        self._rngs, self._episodes = state["rngs"], state["episodes"]
        self._is_done = state["is_done"]

    def get_rng_state(self) -> list[dict[str, Any] | None]:
        """Return the state of each row's generator, plain data; None for a row without one yet."""
        return [None if rng is None else dict(rng.bit_generator.state) for rng in self._rngs]

    def set_rng_state(self, states: Sequence[Mapping[str, Any] | None]) -> None:
        """Restore each row's generator; operations under way are dropped."""
        self._rngs = [None if state is None else np.random.default_rng() for state in states]
        for rng, state in zip(self._rngs, states, strict=True):
            if rng is not None and state is not None:
                rng.bit_generator.state = state
        self._episodes = [None] * self.num_envs
        self._is_done = np.zeros(self.num_envs, dtype=np.bool_)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Restore every row's state if the body fails."""
        # Shallow copies: a step gives an episode new attributes and changes none in place.
        rng_states, episodes = self.get_rng_state(), [copy.copy(e) for e in self._episodes]
        is_done = self._is_done.copy()
        try:
            yield
        except BaseException:
            self.set_rng_state(rng_states)
            self._episodes, self._is_done = episodes, is_done
            raise

    def _begin(self, rows: Sequence[int]) -> None:
        """Begin an operation in each of these rows."""
        draws = []
        for row in rows:
            rng = self._rngs[row]
            assert rng is not None
            draws.append(self.task.draw(rng))
        for row, episode in zip(rows, self.task.begin(draws), strict=True):
            self._episodes[row] = episode
            self._is_done[row] = False

    def _conclude(self, outcomes: dict[int, Outcome]) -> Step:
        """Return a step's result from the outcomes by row; rows without one have just begun."""
        rewards = np.zeros(self.num_envs)
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        truncated = np.zeros(self.num_envs, dtype=np.bool_)
        infos: dict[str, Any] = {}
        for row, outcome in outcomes.items():
            rewards[row], terminated[row] = outcome.reward, outcome.terminated
            limit = self.max_episode_steps
            truncated[row] = limit is not None and self._episode(row).n_done >= limit
        self._is_done = terminated | truncated
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._is_done.any():
            ended = np.flatnonzero(self._is_done).tolist()
            for row in ended:
                final = {"final_obs": self.task.observe(self._episode(row))}
                infos = self._add_info(infos, {**final, "final_info": outcomes[row].info}, row)
            self._begin(ended)
        for row in range(self.num_envs):
            infos = self._add_info(infos, self._info(row), row)
        return self._observations(), rewards, terminated, truncated, infos

    def _observations(self) -> NDArray[np.float32]:
        """Return each row's observation, (N, O); zeros for a row without an operation."""
        observations = np.zeros(self.observation_space.shape or (), np.float32)
        for row, episode in enumerate(self._episodes):
            if episode is not None:
                observations[row] = self.task.observe(episode)
        return observations

    def _info(self, row: int) -> dict[str, Any]:
        return self._episode(row).info(self.task.score)

    def _episode(self, row: int) -> Episode:
        episode = self._episodes[row]
        assert episode is not None
        return episode

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the environment is closed: make another")
