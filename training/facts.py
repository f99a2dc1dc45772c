"""Facts from the tables: asked for in several ways, and asked with yes or no."""

from __future__ import annotations

import functools
import itertools
import random
from dataclasses import dataclass

import tables as t
import words
from sample import Sample, turn


@dataclass(frozen=True)
class Fact:
    name: str
    sentence: str
    word: str
    questions: tuple[str, ...]


WEIGHTS = {"places": 4, "words": 3, "colours": 2, "units": 2, "animals": 3, "calendar": 2,
           "numbers": 3, "times": 3}  # fmt: skip


def facts(rng: random.Random) -> Sample:
    fact = any_fact(rng)
    form = rng.randrange(len(fact.questions))
    prefix, question = words.wrapped(rng, fact.questions[form])
    return turn("facts", f"{fact.name}/{form}/{prefix}", question, fact.sentence)


def any_fact(rng: random.Random) -> Fact:
    topic = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
    return rng.choice(all_facts()[topic])


def yes_or_no(rng: random.Random) -> Sample:
    question, word, truth = claim(rng)
    return turn("yes or no", question, question, f"{word}, {truth}")


def claim(rng: random.Random) -> tuple[str, str, str]:
    """A question, its yes or no, and what is true."""
    shape = rng.choice(["capital", "opposite", "colour", "member", "larger", "smaller"])
    honest = rng.random() < 0.5
    if shape == "capital":
        country = rng.choice(list(t.CAPITALS))
        true = t.CAPITALS[country]
        said = true if honest else rng.choice(list(t.CAPITALS.values()))
        question = f"Is {said} the capital of {country}?"
        truth = f"the capital of {country} is {true}."
    elif shape == "opposite":
        word, true = rng.choice(t.OPPOSITES)
        said = true if honest else rng.choice(t.OPPOSITES)[1]
        question, truth = f"Is {said} the opposite of {word}?", f"the opposite of {word} is {true}."
    elif shape == "colour":
        thing, true = rng.choice(list(t.COLOURS.items()))
        said = true if honest else rng.choice(list(t.COLOURS.values()))
        question, truth = f"Is {thing} {said}?", f"{thing} is {true}."
    elif shape == "member":
        group = rng.choice(list(t.CATEGORIES))
        other = group if honest else rng.choice(list(t.CATEGORIES))
        thing = rng.choice([w for w in t.CATEGORIES[other] if w != "orange"])
        true, said = t.MEMBER_OF[other], t.MEMBER_OF[group]
        question, truth = f"Is {thing} {said}?", f"{thing} is {true}."
    else:
        low, high = sorted(rng.sample(range(51), 2))
        true, other = (high, low) if shape == "larger" else (low, high)
        said = true if honest else other
        question = f"Is {said} {shape} than {other if honest else true}?"
        truth = f"{true} is {shape} than {other}."
    return question, "Yes" if said == true else "No", truth


