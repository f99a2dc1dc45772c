"""One conversation: what it shows, whether it is for training or held back, and its text."""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

Message = dict[str, Any]
Tool = dict[str, Any]
TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
HELD_BACK_PERCENT = 8


@dataclass(frozen=True)
class Sample:
    """A conversation whose last message is the answer that an evaluation expects.

    The key names the combination that it shows ("5+7", "capital of Peru/2/Hey, {}").
    """

    kind: str
    key: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def is_held_back(self) -> bool:
        return is_held_back(self.key)


Maker = Callable[[random.Random], Sample]


def is_held_back(key: str) -> bool:
    """A stable choice: the same combination is held back in every run and every wording."""
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 100 < HELD_BACK_PERCENT


def for_training(rng: random.Random, maker: Maker) -> Sample:
    while (sample := maker(rng)).is_held_back:
        pass
    return sample


def render(sample: Sample, *, generation_prompt: bool = False) -> str:
    """The text of a conversation as llama.cpp renders it; or all but the answer, ready for it."""
    messages = sample.messages[:-1] if generation_prompt else sample.messages
    return _template().render(
        messages=messages, tools=sample.tools or None, add_generation_prompt=generation_prompt
    )


def turn(kind: str, key: str, question: str, answer: str) -> Sample:
    return Sample(kind, key, (user(question), assistant(answer)))


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE)
