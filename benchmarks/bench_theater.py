"""How much does it cost to enter and leave a theater, and how far is that from the limit?

For models of 1, 10 and 100 million parameters, with the attention projections as targets:

* copies: the targets cloned and copied back, the limit of any way of saving weights;
* theater: one theater, entered and left again and again; new theater: a new one each time;
* deepcopy: a copy of the whole model; state dict: all of it cloned and loaded back.

The theater must save the targets' bytes and no others, and restore an edited model bit for bit.

    python benchmarks/bench_theater.py --threads 1 --out benchmarks/results/bench_theater.json

The last line of stdout is one JSON object with everything.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import measure
import torch
from measure import Timing, interleaved, make_parser, memcpy_bandwidth, publish
from torch import Tensor, nn

from avatarl_env.lm.gpt import GPT, GPTConfig
from avatarl_env.surgery import SurgicalTheater, find_targets

SIZES = {
    "1M": GPTConfig(vocab_size=65, **measure.SIZES["0.8M"]),
    "10M": GPTConfig(vocab_size=65, **measure.SIZES["10.6M"]),
    "100M": GPTConfig(vocab_size=65, context=256, n_layers=8, n_heads=16, width=1024),
}
QUICK = {"tiny": GPTConfig(vocab_size=65, **measure.SIZES["tiny"])}
TOTAL_BYTES = 4e9  # target bytes of all repeats, about: small models are timed more often


def bits(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Copy the bytes of the tensors."""
    return [x.detach().clone().view(torch.uint8) for x in tensors]


def check(model: nn.Module, targets: list[Tensor]) -> int:
    """Edit all targets in a theater; return how many bytes it saved.

    Raises:
        RuntimeError: if that is not the size of the targets, or weights were not restored.
    """
    everything = list(model.parameters())
    before = bits(everything)
    with SurgicalTheater(model, targets) as theater:
        saved = theater.saved_bytes
        for target in targets:
            theater.write(target, theater.original(target) + 1)
        changed = sum(map(differ, before, bits(everything)))
    if changed != len(targets):
        raise RuntimeError(f"all {len(targets)} targets must change in the theater, got {changed}")
    if any(map(differ, before, bits(everything))):
        raise RuntimeError("all weights must be restored, got others")
    if saved != sum(p.numel() * p.element_size() for p in targets):
        raise RuntimeError(f"only the targets must be saved, got {saved} bytes")
    return saved


def differ(one: Tensor, two: Tensor) -> bool:
    """Whether any byte differs."""
    return not torch.equal(one, two)


class Ways:
    """The ways to save and restore weights."""

    def __init__(self, model: GPT, targets: list[Tensor]) -> None:
        self.model = model
        self.targets = targets
        self.room = SurgicalTheater(model, targets)

    @torch.no_grad()
    def copies(self) -> None:
        """Copy the targets' bytes twice."""
        saved = [p.clone() for p in self.targets]
        for p, value in zip(self.targets, saved, strict=True):
            p.copy_(value)

    def theater(self) -> None:
        """Enter and leave an existing theater."""
        with self.room:
            pass

    def new_theater(self) -> None:
        """Make a theater, enter and leave it."""
        with SurgicalTheater(self.model, self.targets):
            pass

    def deepcopy(self) -> None:
        """Copy the model."""
        copy.deepcopy(self.model)

    def state_dict(self) -> None:
        """Clone the state dict and load it."""
        saved = {name: x.clone() for name, x in self.model.state_dict().items()}
        self.model.load_state_dict(saved)


def measure_size(config: GPTConfig, device: str, repeats: int | None) -> dict[str, Any]:
    """Check and time one size of model."""
    model = GPT(config).to(device)
    targets = [p for target in find_targets(model) for p in target.parameters()]
    saved = check(model, targets)
    ways = Ways(model, targets)
    repeats = repeats or max(15, min(1000, int(TOTAL_BYTES / saved / 6)))
    timings = interleaved(
        {"copies": ways.copies, "theater": ways.theater, "new theater": ways.new_theater},
        repeats=repeats,
        warm_up=3,
    )
    # Apart, because they throw everything else out of the caches.
    whole = {"deepcopy": ways.deepcopy, "state dict": ways.state_dict}
    timings |= interleaved(whole, repeats=max(5, repeats // 5))
    return {
        "n_parameters": sum(p.numel() for p in model.parameters()),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "saved_bytes": saved,
        "n_targets": len(targets),
        "seconds": {name: timing._asdict() for name, timing in timings.items()},
        "over_copies": {
            name: timing.median / timings["copies"].median for name, timing in timings.items()
        },
    }


def show(name: str, row: dict[str, Any]) -> None:
    """Print one size's lines of the table."""
    print(
        f"\n{name}: {row['n_parameters']:,} parameters, {row['model_bytes'] / 1e6:.1f} MB; "
        f"{row['n_targets']} targets, {row['saved_bytes'] / 1e6:.1f} MB saved"
    )
    print(f"{'':>12}  {'median':>9}  {'quartiles':>21}  {'fastest':>9}  over copies")
    for way, seconds in row["seconds"].items():
        timing = Timing(**seconds)
        quartiles = f"{timing.low * 1e3:.3f} to {timing.high * 1e3:.3f}"
        print(
            f"{way:>12}  {timing.median * 1e3:6.3f} ms  {quartiles:>18} ms  "
            f"{timing.fastest * 1e3:6.3f} ms  {row['over_copies'][way]:11.2f}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print."""
    parser = make_parser(__doc__)
    parser.add_argument("--repeats", type=int, help="by default more for smaller models")
    parser.add_argument("--quick", action="store_true", help="a tiny model only, a few repeats")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    large, small = (2**20, 2**16) if options.quick else (2**28, 2**18)
    ceilings = {
        "large_copy_bytes_per_second": memcpy_bandwidth(large, options.device),
        "small_copy_bytes_per_second": memcpy_bandwidth(small, options.device),
    }
    print(
        f"{options.device}, {options.threads} threads; copies of {large:,} bytes at "
        f"{ceilings['large_copy_bytes_per_second'] / 1e9:.1f} GB/s, of {small:,} bytes at "
        f"{ceilings['small_copy_bytes_per_second'] / 1e9:.1f} GB/s"
    )
    rows = {}
    for name, config in (QUICK if options.quick else SIZES).items():
        repeats = 5 if options.quick and not options.repeats else options.repeats
        rows[name] = measure_size(config, options.device, repeats)
        show(name, rows[name])
    publish({"ceilings": ceilings, "sizes": rows}, options)


if __name__ == "__main__":
    main()
