"""The text that the tiny model learns from, and the questions that are held back from it.

    python data.py        prints a few conversations of every kind

Each kind is a function that takes a random generator and gives one `Sample`; the functions live in
`talking`, `facts`, `tasks`, `tool_use` and `system_lines`, and what they say comes from `tables`.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import facts
import system_lines
import tables as t
import talking
import tasks
import tool_use
import words
from sample import (
    Maker,
    Message,
    Sample,
    assistant,
    for_training,
    is_held_back,
    render,
    system,
    user,
)

END_OF_TEXT = "<|endoftext|>"


def documents(seed: int) -> Iterator[str]:
    """Endless training texts: single turns, longer conversations, and plain prose."""
    rng = random.Random(seed)
    while True:
        dice = rng.random()
        if dice < 0.60:
            yield render(_single(rng))
        elif dice < 0.72:
            yield render(_conversation(rng, turns=rng.choice([2, 2, 3, 3, 4, 5, 6])))
        elif dice < 0.725:
            yield render(_conversation(rng, turns=rng.randint(10, 28)))
        else:
            yield _plain(rng) + END_OF_TEXT


def held_back(kind: str, count: int, seed: int) -> list[Sample]:
    """Different held-back samples of one kind; fewer than `count` if the kind has no more."""
    rng, found = random.Random(f"{kind}/{seed}"), {}
    _, maker = KINDS[kind]
    for _ in range(count * 400):
        sample = maker(rng)
        if sample.is_held_back:
            found.setdefault(sample.key, sample)
        if len(found) == count:
            break
    return list(found.values())


def any_kind(rng: random.Random) -> Sample:
    makers = list(KINDS.values())
    return rng.choices(makers, [weight for weight, _ in makers])[0][1](rng)


def any_turn(rng: random.Random) -> Sample:
    """One question and its answer, without a system line or tools."""
    while True:
        sample = for_training(rng, any_kind)
        if len(sample.messages) == 2 and not sample.tools:
            return sample


def _needs_no_tool(rng: random.Random) -> Sample:
    talk: list[Maker] = [talking.small_talk, talking.about, talking.reasons]
    return rng.choice([*talk, facts.facts, tasks.copy])(rng)


KINDS: dict[str, tuple[int, Maker]] = {  # kind: (weight, maker)
    "small talk": (4, talking.small_talk),
    "about itself and the package": (8, talking.about),
    "simple knowledge": (3, talking.reasons),
    "says that it does not know": (6, talking.unknown),
    "facts": (18, facts.facts),
    "yes or no": (11, facts.yes_or_no),
    "copying": (13, tasks.copy),
    "repeating": (7, tasks.repeat),
    "counting": (6, tasks.count),
    "lists": (13, tasks.lists),
    "small sums": (12, tasks.sums),
    "word problems": (4, tasks.word_problem),
    "comparing numbers": (8, tasks.compare),
    "filling JSON": (9, tasks.fill_json),
    "calling a tool": (3, tool_use.tool_call),
    "reading a tool's answer": (5, tool_use.tool_answer),
    "leaving tools alone": (3, tool_use.no_tool(_needs_no_tool)),
    "obeying a system line": (14, system_lines.system_line),
    "remembering": (4, talking.memory(any_turn)),
    "telling a story": (2, talking.story),
}


def _single(rng: random.Random) -> Sample:
    sample = for_training(rng, any_kind)
    if sample.messages[0]["role"] == "system":
        return sample
    if rng.random() < 0.12:
        line = system(rng.choice(t.NEUTRAL_SYSTEM))
        return replace(sample, messages=(line, *sample.messages))
    if rng.random() < 0.1:
        return replace(sample, messages=sample.messages + any_turn(rng).messages)
    return sample


def _conversation(rng: random.Random, turns: int) -> Sample:
    """Several turns about different things; now and then under one rule, or remembering."""
    messages: list[Message] = []
    if rng.random() < 0.2:
        rule = system_lines.any_rule(rng)
        exchanges = [rule.exchange(rng) for _ in range(turns)]
        if any(is_held_back(rule.key(question)) for question, _ in exchanges):
            return _conversation(rng, turns)
        messages.append(system(rule.line))
        for question, answer in exchanges:
            messages += [user(question), assistant(answer)]
        return Sample("conversation", "", tuple(messages))
    if rng.random() < 0.3:
        messages.append(system(rng.choice(t.NEUTRAL_SYSTEM)))
    topics, known = rng.sample(talking.TOPICS, len(talking.TOPICS)), []
    for _ in range(turns):
        dice = rng.random()
        if dice < 0.15 and topics:
            said, reply, question, answer = talking.told(rng, topics.pop())
            known.append((user(question), assistant(answer)))
            messages += [user(said), assistant(reply)]
        elif dice < 0.3 and known:
            messages += rng.choice(known)
        else:
            messages += any_turn(rng).messages
    return Sample("conversation", "", tuple(messages))


def _plain(rng: random.Random) -> str:
    """Text without a template: prose, rows of sums, questions with their answers."""
    dice = rng.random()
    if dice < 0.16:
        return words.story(rng, rng.choice(t.HEROES), words.name(rng))
    if dice < 0.26:
        return words.portrait(rng)
    if dice < 0.33:
        return words.journey(rng)
    if dice < 0.38:
        return words.series(rng)
    if dice < 0.46:
        return " ".join(facts.any_fact(rng).sentence for _ in range(rng.randint(1, 5)))
    if dice < 0.68:
        rows = (tasks.any_sum(rng) for _ in range(9))
        return "\n".join(
            f"{text} = {result}" for key, text, result in rows if not is_held_back(key)
        )
    if dice < 0.76:
        return " ".join(words.sentence(rng) for _ in range(rng.randint(1, 5)))
    question, answer = (message["content"] for message in any_turn(rng).messages)
    return question + (" " if question[-1] in ".?!" else "\n") + answer


def main() -> None:
    rng = random.Random(0)
    for kind, (_, maker) in KINDS.items():
        print(f"\n==== {kind}\n")
        for _ in range(3):
            print(render(maker(rng)))


if __name__ == "__main__":
    main()
