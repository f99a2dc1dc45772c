"""The vocabulary: byte-level BPE in the manner of Qwen2, trained on our own text.

llama.cpp knows the splitter as `tokenizer.ggml.pre = "qwen2"`: digits stand alone, and so the model
can do sums.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data import documents

VOCABULARY_SIZE = 2560
PRE_TOKENIZER = "qwen2"
SPLITTER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
END_OF_TEXT, TURN_START, TURN_END = range(3)


def train(seed: int, num_documents: int = 40_000) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLITTER), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=CONTROL + USER_DEFINED,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(documents(seed), num_documents), trainer)
    return tokenizer


def load_or_train(path: Path, seed: int) -> Tokenizer:
    if not path.exists():
        train(seed).save(str(path))
    return Tokenizer.from_file(str(path))


@dataclass(frozen=True)
class Vocabulary:
    """The same tokenizer as GGUF wants it: token texts, merges, and the type of each token."""

    tokens: list[str]
    merges: list[str]
    types: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        model = json.loads(tokenizer.to_str())["model"]
        tokens = sorted(model["vocab"], key=model["vocab"].get)
        merges = [" ".join(pair) for pair in model["merges"]]
        types = [3 if token in CONTROL else 4 if token in USER_DEFINED else 1 for token in tokens]
        assert len(set(tokens)) == len(tokens) == tokenizer.get_vocab_size()
        return cls(tokens, merges, types)
