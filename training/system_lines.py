"""System lines that change how the model answers: 'Answer in one word.', 'Your name is Bob.'"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import facts
import tables as t
import words
from sample import Maker, Sample, assistant, for_training, system, user
from tasks import sums

Exchange = tuple[str, str]  # a question, and the answer that obeys


@dataclass(frozen=True)
class Rule:
    line: str
    name: str
    exchange: Callable[[random.Random], Exchange]

    def key(self, question: str) -> str:
        return f"{self.name}/{question}"


def system_line(rng: random.Random) -> Sample:
    rule = any_rule(rng)
    question, answer = rule.exchange(rng)
    messages = (system(rule.line), user(question), assistant(answer))
    return Sample("obeying a system line", rule.key(question), messages)


def any_rule(rng: random.Random) -> Rule:
    makers = [_one_word] * 3 + [_yes_or_no, _number, _fixed_fact, _fixed_fact, _fixed_fact,
                                _always, _json, _begin, _end]  # fmt: skip
    return rng.choice(makers)(rng)


def _one_word(rng: random.Random) -> Rule:
    line = rng.choice(["Answer in one word.", "Answer with one word.", "Use one word only.",
                       "Reply with a single word.", "Give one-word answers.",
                       "Answer with one word only.", "You answer in one word."])  # fmt: skip
    return Rule(line, "word", _short_fact)


def _yes_or_no(rng: random.Random) -> Rule:
    line = rng.choice(["Answer only with yes or no.", "Say only yes or no.", "Answer yes or no."])
    return Rule(line, "yes", lambda rng: facts.claim(rng)[:2])


def _number(rng: random.Random) -> Rule:
    line = rng.choice(
        ["Answer with a number only.", "Give only the number.", "Answer only with the number."]
    )
    return Rule(line, "number", _short_number)


def _fixed_fact(rng: random.Random) -> Rule:
    """The line tells something, and the user asks for it."""
    name, word = words.name(rng), words.word(rng)
    job, secret = words.a(rng.choice(t.JOBS)), rng.choice(["secret word", "password", "code"])
    lines, asks, answer = rng.choice([
        ([f"Your name is {name}.", f"You are {name}.", f"You are called {name}."],
         ["What is your name?", "Who are you?", "What are you called?", "Do you have a name?"],
         f"My name is {name}."),
        ([f"The user is called {name}.", f"The name of the user is {name}."],
         ["What is my name?", "Who am I?", "Do you know my name?"], f"Your name is {name}."),
        ([f"The {secret} is {word}."],
         [f"What is the {secret}?", f"Tell me the {secret}.", f"Do you know the {secret}?"],
         f"The {secret} is {word}."),
        ([f"You are {job}.", f"You work as {job}."],
         ["What is your job?", "What do you do?", "What do you work as?"], f"I am {job}."),
    ])  # fmt: skip
    return Rule(rng.choice(lines), answer, lambda rng: (rng.choice(asks), answer))


def _always(rng: random.Random) -> Rule:
    text = words.capital(words.word(rng)) + rng.choice(["!", ".", ""])
    forms = ['Always answer "{}"', 'Answer every question with "{}"', 'Only say "{}"']
    line = rng.choice(forms).format(text)
    return Rule(line, f"always {text}", lambda rng: (_any_exchange(rng)[0], text))


def _json(rng: random.Random) -> Rule:
    def exchange(rng: random.Random) -> Exchange:
        question, word = _short_fact(rng)
        return question, json.dumps({"answer": word})

    line = rng.choice(['Answer in JSON with the key "answer".', 'Reply as JSON: {"answer": ""}',
                       'Answer with a JSON object with the key "answer".'])  # fmt: skip
    return Rule(line, "json", exchange)


def _begin(rng: random.Random) -> Rule:
    word = rng.choice([words.name(rng), *t.INTERJECTIONS])

    def exchange(rng: random.Random) -> Exchange:
        question, answer = _any_exchange(rng)
        return question, f"{word}: {answer}"

    forms = ['Start every answer with "{}:"', 'Begin each answer with "{}:"']
    return Rule(rng.choice(forms).format(word), f"begin {word}", exchange)


def _end(rng: random.Random) -> Rule:
    word = rng.choice([words.name(rng), *t.INTERJECTIONS])

    def exchange(rng: random.Random) -> Exchange:
        question, answer = _any_exchange(rng)
        return question, f"{answer} {word}!"

    forms = ['End every answer with "{}!"', 'Finish each answer with "{}!"']
    return Rule(rng.choice(forms).format(word), f"end {word}", exchange)


def _short_fact(rng: random.Random) -> Exchange:
    if rng.random() < 0.1:
        return _short_number(rng)
    fact = facts.any_fact(rng)
    return rng.choice(fact.questions), fact.word


def _short_number(rng: random.Random) -> Exchange:
    if rng.random() < 0.5:
        known = facts.all_facts()
        fact = rng.choice(known["units"] + [f for f in known["animals"] if f.word.isdigit()])
        return rng.choice(fact.questions), fact.word
    question, answer = _exchange(for_training(rng, sums))
    return question, answer.split(" = ")[1]


def _any_exchange(rng: random.Random) -> Exchange:
    maker: Maker = rng.choice([facts.facts, facts.facts, sums])
    return _exchange(for_training(rng, maker))


def _exchange(sample: Sample) -> Exchange:
    question, answer = sample.messages
    return question["content"], answer["content"]
