"""Every number that a run writes: its name, the rows that have it, its unit and its formula.

The README's table is `markdown_table`. `metrics.jsonl` holds nested mappings where names
have a second slash: `commit/kl_ref_gain/mean` is the field `mean` of `commit/kl_ref_gain`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from agents.grpo.metrics import CLOCK, LEARNING, Metric

__all__ = ["AXES", "CLOCK", "METRICS", "Metric", "markdown_table", "numbers"]

AXES = {
    "grpo": "update",
    "evaluation": "update",
    "operation": "operation",
    "surgeon": "operation",
    "commit": "operation",
    "behavior": "operation",
    "sample": "update",
}
"""Kinds of rows, each with the field of the clock that counts its steps."""


def _of_term(term: str) -> tuple[str, str]:
    return f"score/{term}", f"baseline/{term}"


def _interval(name: str) -> tuple[str, ...]:
    return tuple(f"commit/{name}/{part}" for part in ("mean", "low", "high", "lower_bound"))


_SAC = ("sac", "tqc", "crossq")
_OFF_POLICY = (*_SAC, "td3", "ddpg")
_CLIPPED = ("ppo", "recurrent_ppo")
_ON_POLICY = (*_CLIPPED, "a2c", "trpo")
_LEARNED = (*_OFF_POLICY, *_ON_POLICY)
_SEARCHES = ("cma_es", "es")

METRICS = (
    Metric(("update",), CLOCK, "updates", "GRPO updates done"),
    Metric(("operation",), CLOCK, "operations", "operations done, each row's counted"),
    Metric(
        ("forward_tokens",),
        CLOCK,
        "tokens",
        "compute: 1 for each token of a forward of the patient, 3 for each that a backward follows "
        "(an update's B T, or what its rollouts hold); without evaluations and samples",
    ),
    Metric(("seconds",), CLOCK, "s", "time since the run began"),
    *LEARNING,
    Metric(
        ("surgeon/return",),
        "operation",
        "that of the score: nats/char",
        "score at the end - score unoperated; minus `flatline_penalty` where the patient died",
    ),
    Metric(("surgeon/length",), "operation", "steps", "steps made"),
    Metric(("surgeon/mean_abs_action",), "operation", "1", "mean abs(action), in [0, 1]"),
    Metric(
        ("surgeon/lost_score",),
        "operation",
        "that of the score: nats/char",
        "score healthy - score unoperated: what the injury cost; 0 in a run, which has none",
    ),
    Metric(
        _of_term("kl_ref"),
        "operation",
        "nats/char",
        "mean sum_a p(a) (log q(a) - log p(a)) over own text, q the 5-gram reference; `score` is "
        "of the operated, `baseline` of the unoperated model",
    ),
    Metric(
        _of_term("heldout_loss"), "operation", "nats/char", "mean -log p(y) over the prompts' text"
    ),
    Metric(
        _of_term("distinct"), "operation", "share", "distinct 4-grams / 4-grams of the own texts"
    ),
    Metric(
        _of_term("collision_l2"),
        "operation",
        "1/1000",
        "1000 (sum_g n_g (n_g - 1) / (n (n - 1)) - 2 sum_g n_g q_g / n + sum_g q_g^2), n_g of n "
        "trigrams of own text, q_g the share in real text",
    ),
    Metric(_of_term("ref_loglik"), "operation", "nats/char", "mean log q(a) of the own text"),
    Metric(_of_term("entropy"), "operation", "nats/char", "mean -sum_a p(a) log p(a), own text"),
    Metric(
        ("commit/kept",),
        "commit",
        "0 or 1",
        "1 if both lower bounds are above 0, patient alive",
    ),
    Metric(
        _interval("kl_ref_gain"),
        "commit",
        "nats/char",
        "m = mean of operated - unoperated `kl_ref` over n fresh prompts; m -+ t(97.5 %) s / "
        "sqrt(n); m - t(95 %) s / sqrt(n)",
    ),
    Metric(
        _interval("heldout_loss_fall"),
        "commit",
        "nats/char",
        "the same of unoperated - operated mean -log p(y) over n fresh windows",
    ),
    Metric(
        ("commit/kl_ref_gain/n", "commit/heldout_loss_fall/n"),
        "commit",
        "prompts, windows",
        "n, the pairs compared: `paired_prompts`",
    ),
    Metric(
        ("behavior/operated",),
        "behavior",
        "0 or 1",
        "1 if from here on the operated model samples what is learned from (commit policy rollout)",
    ),
    Metric(
        ("behavior/gain",),
        "behavior",
        "nats/char",
        "return of that operation on the prompts it was chosen by",
    ),
    Metric(
        ("surgeon/n_updates",),
        "surgeon",
        "updates",
        "gradient steps so far; epochs, if on-policy",
        _LEARNED,
    ),
    Metric(
        ("surgeon/replay_buffer_size",),
        "surgeon",
        "transitions",
        "transitions that are remembered, of all rows",
        _OFF_POLICY,
    ),
    Metric(
        ("surgeon/learning_rate",), "surgeon", "1", "the optimizer's, or ARS's", (*_LEARNED, "ars")
    ),
    Metric(
        ("surgeon/actor_loss",),
        "surgeon",
        "scaled reward",
        "mean alpha log pi - Q; without alpha log pi for TD3 and DDPG. Q is min over critics "
        "(SAC, CrossQ), mean (TQC), the first (TD3, DDPG)",
        _OFF_POLICY,
    ),
    Metric(
        ("surgeon/critic_loss",),
        "surgeon",
        "scaled reward^2",
        "sum over critics of mean (Q - target)^2, half of it for SAC and CrossQ; TQC: quantile "
        "Huber loss",
        _OFF_POLICY,
    ),
    Metric(
        ("surgeon/ent_coef",),
        "surgeon",
        "scaled reward/nat",
        "alpha, the weight of the policy's entropy",
        _SAC,
    ),
    Metric(
        ("surgeon/ent_coef_loss",),
        "surgeon",
        "nats",
        "-mean log(alpha) (log pi + target entropy)",
        _SAC,
    ),
    Metric(
        ("surgeon/entropy_loss",),
        "surgeon",
        "nats",
        "minus the policy's mean entropy",
        (*_CLIPPED, "a2c"),
    ),
    Metric(("surgeon/policy_loss",), "surgeon", "1", "-mean A log pi, A normalised", ("a2c",)),
    Metric(
        ("surgeon/policy_gradient_loss",),
        "surgeon",
        "1",
        "-mean min(r A, clip(r, 1 -+ eps) A), r = pi / pi_old",
        _CLIPPED,
    ),
    Metric(
        ("surgeon/policy_objective",),
        "surgeon",
        "1",
        "mean r A, after the step",
        ("trpo",),
    ),
    Metric(
        ("surgeon/value_loss",), "surgeon", "scaled reward^2", "mean (V - return)^2", _ON_POLICY
    ),
    Metric(
        ("surgeon/explained_variance",),
        "surgeon",
        "share",
        "1 - Var(return - V) / Var(return)",
        _ON_POLICY,
    ),
    Metric(("surgeon/approx_kl",), "surgeon", "nats", "mean (r - 1) - log r", _CLIPPED),
    Metric(
        ("surgeon/kl_divergence_loss",),
        "surgeon",
        "nats",
        "KL(pi, pi_old) of the step",
        ("trpo",),
    ),
    Metric(("surgeon/clip_fraction",), "surgeon", "share", "mean 1[abs(r - 1) > eps]", _CLIPPED),
    Metric(("surgeon/clip_range",), "surgeon", "1", "eps", _CLIPPED),
    Metric(
        ("surgeon/clip_range_vf",), "surgeon", "1", "that of V, where the option is given", _CLIPPED
    ),
    Metric(
        ("surgeon/loss",),
        "surgeon",
        "1",
        "of the last minibatch: policy + `ent_coef` entropy loss + `vf_coef` value loss",
        _CLIPPED,
    ),
    Metric(
        ("surgeon/std",),
        "surgeon",
        "1",
        "mean spread of the policy's actions; off-policy only with the option `use_sde`",
        _ON_POLICY,
    ),
    Metric(
        ("surgeon/is_line_search_success",),
        "surgeon",
        "share",
        "1 if a step was found",
        ("trpo",),
    ),
    Metric(("surgeon/iterations",), "surgeon", "updates", "updates so far", ("ars",)),
    Metric(("surgeon/delta_std",), "surgeon", "1", "spread of the tries", ("ars",)),
    Metric(("surgeon/step_size",), "surgeon", "1", "rate / (n_top * spread of returns)", ("ars",)),
    Metric(("surgeon/generations",), "surgeon", "generations", "full generations", _SEARCHES),
)
"""All of them, in the order of the README."""


def numbers(row: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of a row; those of a nested mapping are called `outer/inner`.

    Text, lists and nulls are left out.
    """
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float):
            yield f"{prefix}{name}", value


def markdown_table() -> str:
    """Return `METRICS` as the table that the README shows."""
    lines = ["| metric | rows | unit | formula |", "|---|---|---|---|"]
    for metric in METRICS:
        names = ", ".join(f"`{name}`" for name in _shortened(metric.names))
        of = f" ({', '.join(metric.surgeons)})" if metric.surgeons else ""
        kind = "all" if metric.kind == CLOCK else metric.kind
        lines.append(f"| {names} | {kind}{of} | {metric.unit} | {metric.formula} |")
    return "\n".join(lines)


def _shortened(names: tuple[str, ...]) -> list[str]:
    """Leave out of each name but the first what it shares with the first up to its last slash."""
    stem = names[0].rpartition("/")[0] + "/"
    return [names[0], *(name.removeprefix(stem) for name in names[1:])]
