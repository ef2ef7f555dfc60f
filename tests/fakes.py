"""Small models and reference computations shared by several test files."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from avatarl_env.lm.generation import KVCache
from avatarl_env.lm.gpt import GPT, GPTConfig


def tiny_gpt(seed: int = 0, *, gain: float = 8.0, **sizes: int) -> GPT:
    """Build a GPT of two layers, four heads, width 32 and 16 tokens.

    `gain` multiplies the initial matrices: they are so small that the output would hardly depend
    on the input, and a test could not fail.
    """
    config = GPTConfig(
        **{"vocab_size": 16, "context": 16, "n_layers": 2, "n_heads": 4, "width": 32, **sizes}
    )
    model = GPT(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(gain)
    return model


class UniformLM:
    """A model with uniform predictions that records its inputs."""

    def __init__(self, vocab_size: int = 16, context: int = 16) -> None:
        self.vocab_size = vocab_size
        self.context = context
        self.seen: list[Tensor] = []

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> KVCache:
        return KVCache(torch.empty(0, 2, n_rows, 1, self.context, 2))

    def __call__(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        if cache is not None:
            cache.advance(tokens.size(1))
            assert cache.length <= self.context
        assert tokens.size(1) <= self.context
        self.seen.append(tokens.clone())
        return torch.zeros(*tokens.shape, self.vocab_size)


def bits(tensor: Tensor) -> list[int]:
    """Return the bytes of `tensor`: unlike `==` they tell -0.0 from 0.0 and NaN from NaN."""
    flat = tensor.detach().reshape(-1).clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).tolist()


def fingerprint(model: nn.Module) -> dict[str, tuple[torch.dtype, torch.Size, list[int]]]:
    """Return every entry of the state dict to the last bit, in order."""
    return {name: (x.dtype, x.shape, bits(x)) for name, x in model.state_dict().items()}


@torch.no_grad()
def reference_logits(
    model: GPT, tokens: Tensor, sharpness: Tensor | None = None, loudness: Tensor | None = None
) -> Tensor:
    """Compute a GPT's logits (B, T, V) independently: float64, one head and query at a time.

    Rotary positions are complex numbers here. `sharpness` (L, H) multiplies the attention logits
    of a head, `loudness` (L, H) its output.
    """
    config = model.config
    weights = {name: x.detach().double() for name, x in model.state_dict().items()}
    ones = torch.ones(config.n_layers, config.n_heads)
    sharpness = ones if sharpness is None else sharpness
    loudness = ones if loudness is None else loudness
    half = config.head_dim // 2
    angles = torch.arange(tokens.size(1))[:, None] * 10_000.0 ** (
        -torch.arange(half, dtype=torch.float64) / half
    )
    turn = torch.polar(torch.ones_like(angles), angles)  # (T, D / 2)

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weights[name]

    def turned(x: Tensor) -> Tensor:
        z = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat([z.real, z.imag], dim=-1)

    x = weights["embed.weight"][tokens]
    for layer in range(config.n_layers):
        at = f"blocks.{layer}."
        h = norm(x, at + "norm_1.weight")
        q, k, v = (h @ weights[at + "attn.c_attn.weight"].T).chunk(3, dim=-1)
        heads = []
        for head in range(config.n_heads):
            rows = slice(head * config.head_dim, (head + 1) * config.head_dim)
            qh, kh, vh = turned(q[..., rows]), turned(k[..., rows]), v[..., rows]
            reads = []
            for t in range(tokens.size(1)):
                scores = (kh[:, : t + 1] @ qh[:, t, :, None])[..., 0] / config.head_dim**0.5
                weight = (scores * sharpness[layer, head]).softmax(-1)
                reads.append((weight[..., None] * vh[:, : t + 1]).sum(1))
            heads.append(torch.stack(reads, dim=1) * loudness[layer, head])
        x = x + torch.cat(heads, dim=-1) @ weights[at + "attn.c_proj.weight"].T
        h = norm(x, at + "norm_2.weight") @ weights[at + "mlp.c_fc.weight"].T
        h = 0.5 * h * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (h + 0.044715 * h**3)))
        x = x + h @ weights[at + "mlp.c_proj.weight"].T
    return norm(x, "norm.weight") @ weights["lm_head.weight"].T
