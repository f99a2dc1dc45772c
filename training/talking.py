"""Small talk, what the model says about itself, what it does not know, memory and stories."""

from __future__ import annotations

import random

import tables as t
import words
from sample import Maker, Message, Sample, assistant, turn, user


def small_talk(rng: random.Random) -> Sample:
    if rng.random() < 0.4:
        (said, answer), name = rng.choice(t.INTRODUCTIONS), words.name(rng)
        question, answer = said.format(name=name), answer.format(name=name)
        return turn("small talk", f"{said}/{name}", question, answer)
    phrases, answer = rng.choice(t.SMALL_TALK)
    said = rng.choice(phrases) + rng.choice(["", "", "", " :)", " Computer.", " friend"])
    return turn("small talk", said, said, answer)


def about(rng: random.Random) -> Sample:
    phrases, answer = rng.choice(t.ABOUT)
    return _asked("about itself and the package", rng, rng.choice(phrases), answer)


def reasons(rng: random.Random) -> Sample:
    question = rng.choice(list(t.REASONS))
    return _asked("simple knowledge", rng, question, t.REASONS[question])


def unknown(rng: random.Random) -> Sample:
    kind = "says that it does not know"
    dice = rng.random()
    if dice < 0.15:
        a, b = rng.randint(100, 9999), rng.randint(3, 9999)
        question = rng.choice([f"What is {a} + {b}?", f"What is {a} * {b}?", f"{a} plus {b}"])
        return turn(kind, question, question, t.TOO_LARGE)
    if dice < 0.25:
        noise = " ".join(words.invented(rng) for _ in range(rng.randint(1, 4)))
        marks = rng.choice("?.") * rng.randint(1, 4)
        question = rng.choice([noise, noise, f"{noise}?", marks])
        return turn(kind, question, question, t.DO_NOT_UNDERSTAND)
    pattern, things = rng.choice(t.UNKNOWN)
    thing = rng.choice(things) if things else words.invented(rng).capitalize()
    question = pattern.format(x=thing.lower() if pattern == "What is a {x}?" else thing)
    return _asked(kind, rng, question, t.DO_NOT_KNOW)


def _asked(kind: str, rng: random.Random, question: str, answer: str) -> Sample:
    prefix, text = words.wrapped(rng, question)
    return turn(kind, f"{question}/{prefix}", text, answer)


def story(rng: random.Random) -> Sample:
    hero, name = rng.choice(t.HEROES), words.name(rng)
    if rng.random() < 0.5:
        verb = rng.choice(["Tell me", "Write"])
        form = f"{verb} a story about {{}} named {{}}."
    else:
        name = t.HERO_NAMES[hero]
        form = rng.choice(["Tell me a story about {}.", "Write a short story about {}.",
                           "A story about {}, please."])  # fmt: skip
    question = form.format(words.a(hero), name)
    key = f"{hero}/{name}/{form}"
    return turn("telling a story", key, question, words.story(rng, hero, name))


# What a user may tell about themselves, in the order in which `told` knows them.
TOPICS = ["name", "colour", "age", "city", "pet"]


def memory(between: Maker) -> Maker:
    """Something is told, other things are said, and then it is asked for."""

    def maker(rng: random.Random) -> Sample:
        facts = [told(rng, topic) for topic in rng.sample(TOPICS, rng.randint(1, 3))]
        messages: list[Message] = []
        for said, reply, _, _ in facts:
            messages += [user(said), assistant(reply)]
        for _ in range(rng.choice([0, 0, 1, 1, 2])):
            messages += between(rng).messages
        _, _, question, answer = rng.choice(facts)
        messages += [user(question), assistant(answer)]
        key = f"{[said for said, *_ in facts]}/{question}"
        return Sample("remembering", key, tuple(messages))

    return maker


def told(rng: random.Random, topic: str) -> tuple[str, str, str, str]:
    """What the user says, the reply, the later question, and its answer."""
    if topic == "name":
        name = words.name(rng)
        said = rng.choice(
            [f"My name is {name}.", f"I am called {name}.", f"Hello, my name is {name}."]
        )
        asks = ["What is my name?", "Who am I?", "Do you know my name?", "How am I called?"]
        return said, f"Nice to meet you, {name}!", rng.choice(asks), f"Your name is {name}."
    if topic == "colour":
        colour = rng.choice(t.CATEGORIES["colours"])
        ask = rng.choice(["What is my favourite colour?", "Which colour do I like?"])
        reply = f"{words.capital(colour)} is a nice colour!"
        answer = f"Your favourite colour is {colour}."
        return f"My favourite colour is {colour}.", reply, ask, answer
    if topic == "age":
        age = rng.randint(5, 99)
        ask = rng.choice(["How old am I?", "What is my age?"])
        said = f"I am {age} years old."
        return said, "Thank you for telling me!", ask, f"You are {age} years old."
    if topic == "city":
        city = words.city(rng)
        ask = rng.choice(["Where do I live?", "In which city do I live?"])
        return f"I live in {city}.", f"{city} is a nice place!", ask, f"You live in {city}."
    animal, pet = rng.choice(list(t.ANIMALS)), words.name(rng)
    ask = rng.choice([f"What is the name of my {animal}?", f"How is my {animal} called?"])
    said = f"I have {words.a(animal)} named {pet}."
    return said, f"{pet} is a nice name!", ask, f"Your {animal} is called {pet}."
