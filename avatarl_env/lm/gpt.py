"""A small GPT.

Pre-norm RMSNorm, one fused QKV projection, rotary positions, GELU (tanh) feed-forward, tied
embeddings, no biases, no dropout and no QK-norm (with it, scaling a query would do nothing).

Shapes: B batch, T tokens, C width, H heads, D head dim, L layers, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from avatarl_env.errors import check_integer
from avatarl_env.lm.attention import attention
from avatarl_env.lm.generation import KVCache

ROTARY_BASE = 10_000.0
NORM_EPS = 1e-5
MAX_LAYERS = 10_000
"""Largest number of blocks: each takes 10 ms to build."""
LAYER_BYTES = 50_000
"""Least memory of a block's Python objects."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of a `GPT`.

    Raises:
        ValueError: if a size is not a positive integer, there are more than 10,000 layers, the
            heads do not divide the width, or the head dim (width / heads) is odd, which rotary
            positions cannot use.
    """

    vocab_size: int
    """Distinct tokens, the unknown symbol included."""
    context: int = 128
    """Longest window the model sees, tokens."""
    n_layers: int = 4
    """Blocks."""
    n_heads: int = 4
    """Attention heads per block; divides the width."""
    width: int = 128
    """Residual stream, channels."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "n_heads", "width"):
            check_integer(name, getattr(self, name), 1, math.inf)
        check_integer("n_layers", self.n_layers, 1, MAX_LAYERS)
        if self.width % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"n_heads must divide width into even head dims, got width={self.width} "
                f"and n_heads={self.n_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Channels per head."""
        return self.width // self.n_heads

    @property
    def n_parameters(self) -> int:
        """Number of parameters of the model, 12 L C^2 + (2 L + 1 + V) C."""
        layers, width = self.n_layers, self.width
        return 12 * layers * width**2 + (2 * layers + 1 + self.vocab_size) * width

    @property
    def building_bytes(self) -> int:
        """Least memory needed to build the model, bytes."""
        # The weights in single precision; angles, cosines and sines in double, then in single.
        numbers = 4 * self.n_parameters + 36 * self.context * self.head_dim
        return numbers + LAYER_BYTES * self.n_layers


def rotary_table(config: GPTConfig) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the rotary angles, each (context, 1, 1, head_dim).

    Position t rotates the pair of channels (i, i + D/2) by `t * base ** (-2 i / D)` radians
    (RoFormer, arXiv 2104.09864).
    """
    half = config.head_dim // 2
    frequency = ROTARY_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(config.context, dtype=torch.float64)[:, None] * frequency  # (T, D/2)
    angle = torch.cat([angle, angle], dim=1)[:, None, None, :]  # (T, 1, 1, D)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs of `x` (B, T, ..., D) by the angles of its positions."""
    left, right = x.chunk(2, dim=-1)
    # In the dtype of the activations, which differs from the table's under autocast.
    return x * cos.to(x) + torch.cat([-right, left], dim=-1) * sin.to(x)


class GPTAttention(nn.Module):
    """Causal multi-head self-attention; rows of `c_attn` are q, then k, then v, head by head."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Build the attention of block `layer`, which is its index in a cache."""
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.head_dim = config.head_dim
        self.c_attn = nn.Linear(config.width, 3 * config.width, bias=False)
        self.c_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        n_batch, n_tokens, width = x.size()
        qkv = self.c_attn(x).view(n_batch, n_tokens, 3, self.n_heads, self.head_dim)
        qk = rotate(qkv[:, :, :2], cos, sin).permute(2, 0, 3, 1, 4)  # (2, B, H, T, D)
        q, k = qk[0], qk[1]
        v = qkv[:, :, 2].transpose(1, 2)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        y = attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(n_batch, n_tokens, width))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Position-wise feed-forward, four times the width inside."""

    def __init__(self, config: GPTConfig) -> None:
        """Build both projections."""
        super().__init__()
        self.c_fc = nn.Linear(config.width, 4 * config.width, bias=False)
        self.c_proj = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))  # type: ignore[no-any-return]


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        """Build block number `layer`."""
        super().__init__()
        self.norm_1 = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.attn = GPTAttention(config, layer)
        self.norm_2 = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, cache: KVCache | None) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        x = x + self.attn(self.norm_1(x), cos, sin, cache)
        return x + self.mlp(self.norm_2(x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """The language model: tokens in, logits out."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        """Build and initialise.

        Args:
            config: sizes.
            generator: source of the initial weights, on the CPU; default a new one with seed 0.
        """
        super().__init__()
        self.config = config
        # Except on "meta", torch's constructors draw weights from the global generator.
        with torch.device("meta"):
            # Not nn.Embedding(V, C): drawing weights on "meta" imports sympy, which takes a second.
            empty = torch.empty(config.vocab_size, config.width)
            self.embed: nn.Embedding = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
                empty, freeze=False
            )
            self.blocks = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
            self.norm = nn.RMSNorm(config.width, eps=NORM_EPS)
            self.lm_head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.to_empty(device="cpu")
        self.lm_head.weight = self.embed.weight
        cos, sin = rotary_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights(generator or torch.Generator().manual_seed(0))

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draw new weights: normal with std 0.02, or 0.02 / sqrt(2 L) for both c_proj; norms 1."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            residual = math.sqrt(2 * self.config.n_layers) if "c_proj" in name else 1.0
            parameter.normal_(0.0, 0.02 / residual, generator=generator)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the next-token logits after every position.

        Args:
            tokens: (B, T) int64; with a cache they follow the positions that it holds.
            cache: keys and values of the earlier positions, extended in place.

        Returns:
            (B, T, V) logits.

        Raises:
            ValueError: if the positions exceed the model's context.
        """
        start = cache.length if cache is not None else 0
        stop = start + tokens.size(1)
        if stop > self.config.context:
            raise ValueError(f"tokens must end within context={self.config.context}, got {stop}")
        cos, sin = self.cos[start:stop], self.sin[start:stop]  # (T, 1, 1, D)
        x = self.embed(tokens)  # (B, T, C)
        for block in self.blocks:
            x = block(x, cos, sin, cache)
        if cache is not None:
            cache.advance(tokens.size(1))
        return self.lm_head(self.norm(x))  # type: ignore[no-any-return]

    @property
    def context(self) -> int:
        """Longest window the model can read, tokens."""
        return self.config.context

    @property
    def vocab_size(self) -> int:
        """Logits at every position, V."""
        return self.config.vocab_size

    def new_cache(self, n_rows: int, n_positions: int | None = None) -> KVCache:
        """Return an empty cache for `n_rows` rows, on the model's device and in its dtype.

        It has room for `n_positions`, and by default and at most for the whole context.
        """
        config = self.config
        room = config.context if n_positions is None else min(n_positions, config.context)
        shape = (config.n_layers, 2, n_rows, config.n_heads, room, config.head_dim)
        return KVCache(self.embed.weight.new_empty(shape))

    def get_output_embeddings(self) -> nn.Linear:
        """Return the module that turns the final hidden state into logits."""
        return self.lm_head

    @property
    def n_parameters(self) -> int:
        """Number of parameters (the tied matrix counts once)."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, n_past: int) -> int:
        """Floating point operations to read one token that attends to `n_past` positions."""
        return 2 * self.n_parameters + 4 * self.config.n_layers * self.config.width * n_past
