"""What each request is: the same seed and number always give the same one."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from typing import Any

from tabagent_model.errors import (
    ContextLimitExceededError,
    InvalidRequestError,
    TabAgentModelError,
    TokenizationError,
)

N_CTX = 512
MAX_TOKENS = 64
REFERENCE_EVERY = 100
BURST_EVERY = 500

REFERENCE = "Once upon a time"
REFERENCE_FIELDS: dict[str, Any] = {"max_tokens": 24, "temperature": 0, "ignore_eos": True}

SENTENCES = (
    "Once upon a time there was a small dog who lived near the sea. ",
    "What is the capital of France? ",
    "One, two, three, four, five, six, seven, eight, nine, ten. ",
    "The cat looked at the moon, and the moon looked back. ",
    "Anna went to the market and bought bread, apples and a little cheese. ",
    "Ünïcödé, 字 and 🙂 are letters like all the others. ",
    "Why is the sky blue, and why is the grass green? ",
)
STORY = "".join(random.Random(7).choices(SENTENCES, k=60))
PREAMBLE = "You are a helpful assistant who answers in one short sentence. " + STORY[:400]

NAN = float("nan")
MISTAKES: tuple[tuple[Any, dict[str, Any], type[TabAgentModelError]], ...] = (
    ("", {"add_bos": False}, InvalidRequestError),
    ([], {}, InvalidRequestError),
    (None, {}, InvalidRequestError),
    (b"bytes", {}, InvalidRequestError),
    ([1, -1], {}, InvalidRequestError),
    ([1, 2**40], {}, InvalidRequestError),
    ([1, 10**6], {}, InvalidRequestError),
    ([1, 1.5], {}, InvalidRequestError),
    ([1, True], {}, InvalidRequestError),
    ("half a pair: \ud800", {}, TokenizationError),
    ([5] * N_CTX, {}, ContextLimitExceededError),
    (STORY * 10, {}, ContextLimitExceededError),
    ("x" * 1_000_000, {}, ContextLimitExceededError),
    ("a", {"temperature": -1}, InvalidRequestError),
    ("a", {"temperature": NAN}, InvalidRequestError),
    ("a", {"temperature": "hot"}, InvalidRequestError),
    ("a", {"top_k": -1}, InvalidRequestError),
    ("a", {"top_p": 1.1}, InvalidRequestError),
    ("a", {"min_p": 2}, InvalidRequestError),
    ("a", {"repeat_penalty": NAN}, InvalidRequestError),
    ("a", {"penalty_last_n": -2}, InvalidRequestError),
    ("a", {"seed": -2}, InvalidRequestError),
    ("a", {"max_tokens": -2}, InvalidRequestError),
    ("a", {"stop": [""]}, InvalidRequestError),
    ("a", {"stop": ["x"] * 10_000}, InvalidRequestError),
    ("a", {"priority": "urgent"}, InvalidRequestError),
    ("a", {"timeout_s": -1}, InvalidRequestError),
    ("a", {"temprature": 1}, InvalidRequestError),
)


@dataclass(frozen=True)
class Ask:
    """One thing that a user does."""

    kind: str
    prompt: Any = ""
    """For a crowd, a list of them."""
    fields: dict[str, Any] = field(default_factory=dict)
    way: float = 0.0
    """Which way of leaving, from 0 to 1."""
    pieces: int = 0
    """How many are read before leaving; of a mistake, whether in one piece."""
    delay: float = 0.0
    refusal: type[TabAgentModelError] | None = None


@dataclass(frozen=True)
class Plan:
    seed: int
    requests: int
    cancels: float
    mistakes: float
    loads: int

    def __getitem__(self, number: int) -> Ask:
        if number % REFERENCE_EVERY == 0:
            return Ask("reference", REFERENCE, REFERENCE_FIELDS)
        if number % BURST_EVERY == BURST_EVERY // 2:
            return Ask("burst", "a", {"max_tokens": MAX_TOKENS, "ignore_eos": True})
        if self.loads and number % max(self.requests // self.loads, 2) == 1:
            return Ask("load", REFERENCE, REFERENCE_FIELDS)
        chance = random.Random(self.seed * 1_000_003 + number)
        share = chance.random()
        if share < self.mistakes:
            prompt, fields, refusal = chance.choice(MISTAKES)
            return Ask("mistake", prompt, fields, pieces=chance.randrange(2), refusal=refusal)
        if share < self.mistakes + self.cancels:
            pieces = chance.choice((0, 0, 1, 2, 5, 20))
            delay = chance.choice((0, 0.0005, 0.002, 0.01))
            ask = _prompt(chance), _fields(chance, leaves=True)
            return Ask("cancel", *ask, chance.random(), pieces, delay)
        kind = chance.choices(("generate", "stream", "crowd"), (6, 6, 1))[0]
        if kind == "crowd":
            prompts = [_prompt(chance) for _ in range(chance.randint(2, 5))]
            return Ask(kind, prompts, _fields(chance))
        return Ask(kind, _prompt(chance), _fields(chance))


def _prompt(chance: random.Random) -> str | list[int]:
    """Mostly short; some long, a fifth with one long beginning in common, some of token ids."""
    length = min(int(4 + chance.lognormvariate(math.log(30), 1)), 900)
    if chance.random() < 0.1:
        return chance.choices(range(256), k=length // 3 + 1)
    start = chance.randrange(len(STORY) - length)
    text = STORY[start : start + length]
    return PREAMBLE + text[:200] if chance.random() < 0.2 else text


def _fields(chance: random.Random, leaves: bool = False) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "max_tokens": min(1 + int(chance.lognormvariate(math.log(8), 0.8)), MAX_TOKENS),
        "temperature": chance.choice((0, 0, 0.7, 1.5)),
        "priority": chance.choices(("high", "normal", "low"), (1, 8, 1))[0],
    }
    if leaves:
        fields |= {"max_tokens": MAX_TOKENS, "ignore_eos": True}
    if fields["temperature"]:
        fields["seed"] = chance.randrange(2**32)
    if chance.random() < 0.1:
        fields["stop"] = chance.choice(([" the"], ["."], ["e", "never said"]))
    if chance.random() < 0.1:
        fields["ignore_eos"] = True
    if chance.random() < 0.03:
        fields["timeout_s"] = chance.choice((0.001, 0.01, 0.05))
    return fields