@functools.cache
def all_facts() -> dict[str, list[Fact]]:
    found: dict[str, list[Fact]] = {topic: [] for topic in WEIGHTS}

    def add(topic: str, name: str, sentence: str, word: str, *questions: str) -> None:
        found[topic].append(Fact(name, sentence, word, questions))

    for country, city in t.CAPITALS.items():
        add("places", f"capital of {country}", f"The capital of {country} is {city}.", city,
            f"What is the capital of {country}?", f"Name the capital of {country}.",
            f"Which city is the capital of {country}?", f"{country}: what is its capital?",
            f"Tell me the capital of {country}.", f"capital of {country}")  # fmt: skip
        add("places", f"country of {city}", f"{city} is the capital of {country}.", country,
            f"Which country has the capital {city}?", f"{city} is the capital of which country?",
            f"{city} is the capital of what?", f"Name the country with the capital {city}.",
            f"Where is {city}?", f"In which country is {city}?")  # fmt: skip
    for country, continent in t.CONTINENTS.items():
        add("places", f"continent of {country}", f"{country} is in {continent}.", continent,
            f"Where is {country}?", f"On which continent is {country}?",
            f"What continent is {country} on?", f"Which continent is {country} in?")  # fmt: skip
    for one, other in [pair for a, b in t.OPPOSITES for pair in ((a, b), (b, a))]:
        add("words", f"opposite of {one}", f"The opposite of {one} is {other}.", other,
            f"What is the opposite of {one}?", f"Tell me the opposite of {one}.",
            f"Give me the opposite of {one}.", f"What is the opposite of the word {one}?",
            f"Which word is the opposite of {one}?", f"opposite of {one}")  # fmt: skip
    for one, many in t.PLURALS.items():
        add("words", f"plural of {one}", f"The plural of {one} is {many}.", many,
            f"What is the plural of {one}?", f"Tell me the plural of {one}.",
            f"One {one}, two what?", f"Give me the plural of {one}.")  # fmt: skip
    for thing, colour in t.COLOURS.items():
        add("colours", f"colour of {thing}", f"{words.capital(thing)} is {colour}.", colour,
            f"What colour is {thing}?", f"What color is {thing}?",
            f"Which colour does {thing} have?", f"Tell me the colour of {thing}.",
            f"What is the colour of {thing}?")  # fmt: skip
    for pair, colour in t.MIXTURES.items():
        for one, other in (pair, pair[::-1]):
            both = f"{one} and {other}"
            add("colours", both, f"{words.capital(both)} make {colour}.", colour,
                f"What do {both} make?", f"Mix {both}.", f"Which colour do {both} make?",
                f"What colour do you get from {both}?")  # fmt: skip
    for (small, large), count in t.UNITS.items():
        add("units", f"{small} in {large}", f"There are {count} {small} in {large}.", count,
            f"How many {small} are in {large}?", f"How many {small} does {large} have?",
            f"How many {small} are there in {large}?",
            f"{words.capital(large)} has how many {small}?",
            f"Tell me how many {small} are in {large}.")  # fmt: skip
    for animal, (sound, young, legs) in t.ANIMALS.items():
        an = words.a(animal)
        add("animals", f"sound of {animal}", f"{words.capital(an)} {sound}.", sound,
            f"What sound does {an} make?", f"Which sound does {an} make?",
            f"What does {an} do to make a sound?", f"How does {an} sound?")  # fmt: skip
        add("animals", f"young {animal}", f"A young {animal} is {words.a(young)}.", young,
            f"What is a young {animal} called?", f"What is a young {animal}?",
            f"How do you call a young {animal}?",
            f"Tell me the word for a young {animal}.")  # fmt: skip
        add("animals", f"legs of {animal}", f"{words.capital(an)} has {legs} legs.", str(legs),
            f"How many legs does {an} have?", f"How many legs has {an}?",
            f"Tell me how many legs {an} has.",
            f"{words.capital(an)} has how many legs?")  # fmt: skip
    for row, noun in ((t.DAYS, "day"), (t.MONTHS, "month")):
        for i, now in enumerate(row):
            after, before = row[(i + 1) % len(row)], row[i - 1]
            add("calendar", f"after {now}", f"{after} comes after {now}.", after,
                f"What {noun} comes after {now}?", f"Which {noun} comes after {now}?",
                f"What comes after {now}?", f"Which {noun} follows {now}?",
                f"What is the {noun} after {now}?")  # fmt: skip
            add("calendar", f"before {now}", f"{before} comes before {now}.", before,
                f"What {noun} comes before {now}?", f"Which {noun} comes before {now}?",
                f"What comes before {now}?", f"What is the {noun} before {now}?")  # fmt: skip
    for number, word in enumerate(t.ONES):
        add("numbers", f"word for {number}", f"{number} is {word}.", word,
            f"Write {number} as a word.", f"What is the word for {number}?", f"Spell {number}.",
            f"How do you write {number} in letters?", f"Write {number} in letters.")  # fmt: skip
        add("numbers", f"digits of {word}", f"{words.capital(word)} is {number}.", str(number),
            f"Write {word} as a number.", f"Write {word} in digits.", f"Which number is {word}?",
            f"What is {word} in digits?", f"What number is {word}?")  # fmt: skip
    for number in range(100):
        after = number + 1
        add("numbers", f"after {number}", f"{after} comes after {number}.", str(after),
            f"What number comes after {number}?", f"What comes after {number}?",
            f"Which number comes after {number}?",
            f"What is the next number after {number}?")  # fmt: skip
        add("numbers", f"before {after}", f"{number} comes before {after}.", str(number),
            f"What number comes before {after}?", f"What comes before {after}?",
            f"Which number comes before {after}?")  # fmt: skip
    for a, b in itertools.product(range(11), range(11)):
        add("times", f"{a} times {b}", f"{a} * {b} = {a * b}", str(a * b),
            f"What is {a} * {b}?", f"What is {a} times {b}?", f"{a} * {b}", f"{a} times {b}",
            f"{a}*{b}", f"How much is {a} times {b}?", f"Multiply {a} by {b}.")  # fmt: skip
    return found
