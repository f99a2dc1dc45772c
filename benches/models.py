"""Writes models of public shapes with random weights: how fast one is does not depend on them.

The blocks of quantised tensors are filled with random bytes around a scale that keeps every
activation near one, so nothing has to be quantised and numpy is all it takes. The vocabulary is
made up as well: each word of `words(n)` is exactly one token in all of them.

python -m benches.models --to models qwen2.5-3b-q4_k qwen2.5-7b-q4_k    writes these two
"""

from __future__ import annotations

import argparse
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any, BinaryIO

import numpy as np

VERSION = 2  # counts up when the same shape becomes another file


@dataclass(frozen=True)
class Shape:
    """What of a model decides its speed."""

    architecture: str
    width: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    pre_tokenizer: str
    context: int
    rope_base: float
    weights: str
    """The type of the matrices; q4_k is the usual mixture that ends in M."""
    embedding: str
    """The type of the embedding, which is the output matrix as well, if `output` is None."""
    output: str | None = None

    @property
    def head_width(self) -> int:
        return self.width // self.heads


_QWEN_HALF = dict(
    architecture="qwen2",
    width=896,
    layers=24,
    feed_forward=4864,
    heads=14,
    kv_heads=2,
    vocabulary=151_936,
    pre_tokenizer="qwen2",
    context=32_768,
    rope_base=1e6,
)

SHAPES: dict[str, Shape] = {
    "tiny": Shape(
        architecture="llama",
        width=256,
        layers=10,
        feed_forward=768,
        heads=4,
        kv_heads=2,
        vocabulary=4096,
        pre_tokenizer="llama-bpe",
        context=8192,
        rope_base=1e4,
        weights="q8_0",
        embedding="q8_0",
    ),
    # 896 is no multiple of 256, so llama.cpp's own quantiser keeps this embedding at Q8_0.
    "qwen2.5-0.5b-q4_0": Shape(**_QWEN_HALF, weights="q4_0", embedding="q8_0"),  # type: ignore[arg-type]
    "qwen2.5-0.5b-q8_0": Shape(**_QWEN_HALF, weights="q8_0", embedding="q8_0"),  # type: ignore[arg-type]
    "qwen2.5-1.5b-q4_k": Shape(
        architecture="qwen2",
        width=1536,
        layers=28,
        feed_forward=8960,
        heads=12,
        kv_heads=2,
        vocabulary=151_936,
        pre_tokenizer="qwen2",
        context=32_768,
        rope_base=1e6,
        weights="q4_k",
        embedding="q6_k",
    ),
    "qwen2.5-3b-q4_k": Shape(
        architecture="qwen2",
        width=2048,
        layers=36,
        feed_forward=11_008,
        heads=16,
        kv_heads=2,
        vocabulary=151_936,
        pre_tokenizer="qwen2",
        context=32_768,
        rope_base=1e6,
        weights="q4_k",
        embedding="q6_k",
    ),
    "qwen2.5-7b-q4_k": Shape(
        architecture="qwen2",
        width=3584,
        layers=28,
        feed_forward=18_944,
        heads=28,
        kv_heads=4,
        vocabulary=152_064,
        pre_tokenizer="qwen2",
        context=32_768,
        rope_base=1e6,
        weights="q4_k",
        embedding="q4_k",
        output="q6_k",
    ),
    "llama-3.2-1b-q4_0": Shape(
        architecture="llama",
        width=2048,
        layers=16,
        feed_forward=8192,
        heads=32,
        kv_heads=8,
        vocabulary=128_256,
        pre_tokenizer="llama-bpe",
        context=131_072,
        rope_base=5e5,
        weights="q4_0",
        embedding="q6_k",
    ),
}


def model_file(name: str, folder: Path) -> Path:
    """The model of that shape, written if it is not there yet."""
    path = folder / f"{name}.v{VERSION}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        with unfinished.open("wb") as file:
            _write(file, name, SHAPES[name])
        unfinished.replace(path)
    return path


