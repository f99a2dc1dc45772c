"""Writes tiny GGUF models, sound ones and ones that are wrong in exactly one place.

`tiny_gguf(path)` is a llama of two layers that llama.cpp really loads and runs; whatever its header
says can be changed by name. numpy is all it needs, and one seed makes all weights.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

KINDS = [
    "u8",
    "i8",
    "u16",
    "i16",
    "u32",
    "i32",
    "f32",
    "bool",
    "string",
    "array",
    "u64",
    "i64",
    "f64",
]
_PACKED = dict(
    u8="B", i8="b", u16="H", i16="h", u32="I", i32="i", f32="f", bool="?", u64="Q", i64="q", f64="d"
)
F32 = 0
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Vocabulary = Literal["bpe", "spm", "ugm", "none"]
Weights = Literal["random", "nan", "inf", "zero output"]


@dataclasses.dataclass
class Value:
    """A value with its GGUF type; `of` is the type of an array's elements."""

    kind: str
    value: Any
    of: str = ""


def u32(value: int) -> Value:
    return Value("u32", value)


def u16(value: int) -> Value:
    return Value("u16", value)


def i32(value: int) -> Value:
    return Value("i32", value)


def f32(value: float) -> Value:
    return Value("f32", value)


def flag(value: bool) -> Value:
    return Value("bool", value)


def string(value: str | bytes) -> Value:
    return Value("string", value)


def array(of: str, values: Iterable[Any]) -> Value:
    return Value("array", list(values), of)


@dataclasses.dataclass
class Tensor:
    """`shape` is in ggml's order, the length of a row first. What is None follows from the data."""

    data: np.ndarray
    name: str
    shape: list[int] | None = None
    type: int = F32
    offset: int | None = None

    def sizes(self) -> list[int]:
        return list(reversed(self.data.shape)) if self.shape is None else list(self.shape)


@dataclasses.dataclass
class Gguf:
    """A file in parts. `repeated` names keys and tensors that are written a second time."""

    keys: dict[str, Value] = dataclasses.field(default_factory=dict)
    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    repeated: list[str] = dataclasses.field(default_factory=list)
    big_endian: bool = False

    def to_bytes(self) -> bytes:
        keys = [
            *self.keys.items(),
            *((name, self.keys[name]) for name in self.repeated if name in self.keys),
        ]
        tensors = [
            *self.tensors.values(),
            *(self.tensors[name] for name in self.repeated if name in self.tensors),
        ]
        n_tensors = len(tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(keys) if self.n_keys is None else self.n_keys
        head = (
            self.magic
            + self._pack("u32", self.version)
            + self._pack("u64", n_tensors)
            + self._pack("u64", n_keys)
        )
        head += b"".join(self._text(name) + self._tagged(value) for name, value in keys)
        infos, data = self._tensors(tensors)
        head += infos
        return head + b"\0" * (-len(head) % self._alignment()) + data

    def _alignment(self) -> int:
        value = self.keys.get("general.alignment")
        return value.value if value and value.kind == "u32" and 0 < value.value < 4096 else 32

    def _tensors(self, tensors: list[Tensor]) -> tuple[bytes, bytes]:
        infos, data = b"", b""
        for tensor in tensors:
            shape = tensor.sizes()
            infos += self._text(tensor.name) + self._pack("u32", len(shape))
            infos += b"".join(self._pack("i64" if size < 0 else "u64", size) for size in shape)
            infos += self._pack("u32", tensor.type) + self._pack(
                "u64", len(data) if tensor.offset is None else tensor.offset
            )
            data += tensor.data.astype("<f4").tobytes()
            data += b"\0" * (-len(data) % self._alignment())
        return infos, data

    def _pack(self, kind: str, value: Any) -> bytes:
        return struct.pack((">" if self.big_endian else "<") + _PACKED[kind], value)

    def _text(self, text: str | bytes) -> bytes:
        data = text if isinstance(text, bytes) else text.encode()
        return self._pack("u64", len(data)) + data

    def _tagged(self, value: Value) -> bytes:
        if value.kind == "raw":  # a type number and bytes as they are
            return self._pack("u32", value.value[0]) + value.value[1]
        return self._pack("u32", KINDS.index(value.kind)) + self._value(value)

    def _value(self, value: Value) -> bytes:
        if value.kind == "string":
            return self._text(value.value)
        if value.kind != "array":
            return self._pack(value.kind, value.value)
        head = self._pack("u32", KINDS.index(value.of)) + self._pack("u64", len(value.value))
        if value.of == "string":
            return head + b"".join(map(self._text, value.value))
        return head + b"".join(self._pack(value.of, element) for element in value.value)


# The model


def tiny_gguf(
    path: str | Path,
    *,
    keys: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Mapping[str, Any]] | None = None,
    drop: Iterable[str] = (),
    vocabulary: Vocabulary = "bpe",
    control: Iterable[str] = (),
    added: Iterable[str] = (),
    weights: Weights = "random",
    edit: Callable[[bytes], bytes] | None = None,
    **head: Any,
) -> Path:
    """Write a tiny llama.

    `keys`     values by name; plain ones keep the type that the key has, `u32(…)` and so on set it
    `tensors`  fields of `Tensor` by the tensor's name
    `drop`     names of keys and tensors to leave out
    `control`  further control tokens, and `added` ones that are text to the vocabulary
    `edit`     changes the finished bytes
    `head`     fields of `Gguf`: version, n_keys, n_tensors, magic, repeated, big_endian
    """
    model = tiny_llama(vocabulary, weights, control=control, added=added)
    for name, value in (keys or {}).items():
        model.keys[name] = _typed(value, model.keys.get(name))
    for name, fields in (tensors or {}).items():
        old = model.tensors.get(name) or Tensor(np.zeros((1, 32), np.float32), name)
        model.tensors[name] = dataclasses.replace(old, **fields)
    for name in drop:
        del (model.keys if name in model.keys else model.tensors)[name]
    data = dataclasses.replace(model, **head).to_bytes()
    path = Path(path)
    path.write_bytes(edit(data) if edit else data)
    return path


