"""Many operations side by side, in one forward: AttentionSurgery-v0's vector environment.

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
from avatarl_env.rendering.ansi import RENDER_MODES, render
from avatarl_env.text.corpus import Corpus, load_corpus

AUTORESET_MODES = {mode.value: mode for mode in AutoresetMode}
Step = tuple[
    NDArray[np.float32],
    NDArray[np.float64],
    NDArray[np.bool_],
    NDArray[np.bool_],
    dict[str, Any],
]


class AttentionSurgeryVectorEnv(VectorEnv[NDArray[np.float32], NDArray[np.float32], Any]):
    """N operations on one model, each with its own prompts, dice and injury.

    Row i is what `AttentionSurgeryEnv` is with the seed of that row, up to the rounding of
    a larger batch: no weight is written, the operator's edits act on the rows of the batch instead.
    (An operator that cannot do that operates row after row.)

    The default autoreset mode is NEXT_STEP, Gymnasium's own, which RLlib assumes: the step after a
    row's last ignores the row's action, begins its next operation, and pays 0. Do not learn from
    that transition. SAME_STEP, which Stable-Baselines3 needs (`SB3VecEnv` asks for it
    itself), begins it at once: the observation returned is the first of the next operation, the
    last one is in `infos["final_obs"]` and its info in `infos["final_info"]`: how it ended is
    told there only, all else in `infos` is of the next. DISABLED leaves it to
    `reset(options={"reset_mask": ...})`, which is what TorchRL does by itself.
    """

    metadata = {  # noqa: RUF012 - Gymnasium's own way
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
        """Put a model on N tables at once.

        Args:
            num_envs: N, at least 1.
            lm: as for `AttentionSurgeryEnv`.
            autoreset_mode: `"NextStep"`, `"SameStep"` or `"Disabled"`, or the enumeration's.
            max_episode_steps: truncate operations there; default never.
            render_mode: None, `"ansi"` or `"rgb_array"`.
            **keywords: as for `AttentionSurgeryEnv`.

        Raises:
            ValueError: if an argument is unknown or out of range.
        """
        check_keywords("keyword", keywords, AttentionSurgeryVectorEnv, AttentionSurgeryEnv)
        num_envs = check_integer("num_envs", num_envs, 1)
        if max_episode_steps is not None:
            max_episode_steps = check_integer("max_episode_steps", max_episode_steps, 1)
        self.metadata = {**type(self).metadata}
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
        self._n_changes = [self.patient.n_changes] * num_envs
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
        """Put a live model on N tables; it is shared with the caller, not copied.

        Args:
            model: the patient, any that `Patient` takes; it stays on its device.
            tokenizer: its own.
            corpus: the text it is held against; a corpus, its name or a path.
            num_envs: N.
            **keywords: as for the constructor.
        """
        text = load_corpus(corpus) if isinstance(corpus, str) else corpus
        return cls(num_envs, Patient(model, tokenizer, text), **keywords)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When a row whose operation has ended begins the next; set it before a `reset`."""
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
        """Begin operations on the model as it stands.

        Args:
            seed: of row 0, row i's is `seed + i`; or one for each row; None goes on with the
                generators as they are.
            options: `{"reset_mask": (N,) bool}` to begin anew only where it is True.

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
            infos = self._add_info(infos, self._episode(row).info(self.task.score), row)
        return self._observations(), infos

    def step(self, actions: NDArray[np.float32]) -> Step:
        """Make one step in every operation.

        Args:
            actions: (N, A), clipped to [-1, 1]: an array, lists, or a tensor of any kind
                and device.

        Raises:
            RuntimeError: if a row has no operation under way (before `reset`, or after its end in
                mode DISABLED), the model changed since its `reset`, or the environment is closed.
            ValueError: if the actions have another shape or are not finite.
        """
        self._check_open()
        moves, shape = as_numbers("actions", actions), self.action_space.shape
        if moves.shape != shape:
            raise ValueError(f"actions must have shape {shape}, got {moves.shape}")
        late = self._is_done.copy()  # rows whose next operation begins in this step
        if late.any() and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise RuntimeError(f"reset() is needed where operations are over, {late.tolist()}")
        rows = np.flatnonzero(~late).tolist()
        episodes = [self._episode(row) for row in rows]
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
        episodes = [episode for episode in self._episodes if episode is not None]
        if len(episodes) < self.num_envs:
            raise RuntimeError("render() needs an operation: call reset() first")
        mode, tokenizer, labels = self.render_mode, self.patient.tokenizer, self.operator.labels
        return tuple(render(mode, episode, tokenizer, labels) for episode in episodes)

    def model_changed(self) -> None:
        """Say that the model's parameters changed: the operations under way are void."""
        self.patient.n_changes += 1

    def commit(self, row: int) -> None:
        """Keep a row's present operation in the weights; `reset` is then required.

        In mode SAME_STEP an operation that has ended is not present any more. Keep it with
        `env.patient.commit(env.operator, coefficients)`, whose coefficients are in its
        `final_info`.

        Raises:
            ValueError: if there is no such row.
            RuntimeError: if no step has been made, or the model changed since `reset`.
        """
        if row not in range(self.num_envs) or isinstance(row, bool):
            raise ValueError(f"row must be one of 0 to {self.num_envs - 1}, got {row}")
        episode = self._episodes[row]
        if episode is None or not episode.n_done or self._is_stale(row):
            raise RuntimeError(
                "commit() needs an operation begun on the model as it is: call reset()"
            )
        self.patient.commit(self.operator, episode.coefficients)

    def get_state(self) -> dict[str, Any]:
        """Return all that changes from step to step, but for the model: a copy."""
        changes = [None if self._is_stale(row) else n for row, n in enumerate(self._n_changes)]
        state = {"rngs": self._rngs, "episodes": self._episodes, "is_done": self._is_done}
        return copy.deepcopy(state | {"n_changes": changes})

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to what `get_state` returned; what follows is replayed exactly."""
        state = copy.deepcopy(state)
        self._rngs, self._episodes = state["rngs"], state["episodes"]
        self._is_done, self._n_changes = state["is_done"], state["n_changes"]

    def get_rng_state(self) -> list[dict[str, Any] | None]:
        """Return where each row's generator stands, plain data; None where there is none yet."""
        return [None if rng is None else dict(rng.bit_generator.state) for rng in self._rngs]

    def set_rng_state(self, dice: Sequence[Mapping[str, Any] | None]) -> None:
        """Put each row's generator where it was; operations under way are forgotten."""
        self._rngs = [None if state is None else np.random.default_rng() for state in dice]
        for rng, state in zip(self._rngs, dice, strict=True):
            if rng is not None and state is not None:
                rng.bit_generator.state = state
        self._episodes = [None] * self.num_envs
        self._is_done = np.zeros(self.num_envs, dtype=np.bool_)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Put every row's state back if the body fails: then it never happened."""
        # Shallow, since a step gives an episode new attributes and changes none.
        dice, episodes = self.get_rng_state(), [copy.copy(e) for e in self._episodes]
        is_done, n_changes = self._is_done.copy(), self._n_changes.copy()
        try:
            yield
        except BaseException:
            self.set_rng_state(dice)
            self._episodes, self._is_done, self._n_changes = episodes, is_done, n_changes
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
            self._n_changes[row] = self.patient.n_changes
            self._is_done[row] = False

    def _conclude(self, outcomes: dict[int, Outcome]) -> Step:
        """Make a step's return of the outcomes by row; where there is none, one has just begun."""
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
            outcomes = {row: o for row, o in outcomes.items() if row not in ended}
        for row in range(self.num_envs):
            if row in outcomes:
                info = outcomes[row].info
            else:
                info = self._episode(row).info(self.task.score)
            infos = self._add_info(infos, info, row)
        return self._observations(), rewards, terminated, truncated, infos

    def _observations(self) -> NDArray[np.float32]:
        """Return what each row sees, (N, O); zeros where no operation has begun yet."""
        observations = np.zeros(self.observation_space.shape or (), np.float32)
        for row, episode in enumerate(self._episodes):
            if episode is not None:
                observations[row] = self.task.observe(episode)
        return observations

    def _episode(self, row: int) -> Episode:
        episode = self._episodes[row]
        if episode is None:
            raise RuntimeError("step() needs an operation under way: call reset() first")
        if self._is_stale(row):
            raise RuntimeError("the model changed during the operation: call reset() first")
        return episode

    def _is_stale(self, row: int) -> bool:
        return self._n_changes[row] != self.patient.n_changes

    def _check_open(self) -> None:
        if self.closed:
            raise RuntimeError("the environment is closed: make another")
