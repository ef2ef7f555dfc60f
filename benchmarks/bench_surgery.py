"""How fast can many weight edits be evaluated, and how far is that from the limit?

N operations, each on 4 prompts of 32 tokens that are continued by 64, in four ways:

* plain: the same batch without surgery, cached; the limit of anything that samples;
* overlay: N operations in one batch;
* loop: one operation after the other, in place in a theater, cached;
* naive: one after the other; saves and loads the whole state dict, factorises anew, no cache.

The last two are timed on the first 32 and 4 operations, and scaled to N. Overlay and loop must
write the same texts. Then the steps per second of the vector environment are compared with those of
the single one.

    python benchmarks/bench_surgery.py --out benchmarks/results/bench_surgery.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from measure import (
    SIZES,
    gemm_rate,
    interleaved,
    make_parser,
    memcpy_bandwidth,
    publish,
    untrained_model,
)

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.lm.generation import Generation, generate
from avatarl_env.lm.gpt import GPT
from avatarl_env.patient import Patient
from avatarl_env.surgery import Operator, Overlay, SurgicalTheater, find_targets, make_operator
from avatarl_env.vector_env import AttentionSurgeryVectorEnv

VOCAB_SIZE = 65
OPERATORS = ("head_gain", "spectral_bands", "low_rank_seed", "output_temperature")
N_PROMPTS, PROMPT_LENGTH, N_NEW = 4, 32, 64
N_LOOP, N_NAIVE = 32, 4  # operations performed by the loop and the naive way
N_MANY = 100  # from so many operations on there are fewer repeats
Row = dict[str, Any]


class Bench:
    """N operations of one kind on a model, and the ways to perform them."""

    def __init__(self, model: GPT, operator: str, n: int) -> None:
        """Draw prompts, sampling noise and coefficients, all from constant seeds."""
        self.model = model
        self.name = operator
        self.targets = find_targets(model)
        self.operator = self.make()
        device = model.embed.weight.device
        generator = torch.Generator().manual_seed(0)
        shape = (n * N_PROMPTS, PROMPT_LENGTH)
        vocab_size = model.config.vocab_size
        self.prompts = torch.randint(vocab_size, shape, generator=generator).to(device)
        self.uniforms = torch.rand(n * N_PROMPTS, N_NEW, generator=generator).to(device)
        rng = np.random.default_rng(0)
        self.coefficients = rng.uniform(-0.5, 0.5, (n, len(self.operator.labels)))

    def make(self) -> Operator:
        """Make the operator, without any factorisation yet."""
        return make_operator(self.name, self.targets)

    def plain(self) -> Generation:
        """Continue all prompts with the unoperated model."""
        return self._write(slice(None))

    def overlay(self) -> Generation:
        """Perform all operations in one batch."""
        with Overlay(self.operator, self.coefficients):
            return self._write(slice(None))

    def loop(self) -> list[Generation]:
        """Perform one operation after the other, in place."""
        written = []
        for i, coefficients in enumerate(self.coefficients[:N_LOOP]):
            with SurgicalTheater(self.model, [self.operator]) as theater:
                self.operator.apply(theater, coefficients)
                written.append(self._write(self._rows(i)))
        return written

    def naive(self) -> None:
        """Perform the first operations without overlay, cache or stored factorisations.

        Operators write through a theater, which is a small part of the time.
        """
        for i in range(min(N_NAIVE, len(self.coefficients))):
            saved = {name: x.clone() for name, x in self.model.state_dict().items()}
            with SurgicalTheater(self.model, [self.operator]) as theater:
                self.make().apply(theater, self.coefficients[i])
                self._write(self._rows(i), use_cache=False)
            self.model.load_state_dict(saved)

    def check(self) -> dict[str, float]:
        """Compare overlay and loop; return the share of equal rows and the largest error.

        Raises:
            AssertionError: if they write different texts, except where the noise is on a boundary.
        """
        together = self.overlay()
        apart = self.loop()
        tokens = torch.cat([part.tokens for part in apart])
        log_probs = torch.cat([part.log_probs for part in apart])
        same = (together.tokens == tokens).all(dim=1)  # (N * M,)
        assert same.float().mean() > 0.9, "overlay and loop write different texts"
        error = float((together.log_probs - log_probs)[same].abs().max())
        assert error < 1e-3, f"overlay and loop differ by {error} nats on the same text"
        return {"same_rows": float(same.float().mean()), "largest_error_nats": error}

    def _rows(self, i: int) -> slice:
        return slice(i * N_PROMPTS, (i + 1) * N_PROMPTS)

    def _write(self, rows: slice, *, use_cache: bool = True) -> Generation:
        return generate(
            self.model,
            self.prompts[rows],
            self.uniforms[rows],
            return_distributions=True,
            use_cache=use_cache,
        )


def measure_operator(model: GPT, operator: str, n: int, *, loops: bool, repeats: int) -> Row:
    """Time one operator with N operations; with `loops` also the two loops."""
    bench = Bench(model, operator, n)
    with torch.inference_mode():
        row: Row = {"operator": operator, "n": n, "rows": n * N_PROMPTS}
        if n > 1:
            row |= Bench(model, operator, min(n, N_NAIVE)).check()
        ways: dict[str, Callable[[], object]] = {"plain": bench.plain, "overlay": bench.overlay}
        timings = interleaved(ways, repeats=repeats if n < N_MANY else max(1, repeats // 3))
        if loops:
            slow = {"loop": bench.loop, "naive": bench.naive}
            timings |= interleaved(slow, repeats=max(1, repeats // 5), warm_up=0)
    row["seconds"] = {name: timing._asdict() for name, timing in timings.items()}
    plain, overlay = timings["plain"].median, timings["overlay"].median
    row["overlay_over_plain"] = overlay / plain
    if loops:
        for name, performed in (("loop", N_LOOP), ("naive", N_NAIVE)):
            row[f"{name}_over_overlay"] = n / min(n, performed) * timings[name].median / overlay
    forward = (PROMPT_LENGTH + N_NEW - 1) * row["rows"]  # tokens; the last one is not read
    mean_past = (PROMPT_LENGTH + N_NEW) // 2
    row["plain_flops_per_second"] = forward * model.flops_per_token(mean_past) / plain
    return row


def measure_environments(patient: Patient, n_rows: int, n_prompts: int, repeats: int) -> Row:
    """Time steps of the single and of the vector environment."""
    single = AttentionSurgeryEnv(patient, n_prompts=n_prompts)
    together = AttentionSurgeryVectorEnv(
        n_rows, patient, n_prompts=n_prompts, autoreset_mode="SameStep"
    )
    single.reset(seed=0)
    together.reset(seed=0)
    episode_length = single.config.episode_length
    action = np.full(single.action_space.shape or (), 0.1, np.float32)
    actions = np.full(together.action_space.shape or (), 0.1, np.float32)

    def one_operation() -> None:
        for _ in range(episode_length):
            single.step(action)
        single.reset()

    def n_operations() -> None:
        for _ in range(episode_length):  # the last also resets
            together.step(actions)

    timings = interleaved({"single": one_operation, "vector": n_operations}, repeats=repeats)
    rate = {
        "single": episode_length / timings["single"].median,
        "vector": n_rows * episode_length / timings["vector"].median,
    }
    return {
        "n_rows": n_rows,
        "n_prompts": n_prompts,
        "steps_per_second": rate,
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "vector_over_single": rate["vector"] / rate["single"],
    }


def show(size: str, row: Row) -> None:
    """Print one line of the table."""
    line = f"{size:>6} {row['operator']:>18} N={row['n']:<4}"
    line += " ".join(f"{k} {t['median']:8.3f} s" for k, t in row["seconds"].items())
    line += f"  overlay/plain {row['overlay_over_plain']:.3f}"
    if "loop_over_overlay" in row:
        line += f"  loop/overlay {row['loop_over_overlay']:.1f}"
        line += f"  naive/overlay {row['naive_over_overlay']:.1f}"
    print(line, flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Check, time, print."""
    parser = make_parser(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.8M", "10.6M"])
    parser.add_argument("--n", nargs="+", type=int, default=[1, 8, 32, 128], help="operations")
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--rows", type=int, default=32, help="of the vector environment")
    parser.add_argument(
        "--prompts", nargs="+", type=int, default=[4, 8, 32], help="of the environments"
    )
    parser.add_argument(
        "--others", type=int, default=32, help="operations of the operators after the first"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    ceilings = {
        "memcpy_bytes_per_second": memcpy_bandwidth(2**26, options.device),
        "gemm_flops_per_second": gemm_rate(device=options.device),
    }
    print(
        f"{torch.get_num_threads()} threads; copies {ceilings['memcpy_bytes_per_second']:.3g} B/s,"
        f" float32 products {ceilings['gemm_flops_per_second']:.3g} FLOP/s"
    )
    rows: list[Row] = []
    for size in options.sizes:
        context = max(SIZES[size]["context"], PROMPT_LENGTH + N_NEW)
        model, _ = untrained_model(size, VOCAB_SIZE, seed=0, context=context)
        model = model.to(options.device).eval()
        for n in options.n:
            for operator in OPERATORS:
                loops = operator == OPERATORS[0]
                if not loops and n != options.others:
                    continue
                rows.append(
                    {
                        "size": size,
                        **measure_operator(
                            model, operator, n, loops=loops, repeats=options.repeats
                        ),
                    }
                )
                show(size, rows[-1])
    patient = Patient.load("bundled", device=options.device)
    environments = []
    for n_prompts in options.prompts:
        row = measure_environments(patient, options.rows, n_prompts, options.repeats)
        rate = row["steps_per_second"]
        print(
            f"bundled patient, {n_prompts} prompts: single {rate['single']:.1f} steps/s, "
            f"{options.rows} rows {rate['vector']:.1f} steps/s, "
            f"{row['vector_over_single']:.1f} times as many"
        )
        environments.append(row)
    publish({"ceilings": ceilings, "operations": rows, "environments": environments}, options)


if __name__ == "__main__":
    main()