def words(count: int, seed: int = 0) -> str:
    """A text of so many tokens; another seed, another beginning."""
    dice = random.Random(seed)
    return "".join(" " + "".join(dice.choices(ascii_lowercase, k=2)) for _ in range(count))


# The tensors


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...], str, float]]:
    """Name, sizes with the length of a row first, type, and the spread of the values."""
    width, kv_width = shape.width, shape.kv_heads * shape.head_width
    yield "token_embd.weight", (width, shape.vocabulary), shape.embedding, 3 * width**-0.5
    yield "output_norm.weight", (width,), "f32", 0.0
    if shape.output is not None:
        yield "output.weight", (width, shape.vocabulary), shape.output, 3 * width**-0.5
    if shape.pre_tokenizer == "llama-bpe" and shape.context > 8192:
        yield "rope_freqs.weight", (shape.head_width // 2,), "f32", 0.0
    for layer in range(shape.layers):
        matrices = {
            "attn_q": (width, width),
            "attn_k": (width, kv_width),
            "attn_v": (width, kv_width),
            "attn_output": (width, width),
            "ffn_gate": (width, shape.feed_forward),
            "ffn_up": (width, shape.feed_forward),
            "ffn_down": (shape.feed_forward, width),
        }
        for name, sizes in matrices.items():
            kind = shape.weights
            if kind == "q4_k" and name in ("attn_v", "ffn_down") and _is_precise(layer, shape):
                kind = "q6_k"
            yield f"blk.{layer}.{name}.weight", sizes, kind, sizes[0] ** -0.5
            if shape.architecture == "qwen2" and name in ("attn_q", "attn_k", "attn_v"):
                yield f"blk.{layer}.{name}.bias", sizes[1:], "f32", 0.1
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", (width,), "f32", 0.0


def _is_precise(layer: int, shape: Shape) -> bool:
    """Which layers llama.cpp's mixture for Q4_K_M gives more bits."""
    n = shape.layers
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def _halves(spread: float, count: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
    """Scales of blocks: one size, either sign, so that the weights have no mean."""
    signs = dice.integers(0, 2, count, dtype=np.int8) * 2 - 1
    return (signs * spread).astype("<f2").view(np.uint8).reshape(count, 2)


def _f32(count: int, spread: float, dice: np.random.Generator) -> bytes:
    """Around one for what has no spread (norms), around zero for the rest."""
    values = dice.normal(0, spread, count) if spread else np.ones(count)
    return values.astype("<f4").tobytes()


def _blocks(*parts: np.ndarray[Any, Any]) -> bytes:
    return np.concatenate(parts, axis=1).tobytes()


def _q4_0(count: int, spread: float, dice: np.random.Generator) -> bytes:
    blocks = count // 32
    return _blocks(_halves(spread / 4.6, blocks, dice), _random(blocks, 16, dice))


def _q8_0(count: int, spread: float, dice: np.random.Generator) -> bytes:
    blocks = count // 32
    return _blocks(_halves(spread / 73.9, blocks, dice), _random(blocks, 32, dice))


def _q4_k(count: int, spread: float, dice: np.random.Generator) -> bytes:
    blocks = count // 256
    scale = _halves(spread / 258, blocks, dice)
    least = (scale.view("<f2").astype("f4") * 7.5).astype("<f2").view(np.uint8)
    return _blocks(scale, least, _random(blocks, 12 + 128, dice))


def _q6_k(count: int, spread: float, dice: np.random.Generator) -> bytes:
    blocks = count // 256
    return _blocks(_random(blocks, 128 + 64 + 16, dice), _halves(spread / 1365, blocks, dice))


def _random(rows: int, columns: int, dice: np.random.Generator) -> np.ndarray[Any, Any]:
    return np.frombuffer(dice.bytes(rows * columns), np.uint8).reshape(rows, columns)


# ggml's number of a type, values and bytes of a block, and what fills it.
_TYPES: dict[str, tuple[int, int, int, Callable[[int, float, np.random.Generator], bytes]]] = {
    "f32": (0, 1, 4, _f32),
    "q4_0": (2, 32, 18, _q4_0),
    "q8_0": (8, 32, 34, _q8_0),
    "q4_k": (12, 256, 144, _q4_k),
    "q6_k": (14, 256, 210, _q6_k),
}
_FILE_TYPES = {"q4_0": 2, "q8_0": 7, "q4_k": 15}


# The file

_ALIGNMENT = 32
_SLICE = 1 << 22


def _write(file: BinaryIO, name: str, shape: Shape) -> None:
    keys, tensors = _keys(name, shape), list(_tensors(shape))
    file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys)))
    for key, value in keys.items():
        file.write(_text(key) + _tagged(value))
    offset = 0
    for tensor, sizes, kind, _ in tensors:
        number, per_block, block, _fill = _TYPES[kind]
        file.write(_text(tensor) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
        file.write(struct.pack("<IQ", number, offset))
        offset += _padded(int(np.prod(sizes)) // per_block * block)
    file.write(b"\0" * (-file.tell() % _ALIGNMENT))
    dice = np.random.default_rng(1)
    for _, sizes, kind, spread in tensors:
        fill, left = _TYPES[kind][3], int(np.prod(sizes))
        while left:
            now = min(left, _SLICE)
            file.write(fill(now, spread, dice))
            left -= now
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _keys(name: str, shape: Shape) -> dict[str, Any]:
    tokens, kinds, merges = _vocabulary(shape)
    end = tokens.index("<|endoftext|>")
    own = {
        "block_count": shape.layers,
        "context_length": shape.context,
        "embedding_length": shape.width,
        "feed_forward_length": shape.feed_forward,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": shape.head_width,
        "rope.freq_base": shape.rope_base,
        "vocab_size": shape.vocabulary,
    }
    return {
        "general.architecture": shape.architecture,
        "general.name": f"{name} with random weights",
        "general.alignment": _ALIGNMENT,
        "general.file_type": _FILE_TYPES[shape.weights],
        "general.quantization_version": 2,
        **{f"{shape.architecture}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": shape.pre_tokenizer,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
    }


def _vocabulary(shape: Shape) -> tuple[list[str], list[int], list[str]]:
    """All bytes, then pairs of letters, then those after a space, then pairs of pairs."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    room = shape.vocabulary - max(len(special), shape.vocabulary // 500)
    tokens, merges = _bytes_as_letters(), []
    pairs = ["".join(pair) for pair in product(ascii_lowercase, repeat=2)]
    steps = [
        (tuple(pair) for pair in pairs),
        (("Ġ", pair) for pair in pairs),
        product(pairs, repeat=2),
    ]
    for step in steps:
        for left, right in islice(step, room - len(tokens)):
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    kinds = [1] * len(tokens)
    special += [f"<|reserved_{i}|>" for i in range(shape.vocabulary - len(tokens) - len(special))]
    return tokens + special, kinds + [3] * len(special), merges


def _bytes_as_letters() -> list[str]:
    """GPT-2's alphabet: a printable letter for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _tagged(value: Any) -> bytes:
    if isinstance(value, list):
        kind, pack = (8, _text) if isinstance(value[0], str) else (5, struct.Struct("<i").pack)
        return struct.pack("<IIQ", 9, kind, len(value)) + b"".join(map(pack, value))
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    return struct.pack("<I", 8) + _text(value)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benches.models", description="Writes models with random weights."
    )
    parser.add_argument("shapes", nargs="+", choices=list(SHAPES), metavar="SHAPE")
    parser.add_argument("--to", type=Path, default=Path("models"), help="a folder (./models)")
    asked = parser.parse_args()
    for name in asked.shapes:
        print(model_file(name, asked.to))


if __name__ == "__main__":
    main()