def _typed(value: Any, old: Value | None) -> Value:
    if isinstance(value, Value):
        return value
    if old is None:
        raise TypeError(f"the model has no such key, so give the type of {value!r} too")
    return dataclasses.replace(old, value=value)


def tiny_llama(
    vocabulary: Vocabulary = "bpe",
    weights: Weights = "random",
    *,
    n_layers: int = 2,
    control: Iterable[str] = (),
    added: Iterable[str] = (),
) -> Gguf:
    """About 300 tokens, 2 heads of 16 numbers, 330 KB of weights."""
    n_embd, n_ff, n_head = 32, 64, 2
    tokenizer = {"bpe": _bpe, "spm": _spm, "ugm": _ugm, "none": _none}[vocabulary]()
    for kind, texts in ((CONTROL, control), (USER_DEFINED, added)):
        for text in texts:
            tokenizer["tokenizer.ggml.tokens"].value.append(text)
            tokenizer["tokenizer.ggml.token_type"].value.append(kind)
            if "tokenizer.ggml.scores" in tokenizer:
                tokenizer["tokenizer.ggml.scores"].value.append(0.0)
    tokens = tokenizer.get("tokenizer.ggml.tokens")
    n_vocab = len(tokens.value) if tokens else 300
    keys = {
        "general.architecture": string("llama"),
        "general.name": string("tiny"),
        "general.file_type": u32(0),
        "general.alignment": u32(32),
        "llama.block_count": u32(n_layers),
        "llama.context_length": u32(1024),
        "llama.embedding_length": u32(n_embd),
        "llama.feed_forward_length": u32(n_ff),
        "llama.attention.head_count": u32(n_head),
        "llama.attention.head_count_kv": u32(n_head),
        "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
        "llama.rope.dimension_count": u32(n_embd // n_head),
        "llama.rope.freq_base": f32(10000.0),
        "llama.vocab_size": u32(n_vocab),
        **tokenizer,
    }
    random = np.random.default_rng(20)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *sizes: int, scale: float | None = None) -> None:
        """`sizes` in ggml's order. Norms are ones."""
        shape = tuple(reversed(sizes))
        scale = sizes[0] ** -0.5 if scale is None else scale
        data = np.ones(shape) if len(sizes) == 1 else random.normal(0, scale, shape)
        tensors[name] = Tensor(data.astype(np.float32), name)

    add("token_embd.weight", n_embd, n_vocab, scale=1.0)
    add("output_norm.weight", n_embd)
    add("output.weight", n_embd, n_vocab)
    for layer in range(n_layers):
        add(f"blk.{layer}.attn_norm.weight", n_embd)
        for part in ("q", "k", "v", "output"):
            add(f"blk.{layer}.attn_{part}.weight", n_embd, n_embd)
        add(f"blk.{layer}.ffn_norm.weight", n_embd)
        add(f"blk.{layer}.ffn_gate.weight", n_embd, n_ff)
        add(f"blk.{layer}.ffn_up.weight", n_embd, n_ff)
        add(f"blk.{layer}.ffn_down.weight", n_ff, n_embd)
    if weights in ("nan", "inf"):
        tensors["blk.1.ffn_down.weight"].data[:] = float(weights)
    if weights == "zero output":
        tensors["output.weight"].data[:] = 0
    return Gguf(keys, tensors)


