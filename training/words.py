"""Random words, names and sentences, and the small grammar that joins them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import tables as t


def name(rng: random.Random) -> str:
    return rng.choice(t.NAMES) if rng.random() < 0.6 else invented(rng).capitalize()


def city(rng: random.Random) -> str:
    known = list(t.CAPITALS.values())
    return rng.choice(known) if rng.random() < 0.7 else invented(rng).capitalize()


def invented(rng: random.Random) -> str:
    """A word that nobody knows, so that the model learns to copy instead of to remember."""
    syllables = [
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    ]
    return "".join(syllables) + rng.choice(["", "", "n", "r", "s", "l", "x"])


def word(rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.5:
        return rng.choice(t.NOUNS)
    if dice < 0.7:
        return rng.choice(t.ADJECTIVES)
    return rng.choice(t.ONES) if dice < 0.8 else name(rng) if dice < 0.9 else invented(rng)


def sentence(rng: random.Random) -> str:
    if rng.random() < 0.3:
        who = name(rng)
    else:
        who = f"The {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}"
    return f"{who} {rng.choice(t.VERBS)} the {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}."


def story(rng: random.Random, hero: str, hero_name: str) -> str:
    helper = rng.choice([h for h in t.HEROES if h != hero])
    wish, place = rng.choice(list(t.WISHES)), rng.choice(t.PLACES)
    adjective = rng.choice(["little", "brave", "happy", "small", "clever"])
    kind = rng.choice(["old", "kind", "wise"])
    return (
        f"Once upon a time there was {a(adjective)} {hero} named {hero_name}. "
        f"{hero_name} lived in {a(place)}. One day {hero_name} wanted to find {wish}. "
        f"{hero_name} asked {a(kind)} {helper} for help. They looked everywhere. "
        f"At last they found {wish} {t.WISHES[wish]}. {hero_name} was very happy."
    )


def portrait(rng: random.Random) -> str:
    who, job = name(rng), rng.choice(t.JOBS)
    sentences = [
        f"{who} lives in {city(rng)}.",
        f"{who} likes {rng.choice(t.HOBBIES)}.",
        f"On {rng.choice(t.DAYS)} {who} eats {rng.choice(t.FOODS)}.",
        f"{who} has {a(rng.choice(t.ADJECTIVES))} {rng.choice(t.NOUNS)}.",
        f"Every day {who} goes to the {rng.choice(t.NOUNS)}.",
    ]
    return " ".join([f"{who} is {a(job)}.", *rng.sample(sentences, rng.randint(2, 4))])


def journey(rng: random.Random) -> str:
    who, place, thing = name(rng), rng.choice(t.NOUNS), rng.choice(t.NOUNS)
    kind, other = rng.choice(t.ADJECTIVES), rng.choice(t.HEROES)
    return (
        f"{who} went to the {place}. There {who} met {a(kind)} {other}. "
        f"The {other} had {a(rng.choice(t.ADJECTIVES))} {thing} and gave it to {who}. "
        f"In the evening {who} went home and was {rng.choice(['happy', 'tired', 'hungry'])}."
    )


def series(rng: random.Random) -> str:
    """Things that follow each other: numbers, days, months; or colours in any order."""
    shape, start = rng.randrange(5), rng.choice([0, 1, 1, 1, 2, 3])
    if shape == 0:
        row = t.ONES[start : start + rng.randint(3, 12)]
    elif shape == 1:
        row = [str(n) for n in range(start, start + rng.randint(3, 20))]
    elif shape == 4:
        row = rng.sample(t.CATEGORIES["colours"], rng.randint(3, 7))
    else:
        row = [t.DAYS, t.MONTHS][shape - 2][:]
    return capital(", ".join(row)) + "."


def a(noun: str) -> str:
    """The word with its article: a fox, an owl."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def joined(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def wrapped(rng: random.Random, question: str) -> tuple[str, str]:
    """The name of a form, and the question in it: after a polite word, or without its mark."""
    if rng.random() < 0.6:
        return "", question
    form = rng.choice(t.WRAPPERS)
    lowered = question[0].lower() + question[1:]
    if form == "lower":
        return form, lowered.rstrip("?.")
    if form == "short":
        return form, question.replace("What is", "What's").replace("Who is", "Who's")
    return form, form.format(question, lowered)
