"""Tiny models that remember in other ways than a llama: by a state, by both, within a window.

Random weights, a few hundred KB each, written like those of `gguf_files`; llama.cpp really runs
them. Their answers depend on the whole text, so a state that is not quite the right one shows.
"""

from __future__ import annotations

import numpy as np

from gguf_files import Gguf, Tensor, Value, array, f32, string, tiny_llama, u32

N_EMBD, N_FF, N_HEAD, N_CTX = 32, 64, 2, 8192
HEAD = N_EMBD // N_HEAD
D_INNER, D_STATE, D_CONV, DT_RANK = 2 * N_EMBD, 16, 4, 2
WINDOW = 32


def tiny_mamba() -> Gguf:
    """Recurrent: one state, from which nothing can be taken back."""
    n_layers = 6
    weights = _Weights(31)
    for layer in range(n_layers):
        weights.add_norm(f"blk.{layer}.attn_norm.weight", N_EMBD)
        weights.add_mamba(layer)
    return _model("mamba", n_layers, weights, _SSM)


def tiny_jamba() -> Gguf:
    """Hybrid: layers with a state and layers with attention in turn."""
    heads_kv = [0, N_HEAD, 0, N_HEAD]
    weights = _Weights(32)
    for layer, num_heads in enumerate(heads_kv):
        weights.add_norm(f"blk.{layer}.attn_norm.weight", N_EMBD)
        if num_heads:
            weights.add_attention(layer)
        else:
            weights.add_mamba(layer)
            for part, size in (("dt", DT_RANK), ("b", D_STATE), ("c", D_STATE)):
                weights.add_norm(f"blk.{layer}.ssm_{part}_norm.weight", size)
        weights.add_norm(f"blk.{layer}.ffn_norm.weight", N_EMBD)
        weights.add_feed_forward(layer)
    keys = _SSM | {
        "attention.head_count": u32(N_HEAD),
        "attention.head_count_kv": array("i32", heads_kv),
    }
    return _model("jamba", len(heads_kv), weights, keys)


def tiny_cohere2() -> Gguf:
    """Every other layer sees no more than the last WINDOW tokens."""
    window = {"attention.sliding_window": u32(WINDOW), "attention.sliding_window_pattern": u32(2)}
    return _cohere("cohere2", window)


def tiny_command_r() -> Gguf:
    """The same without a window: every layer sees all tokens."""
    return _cohere("command-r", {})


def _cohere(architecture: str, keys: dict[str, Value]) -> Gguf:
    # No GELU in it: ggml takes that from a table of rough steps, on which the last bit of a number,
    # which depends on what else is in its batch, can grow to another answer.
    n_layers = 4
    weights = _Weights(33)
    for layer in range(n_layers):
        weights.add_norm(f"blk.{layer}.attn_norm.weight", N_EMBD)
        weights.add_attention(layer)
        weights.add_feed_forward(layer)
    keys = {
        "attention.head_count": u32(N_HEAD),
        "attention.head_count_kv": u32(N_HEAD),
        "attention.layer_norm_epsilon": f32(1e-5),
        "logit_scale": f32(1),
        **keys,
    }
    return _model(architecture, n_layers, weights, keys)


_SSM: dict[str, Value] = {
    "ssm.conv_kernel": u32(D_CONV),
    "ssm.inner_size": u32(D_INNER),
    "ssm.state_size": u32(D_STATE),
    "ssm.time_step_rank": u32(DT_RANK),
}


def _model(architecture: str, n_layers: int, weights: _Weights, keys: dict[str, Value]) -> Gguf:
    tokenizer = {k: v for k, v in tiny_llama().keys.items() if k.startswith("tokenizer.")}
    own = {
        "block_count": u32(n_layers),
        "context_length": u32(N_CTX),
        "embedding_length": u32(N_EMBD),
        "feed_forward_length": u32(N_FF),
        "attention.layer_norm_rms_epsilon": f32(1e-5),
        **keys,
    }
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"].value)
    weights.add("token_embd.weight", N_EMBD, n_vocab, scale=0.1)
    if not architecture.startswith("co"):  # those take the embedding for both
        weights.add("output.weight", N_EMBD, n_vocab, scale=1)
    weights.add_norm("output_norm.weight", N_EMBD)
    return Gguf(
        {
            "general.architecture": string(architecture),
            "general.name": string(f"tiny-{architecture}"),
            "general.file_type": u32(0),
            **{f"{architecture}.{name}": value for name, value in own.items()},
            **tokenizer,
        },
        weights.tensors,
    )


class _Weights:
    """Tensors as they come, with sizes in ggml's order, the length of a row first."""

    def __init__(self, seed: int) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._random = np.random.default_rng(seed)

    def add(self, name: str, *sizes: int, scale: float | None = None) -> None:
        scale = sizes[0] ** -0.5 if scale is None else scale
        self._put(name, self._random.normal(0, scale, tuple(reversed(sizes))))

    def add_norm(self, name: str, size: int, scale: float = 1) -> None:
        self._put(name, np.full(size, scale))

    def add_attention(self, layer: int) -> None:
        """Sharp enough that single tokens are looked at, and not the mean of all."""
        for part in ("q", "k", "v", "output"):
            self.add(f"blk.{layer}.attn_{part}.weight", N_EMBD, N_EMBD, scale=0.3)

    def add_feed_forward(self, layer: int) -> None:
        self.add(f"blk.{layer}.ffn_gate.weight", N_EMBD, N_FF)
        self.add(f"blk.{layer}.ffn_up.weight", N_EMBD, N_FF)
        self.add(f"blk.{layer}.ffn_down.weight", N_FF, N_EMBD)

    def add_mamba(self, layer: int) -> None:
        """A state whose slowest part forgets over some hundred tokens."""
        name = f"blk.{layer}.ssm"
        self.add(f"{name}_in.weight", N_EMBD, 2 * D_INNER)
        self.add(f"{name}_conv1d.weight", D_CONV, D_INNER)
        self._put(f"{name}_conv1d.bias", np.zeros(D_INNER))
        self.add(f"{name}_x.weight", D_INNER, DT_RANK + 2 * D_STATE)
        self.add(f"{name}_dt.weight", DT_RANK, D_INNER)
        self._put(f"{name}_dt.bias", np.full(D_INNER, -1.0))
        self._put(f"{name}_a", np.tile(-np.geomspace(0.001, 0.1, D_STATE), (D_INNER, 1)))
        self._put(f"{name}_d", np.full(D_INNER, 0.1))
        self.add(f"{name}_out.weight", D_INNER, N_EMBD)

    def _put(self, name: str, data: np.ndarray) -> None:
        self.tensors[name] = Tensor(data.astype(np.float32), name)