def tiny_bert() -> Gguf:
    """An encoder with mean pooling: 32 numbers per text, from a WordPiece vocabulary."""
    n_embd, n_ff, n_head, n_layers, n_ctx = 32, 64, 2, 2, 128
    tokenizer = _wpm()
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"].value)
    keys = {
        "general.architecture": string("bert"),
        "general.name": string("tiny-bert"),
        "general.file_type": u32(0),
        "bert.block_count": u32(n_layers),
        "bert.context_length": u32(n_ctx),
        "bert.embedding_length": u32(n_embd),
        "bert.feed_forward_length": u32(n_ff),
        "bert.attention.head_count": u32(n_head),
        "bert.attention.layer_norm_epsilon": f32(1e-12),
        "bert.attention.causal": flag(False),
        "bert.pooling_type": u32(1),
        **tokenizer,
    }
    random = np.random.default_rng(21)
    tensors: dict[str, Tensor] = {}

    def add(name: str, *sizes: int) -> None:
        shape = tuple(reversed(sizes))
        data = (
            random.normal(0, sizes[0] ** -0.5, shape)
            if len(sizes) > 1
            else np.full(shape, name.endswith("weight"))
        )
        tensors[name] = Tensor(data.astype(np.float32), name)

    def add_pair(name: str, *sizes: int) -> None:
        add(f"{name}.weight", *sizes)
        add(f"{name}.bias", sizes[-1])

    add("token_embd.weight", n_embd, n_vocab)
    add("position_embd.weight", n_embd, n_ctx)
    add("token_types.weight", n_embd, 2)
    add_pair("token_embd_norm", n_embd)
    for layer in range(n_layers):
        for part in ("q", "k", "v", "output"):
            add_pair(f"blk.{layer}.attn_{part}", n_embd, n_embd)
        add_pair(f"blk.{layer}.attn_output_norm", n_embd)
        add_pair(f"blk.{layer}.ffn_up", n_embd, n_ff)
        add_pair(f"blk.{layer}.ffn_down", n_ff, n_embd)
        add_pair(f"blk.{layer}.layer_output_norm", n_embd)
    return Gguf(keys, tensors)


def split_gguf(folder: str | Path, name: str = "tiny", n_shards: int = 2) -> list[Path]:
    """The tiny llama in several files; the first has all keys, each a part of the tensors."""
    whole = tiny_llama()
    names = list(whole.tensors)
    cuts = [len(names) * shard // n_shards for shard in range(n_shards + 1)]
    paths = []
    for shard in range(n_shards):
        keys = dict(whole.keys) if shard == 0 else {}
        keys |= {
            "split.no": u16(shard),
            "split.count": u16(n_shards),
            "split.tensors.count": i32(len(names)),
        }
        tensors = {name: whole.tensors[name] for name in names[cuts[shard] : cuts[shard + 1]]}
        path = Path(folder) / f"{name}-{shard + 1:05}-of-{n_shards:05}.gguf"
        path.write_bytes(Gguf(keys, tensors).to_bytes())
        paths.append(path)
    return paths


# Vocabularies


def _bytes_as_characters() -> list[str]:
    """GPT-2 writes each byte as a visible character."""
    visible = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in visible else chr(next(hidden)) for byte in range(256)]


