"""Asks a GGUF model held-back questions, and prints how many answers are right, per kind.

    python evaluate.py ../python/tabagent_model/assets/tiny-chat.gguf
    python evaluate.py tiny-chat.gguf --sampling default --show-errors
    python evaluate.py tiny-chat.gguf --draft tiny-draft.gguf

An answer is right when it is the expected text to the letter, and the model ended its turn. A story
is right when it follows the story grammar and is about the animal and the name that were asked for.
The forward pass is our own, over the weights in the file; `--engine package` asks the installed
`tabagent_model` instead.
"""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

import tables
import tokenizer as vocabulary
from data import KINDS, held_back
from model import Shape, Weights, empty_cache, hidden_states, next_logits
from sample import Sample, render

MAX_NEW_TOKENS = 320
ROWS = 32
ENDED = "<ended>"  # stands after an answer that the model ended itself


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; without arguments as the package does it."""

    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.9
    repeat_penalty: float = 1.1
    penalty_window: int = 64

    def choose(self, logits: np.ndarray, past: list[int], rng: np.random.Generator) -> int:
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.copy()
        seen = np.unique(past[-self.penalty_window :])
        logits[seen] = np.where(
            logits[seen] > 0, logits[seen] / self.repeat_penalty, logits[seen] * self.repeat_penalty
        )
        best = np.argsort(-logits)[: self.top_k]
        share = np.exp(logits[best] - logits[best[0]])
        share /= share.sum()
        kept = np.searchsorted(np.cumsum(share), self.top_p) + 1
        share = np.exp((logits[best[:kept]] - logits[best[0]]) / self.temperature)
        return int(rng.choice(best[:kept], p=share / share.sum()))


SAMPLINGS = {"greedy": Sampling(temperature=0, repeat_penalty=1.0), "default": Sampling()}


class GgufModel:
    """A GGUF file of ours, read back: shape, vocabulary and dequantized weights."""

    def __init__(self, path: Path) -> None:
        reader = GGUFReader(path)
        self.shape = _shape(reader)
        self.tokenizer = _tokenizer(reader)
        self.weights = {
            tensor.name: jnp.asarray(dequantize(tensor.data, tensor.tensor_type))
            for tensor in reader.tensors
        }
        self._step = jax.jit(functools.partial(next_logits, self.shape), donate_argnums=1)
        self._best = jax.jit(self._best_of_all)

    def _best_of_all(self, weights: Weights, tokens: jax.Array) -> jax.Array:
        hidden = hidden_states(self.shape, weights, tokens, jnp.ones_like(tokens))
        return jnp.argmax(hidden @ weights["token_embd.weight"].T, axis=-1)

    def answers(self, prompts: list[str], sampling: Sampling, seed: int) -> list[str]:
        """Rows of similar length go through the model together."""
        encoded = [encoding.ids for encoding in self.tokenizer.encode_batch(prompts)]
        order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
        found: dict[int, str] = {}
        for start in range(0, len(order), ROWS):
            group = order[start : start + ROWS]
            texts = self._generate(
                [encoded[i] for i in group], sampling, np.random.default_rng(seed + start)
            )
            found.update(zip(group, texts, strict=True))
        return [found[i] for i in range(len(prompts))]

    def best_next(self, ids: list[int]) -> np.ndarray:
        """The best token after each of these tokens."""
        length = -(-len(ids) // 64) * 64
        tokens = np.array([ids + [0] * (length - len(ids))])
        return np.asarray(self._best(self.weights, tokens))[0, : len(ids)]

    def _generate(
        self, prompts: list[list[int]], sampling: Sampling, rng: np.random.Generator
    ) -> list[str]:
        length = -(-max(map(len, prompts)) // 64) * 64
        padded = prompts + [prompts[0]] * (ROWS - len(prompts))
        tokens = np.array([[0] * (length - len(ids)) + ids for ids in padded])
        first = np.array([length - len(ids) for ids in padded])
        cache = empty_cache(self.shape, ROWS, length + MAX_NEW_TOKENS)
        past, done = [list(ids) for ids in padded], np.zeros(ROWS, bool)
        position = 0
        for _ in range(MAX_NEW_TOKENS):
            cache, logits = self._step(self.weights, cache, tokens, position, first)
            position += tokens.shape[1]
            tokens = np.zeros((ROWS, 1), int)
            for row, row_logits in enumerate(np.asarray(logits)):
                if not done[row]:
                    tokens[row] = sampling.choose(row_logits, past[row], rng)
                    past[row].append(int(tokens[row, 0]))
                    done[row] = tokens[row, 0] in (vocabulary.TURN_END, vocabulary.END_OF_TEXT)
            if done[: len(prompts)].all():
                break
        return [self._text(ids[len(prompt) :]) for ids, prompt in zip(past, prompts, strict=False)]

    def _text(self, ids: list[int]) -> str:
        ended = ids[-1] in (vocabulary.TURN_END, vocabulary.END_OF_TEXT)
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)
        return text + ENDED if ended else text


def _shape(reader: GGUFReader) -> Shape:
    def value(key: str) -> int | float:
        return reader.fields[key].contents()

    return Shape(
        width=value("llama.embedding_length"),
        layers=value("llama.block_count"),
        feed_forward=value("llama.feed_forward_length"),
        heads=value("llama.attention.head_count"),
        kv_heads=value("llama.attention.head_count_kv"),
        vocabulary=value("llama.vocab_size"),
        context=value("llama.context_length"),
        rope_base=value("llama.rope.freq_base"),
        epsilon=value("llama.attention.layer_norm_rms_epsilon"),
    )


def _tokenizer(reader: GGUFReader) -> Tokenizer:
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    merges = [
        tuple(merge.split(" ")) for merge in reader.fields["tokenizer.ggml.merges"].contents()
    ]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.add_special_tokens(vocabulary.CONTROL + vocabulary.USER_DEFINED)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(vocabulary.SPLITTER), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def package_answers(path: Path, prompts: list[str], sampling: Sampling, seed: int) -> list[str]:
    """The same questions through llama.cpp, as a user of the package asks them."""
    from tabagent_model import Model

    with Model.load(str(path), n_ctx=2048) as model:
        completions = model.generate(
            [model.tokenize(prompt, add_bos=False, special=True) for prompt in prompts],
            max_tokens=MAX_NEW_TOKENS,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            repeat_penalty=sampling.repeat_penalty,
            seed=seed,
        )
    return [c.text + (ENDED if c.finish_reason == "stop" else "") for c in completions]


STORY = re.compile(
    r"Once upon a time there was an? \w+ (?P<hero>\w+) named (?P<name>\w+)\. "
    r"(?P=name) lived in an? (?P<place>[\w ]+)\. "
    r"One day (?P=name) wanted to find (?P<wish>[\w ]+)\. "
    r"(?P=name) asked an? \w+ \w+ for help\. They looked everywhere\. "
    r"At last they found (?P=wish) (?P<where>[\w ]+)\. (?P=name) was very happy\."
)


def is_right(sample: Sample, answer: str) -> bool:
    whole, prompt = render(sample), render(sample, generation_prompt=True)
    expected = whole.removeprefix(prompt).removesuffix("<|im_end|>\n")
    if sample.kind != "telling a story":
        return answer == expected + ENDED
    wanted, told = STORY.fullmatch(expected), STORY.fullmatch(answer.removesuffix(ENDED))
    return bool(
        wanted
        and told
        and answer.endswith(ENDED)
        and told["hero"] == wanted["hero"]
        and told["name"] == wanted["name"]
        and told["place"] in tables.PLACES
        and tables.WISHES.get(told["wish"]) == told["where"]
    )


def evaluate(
    answer: Callable[[list[Sample]], list[str]], per_kind: int, seed: int, show_errors: bool
) -> tuple[int, int]:
    samples = {kind: held_back(kind, per_kind, seed) for kind in KINDS}
    flat = [sample for group in samples.values() for sample in group]
    answers = dict(zip(map(id, flat), answer(flat), strict=True))
    print(f"{'kind':32} {'right':>6} {'of':>4} {'':>6}  ended its turn")
    total = 0
    for kind, group in samples.items():
        right = [is_right(sample, answers[id(sample)]) for sample in group]
        ended = sum(answers[id(sample)].endswith(ENDED) for sample in group)
        total += sum(right)
        print(f"{kind:32} {sum(right):6} {len(group):4} {sum(right) / len(group):6.1%}  {ended}")
        if show_errors:
            for sample, fine in zip(group, right, strict=True):
                if not fine:
                    prompt = [m.get("content") or m.get("tool_calls") for m in sample.messages]
                    print(f"      {prompt}\n        → {answers[id(sample)]}")
    print(f"{'all':32} {total:6} {len(flat):4} {total / len(flat):6.1%}")
    return total, len(flat)


def agreement(chat: GgufModel, draft: GgufModel, per_kind: int, seed: int) -> tuple[int, int]:
    """How many tokens of the chat model's greedy answers the draft would have guessed."""
    samples = [sample for kind in KINDS for sample in held_back(kind, per_kind, seed)]
    prompts = [render(sample, generation_prompt=True) for sample in samples]
    answers = chat.answers(prompts, SAMPLINGS["greedy"], seed)
    guessed = total = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        start = len(chat.tokenizer.encode(prompt).ids)
        ids = chat.tokenizer.encode(prompt + answer.replace(ENDED, "<|im_end|>")).ids
        guesses = draft.best_next(ids[:-1])[start - 1 :]
        guessed += int(np.sum(guesses == ids[start:]))
        total += len(ids) - start
    print(f"the draft guesses {guessed} of {total} tokens, {guessed / total:.1%}")
    return guessed, total


def main() -> None:
    parser = argparse.ArgumentParser(description="Score a GGUF model on held-back questions.")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--sampling", choices=list(SAMPLINGS), default="greedy")
    parser.add_argument("--engine", choices=["own", "package"], default="own")
    parser.add_argument("--draft", type=Path, help="count how often this draft guesses right")
    parser.add_argument("--per-kind", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show-errors", action="store_true")
    arguments = parser.parse_args()
    sampling = SAMPLINGS[arguments.sampling]
    if arguments.draft:
        chat, draft = GgufModel(arguments.gguf), GgufModel(arguments.draft)
        agreement(chat, draft, arguments.per_kind, arguments.seed)
        return

    def answer(samples: list[Sample]) -> list[str]:
        prompts = [render(sample, generation_prompt=True) for sample in samples]
        if arguments.engine == "package":
            return package_answers(arguments.gguf, prompts, sampling, arguments.seed)
        return GgufModel(arguments.gguf).answers(prompts, sampling, arguments.seed)

    evaluate(answer, arguments.per_kind, arguments.seed, arguments.show_errors)


if __name__ == "__main__":
    main()
