"""The llama architecture in JAX, small enough to read: what llama.cpp computes, and its gradient.

Weights are a flat dictionary under their GGUF names; a matrix is stored as (outputs, inputs), as in
the file. Rotary positions turn adjacent pairs, as llama.cpp does for `llama`.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

Weights = dict[str, jax.Array]
Cache = list[tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    context: int = 2048
    rope_base: float = 10_000.0
    epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The matrices of one layer: (outputs, inputs)."""
        kv_width = self.kv_heads * self.head_width
        return {
            "attn_q": (self.width, self.width),
            "attn_k": (kv_width, self.width),
            "attn_v": (kv_width, self.width),
            "attn_output": (self.width, self.width),
            "ffn_gate": (self.feed_forward, self.width),
            "ffn_up": (self.feed_forward, self.width),
            "ffn_down": (self.width, self.feed_forward),
        }

    @property
    def work_per_token(self) -> int:
        """Multiplications per generated token, the output included, attention over the past not."""
        layer = sum(rows * columns for rows, columns in self.matrices.values())
        return self.layers * layer + self.vocabulary * self.width

    @property
    def num_parameters(self) -> int:
        return self.work_per_token + (2 * self.layers + 1) * self.width


def initial_weights(shape: Shape, seed: int) -> Weights:
    rng = np.random.default_rng(seed)
    weights = {"token_embd.weight": rng.normal(0, 0.02, (shape.vocabulary, shape.width))}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.matrices.items():
            matrix = rng.normal(0, columns**-0.5, (rows, columns))
            if name in ("attn_output", "ffn_down"):  # a layer begins by doing nothing
                matrix = np.zeros((rows, columns))
            weights[f"blk.{layer}.{name}.weight"] = matrix
        weights[f"blk.{layer}.attn_norm.weight"] = np.ones(shape.width)
        weights[f"blk.{layer}.ffn_norm.weight"] = np.ones(shape.width)
    weights["output_norm.weight"] = np.ones(shape.width)
    return {name: jnp.asarray(weight, jnp.float32) for name, weight in weights.items()}


def hidden_states(
    shape: Shape, weights: Weights, tokens: jax.Array, documents: jax.Array
) -> jax.Array:
    """(rows, length) tokens → (rows, length, width). A token sees its own document only."""
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    mask = causal & (documents[:, :, None] == documents[:, None, :])
    turns = _rotations(shape, jnp.arange(length))
    x = weights["token_embd.weight"][tokens]
    for layer in range(shape.layers):
        block = _block(weights, layer)
        q, k, v = _heads(shape, block, x)
        x = x + _attend(shape, block, _turn(q, turns), _turn(k, turns), v, mask)
        x = x + _feed_forward(shape, block, x)
    return _norm(shape, x, weights["output_norm.weight"])


def empty_cache(shape: Shape, rows: int, length: int) -> Cache:
    size = (rows, length, shape.kv_heads, shape.head_width)
    return [(jnp.zeros(size), jnp.zeros(size)) for _ in range(shape.layers)]


def next_logits(
    shape: Shape,
    weights: Weights,
    cache: Cache,
    tokens: jax.Array,
    start: jax.Array,
    first: jax.Array,
) -> tuple[Cache, jax.Array]:
    """Reads (rows, n) tokens at positions from `start` on, and gives the logits after the last.

    Rows of different length are filled up on the left; row i begins at `first[i]`.
    """
    positions, past = start + jnp.arange(tokens.shape[1]), jnp.arange(cache[0][0].shape[1])
    mask = (past <= positions[:, None]) & (past >= first[:, None, None])
    turns = _rotations(shape, positions)
    x = weights["token_embd.weight"][tokens]
    grown = []
    for layer, (past_k, past_v) in enumerate(cache):
        block = _block(weights, layer)
        q, k, v = _heads(shape, block, x)
        k = jax.lax.dynamic_update_slice(past_k, _turn(k, turns), (0, start, 0, 0))
        v = jax.lax.dynamic_update_slice(past_v, v, (0, start, 0, 0))
        grown.append((k, v))
        x = x + _attend(shape, block, _turn(q, turns), k, v, mask)
        x = x + _feed_forward(shape, block, x)
    return grown, _norm(shape, x[:, -1], weights["output_norm.weight"]) @ weights[
        "token_embd.weight"
    ].T


def _block(weights: Weights, layer: int) -> Weights:
    prefix = f"blk.{layer}."
    return {
        name[len(prefix) : -len(".weight")]: w
        for name, w in weights.items()
        if name.startswith(prefix)
    }


def _heads(shape: Shape, block: Weights, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, length, _ = x.shape
    normed = _norm(shape, x, block["attn_norm"])
    q = (normed @ block["attn_q"].T).reshape(rows, length, shape.heads, shape.head_width)
    k = (normed @ block["attn_k"].T).reshape(rows, length, shape.kv_heads, shape.head_width)
    v = (normed @ block["attn_v"].T).reshape(rows, length, shape.kv_heads, shape.head_width)
    return q, k, v


def _attend(
    shape: Shape, block: Weights, q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> jax.Array:
    rows, length = q.shape[:2]
    q = q.reshape(rows, length, shape.kv_heads, -1, shape.head_width)
    scores = jnp.einsum("blkgw,bmkw->bkglm", q, k) * shape.head_width**-0.5
    share = jax.nn.softmax(jnp.where(mask[:, None, None], scores, -1e9), axis=-1)
    heard = jnp.einsum("bkglm,bmkw->blkgw", share, v)
    return heard.reshape(rows, length, shape.width) @ block["attn_output"].T


def _feed_forward(shape: Shape, block: Weights, x: jax.Array) -> jax.Array:
    normed = _norm(shape, x, block["ffn_norm"])
    return (jax.nn.silu(normed @ block["ffn_gate"].T) * (normed @ block["ffn_up"].T)) @ block[
        "ffn_down"
    ].T


def _norm(shape: Shape, x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + shape.epsilon) * scale


def _rotations(shape: Shape, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    frequencies = shape.rope_base ** (-jnp.arange(0, shape.head_width, 2) / shape.head_width)
    angles = positions[:, None] * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def _turn(x: jax.Array, turns: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (part[None, :, None, :] for part in turns)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