_PAIRS = [
    "Ġ t", "h e", "i n", "r e", "o n", "Ġt he", "e r", "Ġ a", "a t", "Ġ s", "o r", "e n", "Ġ o",
    "Ġ w", "i s", "e s", "i t", "o u", "a n", "Ġ c", "in g", "Ġ p", "e d", "a l", "Ġ b", "Ġ f",
    "a r", "Ġ m", "Ġ d", "Ġo f", "l e", "Ġ in", "Ġa n", "Ġt o", "i c", "a s", "Ġ h", "r o",
    "Ġan d", "i on", "Ġ l",
]  # fmt: skip


def _bpe() -> dict[str, Value]:
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*_bytes_as_characters(), *(pair.replace(" ", "") for pair in _PAIRS), *specials]
    return {
        "tokenizer.ggml.model": string("gpt2"),
        "tokenizer.ggml.pre": string("qwen2"),
        "tokenizer.ggml.tokens": array("string", tokens),
        "tokenizer.ggml.token_type": array("i32", [NORMAL] * (len(tokens) - 3) + [CONTROL] * 3),
        "tokenizer.ggml.merges": array("string", _PAIRS),
        "tokenizer.ggml.bos_token_id": u32(len(tokens) - 3),
        "tokenizer.ggml.eos_token_id": u32(len(tokens) - 1),
        "tokenizer.ggml.add_bos_token": flag(False),
        "tokenizer.chat_template": string(CHAT_TEMPLATE),
    }


def _spm() -> dict[str, Value]:
    pieces = [
        "▁",
        *"etaoinshrdlcumwfgypbvk.,",
        "▁t",
        "he",
        "▁a",
        "in",
        "er",
        "▁the",
        "on",
        "re",
        "an",
        "▁s",
        "▁w",
    ]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces)]
    scores = [0.0] * 259 + [-float(rank) for rank in range(len(pieces))]
    return {
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.tokens": array("string", tokens),
        "tokenizer.ggml.scores": array("f32", scores),
        "tokenizer.ggml.token_type": array("i32", types),
        "tokenizer.ggml.bos_token_id": u32(1),
        "tokenizer.ggml.eos_token_id": u32(2),
        "tokenizer.ggml.unknown_token_id": u32(0),
        "tokenizer.ggml.add_bos_token": flag(True),
    }


def _ugm() -> dict[str, Value]:
    pieces = [
        "▁",
        *"etaoinshrdlcumwfgypbvk.,",
        "▁t",
        "he",
        "▁a",
        "in",
        "er",
        "▁the",
        "on",
        "re",
        "an",
    ]
    tokens = ["<pad>", "</s>", "<unk>", *pieces]
    return {
        "tokenizer.ggml.model": string("t5"),
        "tokenizer.ggml.tokens": array("string", tokens),
        "tokenizer.ggml.scores": array(
            "f32", [0.0] * 3 + [-float(rank) for rank in range(len(pieces))]
        ),
        "tokenizer.ggml.token_type": array(
            "i32", [CONTROL, CONTROL, UNKNOWN, *[NORMAL] * len(pieces)]
        ),
        "tokenizer.ggml.eos_token_id": u32(1),
        "tokenizer.ggml.unknown_token_id": u32(2),
        "tokenizer.ggml.padding_token_id": u32(0),
        "tokenizer.ggml.add_eos_token": flag(False),
    }


def _wpm() -> dict[str, Value]:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = ["the", "sky", "is", "blue", "why", "hello", "world", *letters]
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(f"▁{word}" for word in words),
        *letters,
        "▁.",
        "▁,",
        "▁?",
    ]
    return {
        "tokenizer.ggml.model": string("bert"),
        "tokenizer.ggml.tokens": array("string", tokens),
        "tokenizer.ggml.token_type": array("i32", [CONTROL] * 5 + [NORMAL] * (len(tokens) - 5)),
        "tokenizer.ggml.token_type_count": u32(2),
        "tokenizer.ggml.bos_token_id": u32(2),
        "tokenizer.ggml.cls_token_id": u32(2),
        "tokenizer.ggml.eos_token_id": u32(3),
        "tokenizer.ggml.seperator_token_id": u32(3),
        "tokenizer.ggml.unknown_token_id": u32(1),
        "tokenizer.ggml.padding_token_id": u32(0),
        "tokenizer.ggml.mask_token_id": u32(4),
    }


def _none() -> dict[str, Value]:
    return {"tokenizer.ggml.model": string("none")}
