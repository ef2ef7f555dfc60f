"""AttentionSurgery-v0: the Gymnasium environment. Glue only; see `task.py` and `episode.py`."""

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
from avatarl_env.rendering import RENDER_MODES
from avatarl_env.surgery import Operator
from avatarl_env.task import SurgeryTask
from avatarl_env.text.corpus import Corpus
from avatarl_env.verification import TOLERANCE, Verification, verify


class UnknownRenderMode(ValueError, TypeError):
    """A render mode that the environment does not have.

    Also a TypeError: Stable-Baselines3, given an environment's name, tries a render mode and
    catches that.
    """


class AttentionSurgeryEnv(gymnasium.Env[NDArray[np.float32], NDArray[np.float32]]):
    """Edit the attention weights of a language model so that it writes better text.

    ## Description
    One episode is one operation on the model that `reset` finds. `reset` draws prompts of real text
    and one block of sampling noise; the unoperated model continues the prompts, which is the
    baseline. Each step moves coefficients, the operator turns them into edits
    of the attention weights, the operated model continues the same prompts with the same noise, and
    the weights are restored bit for bit. Between calls of `step` the model is always unoperated.

    ## Action Space
    `Box(-1, 1, (A,), float32)`: `c <- clip(c + step_size * action, -max_coefficient,
    max_coefficient)`. The operator defines what the A coefficients mean;
    `env.unwrapped.operator.labels` names them.

    ## Observation Space
    `Box(-10, 10, float32)`, clipped, with constant scaling. For a model of L attention layers and H
    heads:

    | Num   | Observation                                                     | Scale       |
    |-------|-----------------------------------------------------------------|-------------|
    | 16    | final hidden state at the prompts' last token, projected        | 1           |
    | L * H | log RMS of each head's queries (nats)                           | 0.5         |
    | L * H | log RMS of what each head writes (nats)                         | 0.5         |
    | 6     | baseline kl_ref, heldout_loss, distinct, collision_l2,          | 1, or 0.1   |
    |       | ref_loglik, entropy (nats/char except distinct, collision_l2)   | collision_l2|
    | 1     | score minus the baseline's                                      | 10          |
    | A     | coefficients, in [-max_coefficient, max_coefficient]            | 1           |
    | 1     | fraction of the steps left, in [0, 1]                           | 1           |

    Hidden state and heads are read from the operated model on the prompts. Score terms that are
    registered later are in `info["score_terms"]`, not in the observation.

    ## Rewards
    The increase of the score since the previous step (default score: `kl_ref`, see
    `avatarl_env.scoring.terms`), so an episode's return is the operation's total improvement, in
    nats per character. If the operation flatlines, the return is
    `min(-flatline_penalty, improvement)`, or `-flatline_penalty` for non-finite logits, whose text
    cannot be scored.

    ## Starting State
    `c = 0`. With `injury`, every evaluation is at `c_inj + c`, so the best answer is known:
    `c = -c_inj`. `injury > 0` draws a hidden `c_inj ~ U(-injury, injury)^A` for each operation; a
    sequence of A numbers is the `c_inj` of every operation.

    ## Episode End
    *Termination*: all steps are made, or the patient flatlines: non-finite logits, entropy outside
    [0.5, 1.5] times the unoperated model's, or trigram collisions more than 5 above its own (with
    an injury the bounds span the injured and the healthy model). *Truncation*: never.

    ## Info
    Every `reset` and `step` returns the same keys: `score`, `improvement`, `score_terms`,
    `baseline_terms`, `coefficients`, `flatline` (its cause, or `""`), `is_success` (whether the
    operation has ended without a flatline and with a better score) and `lost_score` (by how much
    the injury lowered the score, 0.0 without one).

    ## Rendering
    `"ansi"`: prompts, texts before and after, score terms, scores and coefficients, as a string.
    `"rgb_array"`: the coefficients (a heat map where they belong to layers and heads) and the score
    after each step, as a picture (400, 600, 3).

    ## Arguments
    See `__init__`. `AttentionSurgeryEnv.from_model` takes a live model.

    ## Version History
    * v0: first version.
    """

    metadata = {  # noqa: RUF012 - as Gymnasium declares it
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
        layers: int | str | Sequence[int | str] | None = None,
        score: Mapping[str, float] | None = None,
        episode_length: int = 4,
        step_size: float = 0.5,
        max_coefficient: float = 1.0,
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
        """Load the model and set the rules.

        Args:
            lm: `"bundled"`, a run folder or a model folder (or a `Patient`, in Python).
            corpus: corpus name or path; default the one the model was trained on.
            operator: name of the operator.
            operator_options: its keyword arguments.
            layers: attention layers to operate on: numbers, names or globs; default all.
            score: weights by term name; default `{"kl_ref": 1.0}`. Fixed for the env's life.
            episode_length: steps of an episode, at least 1.
            step_size: largest change of a coefficient in one step;
                episode_length * step_size >= max_coefficient.
            max_coefficient: largest coefficient, in (0, 1]; 0.1 makes a cautious surgeon.
            n_prompts: texts written per evaluation, at least 2.
            prompt_length: tokens of real text in each prompt, at least 2.
            n_new: tokens written after each prompt, at least 4.
            split: part of the corpus that prompts come from.
            injury: half-width of the hidden injury, in [0, 1]; or the injury of every operation,
                A numbers in [-1, 1].
            flatline_penalty: largest return of an operation that flatlines, negated.
            device: device of a loaded model.
            dtype: precision of a loaded model's weights.
            render_mode: None, `"ansi"` or `"rgb_array"`.
            **unknown: refused.

        Raises:
            ValueError: if an argument is unknown or out of range, or prompt plus new text does not
                fit the model's context.
        """
        check_keywords("keyword", unknown, AttentionSurgeryEnv)
        if not (
            render_mode is None or (isinstance(render_mode, str) and render_mode in RENDER_MODES)
        ):
            raise UnknownRenderMode(
                f"render_mode must be None or one of {[*RENDER_MODES]}, got {shown(render_mode)}"
            )
        # Checked before a model is loaded.
        config = EpisodeConfig(
            episode_length=episode_length,
            step_size=step_size,
            max_coefficient=max_coefficient,
            n_prompts=n_prompts,
            prompt_length=prompt_length,
            n_new=n_new,
            split=split,
            injury=injury,  # type: ignore[arg-type]  # converted to a tuple
            flatline_penalty=flatline_penalty,
        )
        if not isinstance(lm, Patient):
            self.patient = Patient.load(lm, corpus, device, dtype)
        elif (corpus, device, dtype) == (None, "cpu", "float32"):
            self.patient = lm
        else:
            raise ValueError(
                "corpus, device and dtype are for stored models, but lm is a Patient, "
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
        self._is_closed = False

    @classmethod
    def from_model(
        cls, model: nn.Module, tokenizer: Any, corpus: Corpus | str, **keywords: Any
    ) -> Self:
        """Make an environment on a live model, which is shared with the caller, not copied.

        Args:
            model: any that `Patient` takes; it stays on its device.
            tokenizer: the model's.
            corpus: a corpus, its name or a path.
            **keywords: as for the constructor.
        """
        return cls(Patient(model, tokenizer, corpus), **keywords)

    @property
    def config(self) -> EpisodeConfig:
        """The rules of an episode."""
        return self.task.config

    @property
    def operator(self) -> Operator:
        """The operator, which turns coefficients into weight edits."""
        return self.task.operator

    def step(
        self, action: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        """Make one step.

        Args:
            action: (A,), clipped to [-1, 1]: an array, a list, or a tensor of any dtype and device.

        Raises:
            RuntimeError: if there is no operation under way, the model changed since `reset`, or
                the environment is closed.
            ValueError: if the action has the wrong shape or is not finite.
        """
        self._check_open()
        episode = self.task.check_current(self._episode)
        if episode.is_over:
            raise RuntimeError("step() needs an operation under way: call reset() first")
        (outcome,) = self.task.step([episode], [action])
        observation = self.task.observe(episode)
        return observation, outcome.reward, outcome.terminated, False, outcome.info

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Begin an operation on the current model.

        Args:
            seed: seeds everything drawn from now on, an integer of at least 0; None keeps the
                state of the generator.
            options: None or {}; there are no options.

        Raises:
            RuntimeError: if the environment is closed.
            ValueError: if the seed is not such an integer, or there are options.
        """
        self._check_open()
        check_options(options, ())
        super().reset(seed=check_seed("seed", seed))
        (self._episode,) = self.task.begin([self.task.draw(self.np_random)])
        return self.task.observe(self._episode), self._episode.info(self.task.score)

    def close(self) -> None:
        """Drop the operation under way; the model belongs to the caller and is left alone."""
        self._episode, self._is_closed = None, True

    def render(self) -> str | NDArray[np.uint8] | None:
        """Return the operation as text or as a picture (400, 600, 3), None without a render mode.

        Raises:
            RuntimeError: before the first `reset`.
        """
        if self.render_mode is None:
            gymnasium.logger.warn("render() does nothing without a render_mode, such as 'ansi'")
            return None
        return self.task.render(self.render_mode, self._episode)

    def model_changed(self) -> None:
        """Report that the model's parameters changed, which voids operations under way."""
        self.patient.n_changes += 1

    def commit(self) -> None:
        """Write the operation (never its injury) to the weights; `reset` is then required.

        Raises:
            RuntimeError: if there is no operation, or the model changed since `reset`.
        """
        self.task.commit(self._episode)

    def verify(
        self,
        actions: ArrayLike,
        seed: int,
        total: float | None = None,
        tolerance: float = TOLERANCE,
    ) -> Verification:
        """Replay an operation and compare its return with a claim.

        Anyone with the same model, text and keywords can check a record of seed, actions and
        return: for leaderboards, bug reports and papers. The operation under way and the generator
        are left alone.

        Args:
            actions: (n, A), all actions of one operation.
            seed: the one given to `reset`.
            total: the claimed return; None if there is no claim.
            tolerance: as for `avatarl_env.verification.verify`.

        Raises:
            ValueError: if the actions are not all of one operation, or the seed is invalid.
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
        """Return a copy of everything that changes from step to step, except the model.

        An operation that is void because the model changed is left out.
        """
        episode = self._episode
        if episode is not None and self.task.is_stale(episode):
            episode = None
        return copy.deepcopy({"rng": self.np_random.bit_generator.state, "episode": episode})

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_state` returned; the steps after it then repeat exactly."""
        state = copy.deepcopy(state)
        self.np_random.bit_generator.state = state["rng"]
        self._episode = state["episode"]

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the environment is closed: make another")
