"""The numbers that are written of the language model's learning, and of how well it predicts."""

from __future__ import annotations

from typing import NamedTuple

CLOCK = "clock"
"""Stands for the kind where a number is in the rows of every kind."""


class Metric(NamedTuple):
    """One number of a row, or some of one formula."""

    names: tuple[str, ...]
    kind: str
    """Of the rows that have it: a key of `agents.tracking.schema.AXES`, or `CLOCK`."""
    unit: str
    formula: str
    surgeons: tuple[str, ...] = ()
    """The surgeons that write it; empty for metrics of every run."""


LEARNING = (
    Metric(
        ("grpo/loss",),
        "grpo",
        "depends on the estimator",
        "`proper_maxrl`, `maxrl`, `brier`: -mean A log p(a) over positions and samples, A the "
        "advantage; `proper_maxrl` also +mean sum_a (1 - p(a))^(K + 1) / (K + 1); `grpo`, "
        "`dr_grpo`, `rloo`, `gspo`, `seed_sampled`: -mean of the clipped r A, r the ratio to who "
        "sampled; `cispo`: -mean clipped r A log p(a); over all actions what has the expected "
        "gradient: -mean f(p(y)), f the logarithm cut after K terms (`maxrl`: K - 1), with that "
        "sum for `proper_maxrl`; `brier`: -mean(p(y) - sum_a p(a)^2 / 2); `ce`: -mean log p(y); "
        "plus what `regularizer` adds",
    ),
    Metric(("grpo/reward",), "grpo", "share", "mean p(y), chance to draw what is right; horizon 1"),
    Metric(("grpo/accuracy",), "grpo", "share", "mean 1[argmax p = y], the batch's; horizon 1"),
    Metric(
        ("grpo/text_reward",),
        "grpo",
        "nats/char",
        "mean over texts of mean_t(log q - log p) + `match_bonus` * matched; horizon above 1",
    ),
    Metric(
        ("grpo/matched",),
        "grpo",
        "share",
        "mean over texts of leading characters that are the real ones / H; horizon above 1",
    ),
    Metric(("grpo/entropy",), "grpo", "nats/char", "mean -sum_a p(a) log p(a), training batch"),
    Metric(("grpo/grad_norm",), "grpo", "as the loss", "L2 norm of the gradient, unclipped"),
    Metric(("grpo/learning_rate",), "grpo", "1", "AdamW's, after warm-up and cosine"),
    Metric(
        ("grpo/kl",),
        "grpo",
        "nats/char",
        "mean sum_a p(a) (log p(a) - log q(a)), q bigrams of the training text, where "
        "`regularizer` charges it; else 0",
    ),
    Metric(("grpo/kl_coefficient",), "grpo", "1", "weight of that KL in the loss"),
    Metric(
        ("grpo/behavior_kl",),
        "grpo",
        "nats/char",
        "mean sum_a b(a) (log b(a) - log p(a)), b who sampled; of rollouts the mean of log b - "
        "log p over what was written; 0 where the policy samples itself",
    ),
    Metric(
        ("grpo/policy_loss",),
        "grpo",
        "as the loss",
        "the estimator's part of `grpo/loss`, without what `regularizer` adds",
    ),
    Metric(
        ("grpo/entropy_loss",),
        "grpo",
        "as the loss",
        "what entropy adds to `grpo/loss`: -`entropy_bonus` H + max(0, `entropy_floor` - H), H the "
        "`grpo/entropy`; `grpo/loss` = `policy_loss` + `entropy_loss` + `kl_coefficient` `kl`",
    ),
    Metric(
        ("grpo/advantage_mean", "grpo/advantage_std"),
        "grpo",
        "as the reward",
        "mean of A and sqrt(mean (A - mean A)^2), over all groups and with all weights; 0 for "
        "closed forms without advantages",
    ),
    Metric(
        ("grpo/reward_min", "grpo/reward_max"),
        "grpo",
        "as the reward",
        "least and largest r that was paid, credit included, after `reward_clip`; 0 for closed "
        "forms without rewards",
    ),
    Metric(
        ("grpo/skipped",),
        "grpo",
        "updates",
        "updates so far without a step, loss or gradient not being finite",
    ),
    Metric(
        ("time/tokens_per_second",),
        "grpo",
        "tokens/s",
        "median of B T / (time of an update) since the row before",
    ),
    Metric(
        ("validation/loss",),
        "evaluation",
        "nats/char",
        "mean -log p(y) over the first 16,384 characters of the validation text, each after half a "
        "context of history or more, where there is so much",
    ),
    Metric(("validation/bits_per_char",), "evaluation", "bits/char", "`validation/loss` / log 2"),
    Metric(("validation/accuracy",), "evaluation", "share", "mean 1[argmax p = y], same text"),
    Metric(
        ("validation/entropy",), "evaluation", "nats/char", "mean -sum_a p(a) log p(a), same text"
    ),
    Metric(
        ("validation/calibration_error",),
        "evaluation",
        "share",
        "ECE (arXiv 1706.04599): sum_m n_m / n abs(accuracy_m - confidence_m), same text, over 15 "
        "bins of equal width, bin m of the n_m positions with max p in ((m - 1) / 15, m / 15]; "
        "confidence is max p",
    ),
)
"""Rows of kinds "grpo" and "evaluation", in the order of the README."""
