"""AttentionSurgery-v0: the Gymnasium environment. Glue only."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import gymnasium
import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from avatarl_env.episode import Episode, EpisodeConfig
from avatarl_env.errors import check_keywords, check_options, check_seed, shown
from avatarl_env.patient import Patient
from avatarl_env.rendering.ansi import RENDER_MODES, render
from avatarl_env.scoring import Score
from avatarl_env.surgery import Operator
from avatarl_env.task import SurgeryTask
from avatarl_env.text.corpus import Corpus, load_corpus
from avatarl_env.verification import TOLERANCE, Verification, verify


class UnknownRenderMode(ValueError, TypeError):
    """A render mode that the environment does not have.

    Also a TypeError, since code that tries a render mode and can do without (Stable-Baselines3,
    given an environment's name) goes by that.
    """


class AttentionSurgeryEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Operate on the attention weights of a language model, for the sake of what it writes.

    ## Description
    One episode is one operation on the model as it stands when `reset` is called. `reset` draws
    prompts of real text and one block of uniforms; the unoperated model continues the prompts, the
    baseline. Each step is a step: it moves coefficients, the operator turns them into edits of
    the attention weights, the operated model continues the same prompts with the same uniforms, and
    the weights are put back bit for bit. Between calls of `step` the model is always unoperated.

    ## Action Space
    `Box(-1, 1, (A,), float32)`: `c <- clip(c + step_size * action, -1, 1)`. What the A coefficients
    mean is the operator's business: `env.unwrapped.operator.labels` names them.

    ## Observation Space
    `Box(-10, 10, float32)`: readings of the operated model while it reads the prompts, the
    baseline's score terms, the improvement so far, the coefficients and the time left; the table is
    in `avatarl_env.observation.Observation`. Its scaling is constant.

    ## Rewards
    The rise of the score (default: `kl_ref`, see `avatarl_env.scoring`) since the step before. An
    episode's return is the operation's total improvement, nats per character; that of an operation
    that ends in a flatline is `-flatline_penalty`.

    ## Starting State
    `c = 0`. With an injury every evaluation is at `c_inj + c`, so that the best answer is known,
    `c = -c_inj`. `injury > 0` draws a hidden `c_inj ~ U(-injury, injury)^A`, another one each time;
    a sequence of A numbers is itself the `c_inj` of every operation.

    ## Episode End
    *Termination*: all steps made; or a flatline: non-finite logits, entropy outside
    [0.5, 1.5] times the unoperated model's, or trigram collisions more than 5 above its own (with
    an injury, the bounds span the injured and the healthy model). `info["flatline"]` names the
    cause. *Truncation*: never by this environment.

    ## Info
    The same keys from every `reset` and `step`: `score`, `improvement`, `score_terms`,
    `baseline_terms`, `coefficients`, `flatline` (`""` while the patient lives), `is_success` (False
    until the operation has ended, with a patient that lives and a better score) and `lost_score`
    (what the injury had cost, 0.0 without one).

    ## Rendering
    `"ansi"`: prompts, texts before and after, score terms, scores and coefficients, as a string.
    `"rgb_array"`: the coefficients, as a heat map where they belong to layers and heads, and the
    score after each step, as a picture (400, 600, 3).

    ## Version History
    * v0: first version.
    """

    metadata = {  # noqa: RUF012 - Gymnasium's own way
        "render_modes": [*RENDER_MODES],
        "render_fps": 2,
    }

    def __init__(  # noqa: PLR0913 - a Gymnasium environment is configured by flat keywords
        self,
        lm: str | Patient = "bundled",
        *,
        corpus: str | None = None,
        operator: str = "head_gain",
        operator_options: Mapping[str, Any] | None = None,
        layers: Sequence[int | str] | None = None,
        score: Mapping[str, float] | None = None,
        episode_length: int = 4,
        step_size: float = 0.5,
        n_prompts: int = 32,
        prompt_length: int = 32,
        n_new: int = 64,
        split: str = "surgeon",
        injury: float | Sequence[float] = 0.0,
        flatline_penalty: float = 1.0,
        device: str = "cpu",
        dtype: str = "float32",
        render_mode: str | None = None,
        **unknown: Any,
    ) -> None:
        """Put a model on the table.

        Args:
            lm: `"bundled"`, a run folder or a model folder (or a `Patient`, in Python).
            corpus: corpus name or path; default the one the model learned.
            operator: name of the operator.
            operator_options: its keyword arguments.
            layers: attention layers to operate on: numbers, names or globs; default all.
            score: weights by term name; default `{"kl_ref": 1.0}`. Fixed for the env's life.
            episode_length: steps of an episode, at least 1.
            step_size: most that a step moves a coefficient; episode_length * step_size >= 1.
            n_prompts: texts written per evaluation, at least 2.
            prompt_length: tokens of real text that each continues, at least 2.
            n_new: tokens written after each prompt, at least 4.
            split: part of the corpus that prompts come from.
            injury: half-width of the hidden injury, in [0, 1]; or the injury of every operation,
                A numbers in [-1, 1].
            flatline_penalty: minus the return of a flatlined operation.
            device: where a loaded model goes.
            dtype: of a loaded model's weights.
            render_mode: None; `"ansi"`, the texts before and after, as a string; or `"rgb_array"`,
                the coefficients and the score, as a picture.
            **unknown: refused.

        Raises:
            ValueError: if an argument is unknown or out of range, or prompt plus new text does not
                fit the model's context.
        """
        check_keywords("keyword", unknown, AttentionSurgeryEnv)
        modes = self.metadata["render_modes"]
        if not (render_mode is None or (isinstance(render_mode, str) and render_mode in modes)):
            raise UnknownRenderMode(
                f"render_mode must be None or one of {modes}, got {shown(render_mode)}"
            )
        # What needs no model is checked before one is loaded.
        config = EpisodeConfig(
            episode_length=episode_length,
            step_size=step_size,
            n_prompts=n_prompts,
            prompt_length=prompt_length,
            n_new=n_new,
            split=split,
            injury=injury,  # type: ignore[arg-type]  # which makes a tuple of any sequence
            flatline_penalty=flatline_penalty,
        )
        if not isinstance(lm, Patient):
            self.patient = Patient.load(lm, corpus, device, dtype)
        elif (corpus, device, dtype) == (None, "cpu", "float32"):
            self.patient = lm
        else:
            raise ValueError(
                "corpus, device and dtype are for stored models, a live one brings its own, "
                f"got {corpus!r}, {device!r} and {dtype!r}"
            )
        self.task = SurgeryTask(
            self.patient,
            config,
            operator=operator,
            operator_options=operator_options,
            layers=layers,
            score=score,
        )
        self.observation_space = self.task.observation_space()
        self.action_space = self.task.action_space()
        self.render_mode = render_mode
        self._episode: Episode | None = None
        # Of the patient when the episode began; None: the episode was void when it was saved.
        self._n_changes: int | None = self.patient.n_changes
        self._is_closed = False

    @classmethod
    def from_model(
        cls, model: nn.Module, tokenizer: Any, corpus: Corpus | str, **keywords: Any
    ) -> Self:
        """Put a live model on the table; it is shared with the caller, not copied.

        Args:
            model: the patient, any that `Patient` takes; it stays on its device.
            tokenizer: its own.
            corpus: the text it is held against; a corpus, its name or a path.
            **keywords: as for the constructor.
        """
        text = load_corpus(corpus) if isinstance(corpus, str) else corpus
        return cls(Patient(model, tokenizer, text), **keywords)

    @property
    def config(self) -> EpisodeConfig:
        """The rules."""
        return self.task.config

    @property
    def operator(self) -> Operator:
        """What turns coefficients into edits."""
        return self.task.operator

    @property
    def score(self) -> Score:
        """What an evaluation is worth."""
        return self.task.score

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Make one step.

        Args:
            action: (A,), clipped to [-1, 1]: an array, a list, or a tensor of any kind and device.

        Raises:
            RuntimeError: if there is no operation under way, the model changed since `reset`, or
                the environment is closed.
            ValueError: if the action has another shape than the action space or is not finite.
        """
        episode = self._episode_under_way()
        (outcome,) = self.task.step([episode], [action])
        observation = self.task.observe(episode)
        return observation, outcome.reward, outcome.terminated, False, outcome.info

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an operation on the model as it stands.

        Args:
            seed: of everything drawn from here on, an integer of at least 0; None goes on with the
                generator as it is.
            options: None or {}: there are none.

        Raises:
            RuntimeError: if the environment is closed.
            ValueError: if the seed is no such integer, or there are options.
        """
        if self._is_closed:
            raise RuntimeError("the environment is closed: make another")
        check_options(options, ())
        super().reset(seed=check_seed("seed", seed))
        (self._episode,) = self.task.begin([self.task.draw(self.np_random)])
        self._n_changes = self.patient.n_changes
        return self.task.observe(self._episode), self._episode.info(self.score)

    def close(self) -> None:
        """Forget the operation under way; the model is the caller's, and stays."""
        self._episode, self._is_closed = None, True

    def render(self) -> str | NDArray[np.uint8] | None:
        """Return the operation as text or as a picture (400, 600, 3), None without a render mode.

        Raises:
            RuntimeError: before the first `reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn("render() does nothing without a render_mode, such as 'ansi'")
            return None
        if self._episode is None:
            raise RuntimeError("render() needs an operation: call reset() first")
        return render(self.render_mode, self._episode, self.patient.tokenizer, self.operator.labels)

    def model_changed(self) -> None:
        """Say that the model's parameters changed.

        The operation under way is void, and so are those of other environments on this patient.
        """
        self.patient.n_changes += 1

    def commit(self) -> None:
        """Keep the present operation (never the injury) in the weights; `reset` is then required.

        Raises:
            RuntimeError: if there is no operation, or the model changed since `reset`.
        """
        if self._episode is None or self._is_stale():
            raise RuntimeError("commit() needs an operation on the model as it is: call reset()")
        self.patient.commit(self.operator, self._episode.coefficients)

    def verify(
        self,
        actions: ArrayLike,
        seed: int,
        total: float | None = None,
        tolerance: float = TOLERANCE,
    ) -> Verification:
        """Perform an operation again, and say whether it returns what somebody claims it does.

        What `reset(seed=seed)` and these actions return is a record that anyone can check who has
        the same model, text and keywords: for leaderboards, bug reports and papers. The operation
        under way and the generators are left alone.

        Args:
            actions: (n, A) of one whole operation.
            seed: what `reset` was given.
            total: the return that is claimed; None to learn it.
            tolerance: as for `avatarl_env.verification.verify`.

        Raises:
            ValueError: if the actions are not those of one whole operation, or there is no seed.
        """
        return verify(self.task, actions, seed, total, tolerance)

    def fork(self) -> Self:
        """Return an environment in the same state on the same (shared) model."""
        other = copy.copy(self)
        other._np_random = copy.deepcopy(self._np_random)
        other._episode = copy.deepcopy(self._episode)
        other.action_space = copy.deepcopy(self.action_space)
        other.observation_space = copy.deepcopy(self.observation_space)
        return other

    def get_state(self) -> dict[str, Any]:
        """Return all that changes from step to step, but for the model: a copy."""
        n_changes = None if self._is_stale() else self._n_changes
        state = {"rng": self.np_random.bit_generator.state, "episode": self._episode}
        return copy.deepcopy(state | {"n_changes": n_changes})

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to what `get_state` returned; what follows is replayed exactly."""
        state = copy.deepcopy(state)
        self.np_random.bit_generator.state = state["rng"]
        self._episode = state["episode"]
        self._n_changes = state["n_changes"]

    def _is_stale(self) -> bool:
        return self._n_changes != self.patient.n_changes

    def _episode_under_way(self) -> Episode:
        if self._is_closed:
            raise RuntimeError("the environment is closed: make another")
        if self._episode is None or self._episode.is_over:
            raise RuntimeError("step() needs an operation under way: call reset() first")
        if self._is_stale():
            raise RuntimeError("the model changed during the operation: call reset() first")
        return self._episode
