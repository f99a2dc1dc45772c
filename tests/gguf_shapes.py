"""Model files of any shape that take no room: a real header, and holes for the weights.

They can be looked into like others and really loaded; all their weights are 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf_files import Gguf, Value, f32, string, u32

TYPES = {"f32": (0, 1, 4), "f16": (1, 1, 2), "q4_0": (2, 32, 18), "q8_0": (8, 32, 34)} | {
    "q4_k": (12, 256, 144),
    "q6_k": (14, 256, 210),
}
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "q4_k": 15}


@dataclass(frozen=True)
class Shape:
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    weights: str
    embedding: str = ""
    output: str = ""
    """Empty: the embedding is multiplied with."""
    architecture: str = "llama"
    head_width: int = 0
    context: int = 131_072

    @property
    def head(self) -> int:
        return self.head_width or self.width // self.heads


SHAPES = {
    "qwen2.5-3b": Shape(2048, 36, 11008, 16, 2, 151_936, "q4_k", "q6_k", architecture="qwen2"),
    "qwen2.5-7b": Shape(3584, 28, 18944, 28, 4, 152_064, "q4_k", "q4_k", "q6_k", "qwen2"),
    "llama-3.1-8b": Shape(4096, 32, 14336, 32, 8, 128_256, "q4_k", "q4_k", "q6_k"),
}


def hollow_gguf(path: Path, shape: Shape) -> Path:
    """Write the header, and leave holes where the weights would be."""
    tensors = _tensors(shape)
    gguf = Gguf(_keys(shape))
    head = gguf.magic + gguf._pack("u32", 3)
    head += gguf._pack("u64", len(tensors)) + gguf._pack("u64", len(gguf.keys))
    head += b"".join(gguf._text(name) + gguf._tagged(value) for name, value in gguf.keys.items())
    offset = 0
    for name, sizes, kind in tensors:
        number, block, size = TYPES[kind]
        head += gguf._text(name) + gguf._pack("u32", len(sizes))
        head += b"".join(gguf._pack("u64", each) for each in sizes)
        head += gguf._pack("u32", number) + gguf._pack("u64", offset)
        elements = 1
        for each in sizes:
            elements *= each
        offset += -(-(elements // block * size) // 32) * 32
    head += b"\0" * (-len(head) % 32)
    with path.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + offset)
    return path


def _tensors(shape: Shape) -> list[tuple[str, tuple[int, ...], str]]:
    width, query = shape.width, shape.heads * shape.head
    key = shape.kv_heads * shape.head
    embedding = shape.embedding or shape.weights
    found: list[tuple[str, tuple[int, ...], str]] = [
        ("token_embd.weight", (width, shape.vocabulary), embedding),
        ("output_norm.weight", (width,), "f32"),
    ]
    if shape.output:
        found.append(("output.weight", (width, shape.vocabulary), shape.output))
    matrices = {
        "attn_q": (width, query),
        "attn_k": (width, key),
        "attn_v": (width, key),
        "attn_output": (query, width),
        "ffn_gate": (width, shape.feed_forward),
        "ffn_up": (width, shape.feed_forward),
        "ffn_down": (shape.feed_forward, width),
    }
    for layer in range(shape.layers):
        for name, sizes in matrices.items():
            found.append((f"blk.{layer}.{name}.weight", sizes, shape.weights))
        for name in ("attn_norm", "ffn_norm"):
            found.append((f"blk.{layer}.{name}.weight", (width,), "f32"))
        if shape.architecture == "qwen2":
            for name, length in (("attn_q", query), ("attn_k", key), ("attn_v", key)):
                found.append((f"blk.{layer}.{name}.bias", (length,), "f32"))
        if shape.architecture == "qwen3":
            for name in ("attn_q_norm", "attn_k_norm"):
                found.append((f"blk.{layer}.{name}.weight", (shape.head,), "f32"))
    return found


def _keys(shape: Shape) -> dict[str, Value]:
    own = {
        "block_count": u32(shape.layers),
        "context_length": u32(shape.context),
        "embedding_length": u32(shape.width),
        "feed_forward_length": u32(shape.feed_forward),
        "attention.head_count": u32(shape.heads),
        "attention.head_count_kv": u32(shape.kv_heads),
        "attention.key_length": u32(shape.head),
        "attention.value_length": u32(shape.head),
        "attention.layer_norm_rms_epsilon": f32(1e-6),
        "rope.dimension_count": u32(shape.head),
        "rope.freq_base": f32(1e6),
        "vocab_size": u32(shape.vocabulary),
    }
    return {
        "general.architecture": string(shape.architecture),
        "general.name": string("hollow"),
        "general.file_type": u32(FILE_TYPES[shape.weights]),
        **{f"{shape.architecture}.{name}": value for name, value in own.items()},
        "tokenizer.ggml.model": string("none"),
    }
