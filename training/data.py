"""Conversations for the tiny model, made from grammars and the tables in `tables.py`.

Each kind is a function that takes a random generator and gives one `Sample`. The sample's `key` names
the combination it shows ("7+5", "France/capital/2"); a stable hash of the key decides whether the
combination is for training or held back, so the model never sees a held-back one in any wording.

    python data.py        prints a few samples of every kind
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import tables as t

Message = dict[str, Any]
TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text(encoding="utf-8")
END_OF_TEXT = "<|endoftext|>"
HELD_BACK_PERCENT = 8


@dataclass(frozen=True)
class Sample:
    """One conversation. The last message is the answer that an evaluation expects."""

    kind: str
    key: str
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def is_held_back(self) -> bool:
        return is_held_back(self.key)


def is_held_back(key: str) -> bool:
    digest = hashlib.blake2b(key.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") % 100 < HELD_BACK_PERCENT


def render(sample: Sample, *, generation_prompt: bool = False) -> str:
    """The text of a conversation, exactly as llama.cpp renders it with our template."""
    messages = sample.messages[:-1] if generation_prompt else sample.messages
    return _template().render(
        messages=messages, tools=sample.tools or None, add_generation_prompt=generation_prompt
    )


def documents(seed: int) -> Iterator[str]:
    """Endless training texts: single turns, longer conversations, and plain prose."""
    rng = random.Random(seed)
    while True:
        shape = rng.random()
        if shape < 0.60:
            sample = _with_neutral_system(rng, training_sample(rng))
            if rng.random() < 0.1 and sample.messages[0]["role"] != "system":
                sample = replace(sample, messages=(*sample.messages, *_plain_turn(rng)))
            yield render(sample)
        elif shape < 0.72:
            yield render(_conversation(rng, turns=rng.choice([2, 2, 3, 3, 4, 5, 6])))
        elif shape < 0.725:
            yield render(_conversation(rng, turns=rng.randint(10, 28)))
        else:
            yield _plain(rng) + END_OF_TEXT


def training_sample(rng: random.Random) -> Sample:
    return _trained(rng, _any_kind)


def _trained(rng: random.Random, maker: Callable[[random.Random], Sample]) -> Sample:
    while (sample := maker(rng)).is_held_back:
        pass
    return sample


def held_back(kind: str, count: int, seed: int) -> list[Sample]:
    """Different held-back samples of one kind; fewer than `count` if the kind has no more."""
    rng, found = random.Random(f"{kind}/{seed}"), {}
    for _ in range(count * 400):
        sample = KINDS[kind][1](rng)
        if sample.is_held_back:
            found.setdefault(sample.key, sample)
        if len(found) == count:
            break
    return list(found.values())


# ---------------------------------------------------------------- small talk, about itself, unknown


def small_talk(rng: random.Random) -> Sample:
    if rng.random() < 0.4:
        (said, answer), name = rng.choice(t.INTRODUCTIONS), _name(rng)
        return _turn(
            "small talk", f"{said}/{name}", said.format(name=name), answer.format(name=name)
        )
    phrases, answer = rng.choice(t.SMALL_TALK)
    phrase, ending = rng.choice(phrases), rng.choice(["", "", "", " :)", " Computer.", " friend"])
    return _turn("small talk", phrase + ending, phrase + ending, answer)


def about(rng: random.Random) -> Sample:
    phrases, answer = rng.choice(t.ABOUT)
    return _asked("about itself and the package", rng, rng.choice(phrases), answer)


def reasons(rng: random.Random) -> Sample:
    question = rng.choice(list(t.REASONS))
    return _asked("simple knowledge", rng, question, t.REASONS[question])


def unknown(rng: random.Random) -> Sample:
    kind = "says that it does not know"
    if rng.random() < 0.15:
        a, b = rng.randint(100, 9999), rng.randint(3, 9999)
        question = rng.choice([f"What is {a} + {b}?", f"What is {a} * {b}?", f"{a} plus {b}"])
        return _turn(kind, question, question, t.TOO_LARGE)
    if rng.random() < 0.1:
        noise = " ".join(_invented(rng) for _ in range(rng.randint(1, 4)))
        question = rng.choice(
            [noise, noise, f"{noise}?", "?" * rng.randint(1, 4), "." * rng.randint(1, 4)]
        )
        return _turn(kind, question, question, t.DO_NOT_UNDERSTAND)
    pattern, things = rng.choice(t.UNKNOWN)
    thing = rng.choice(things) if things else _invented(rng).capitalize()
    question = pattern.format(x=thing.lower() if pattern == "What is a {x}?" else thing)
    return _asked(kind, rng, question, t.DO_NOT_KNOW)


# ---------------------------------------------------------------- facts


@dataclass(frozen=True)
class Fact:
    name: str
    questions: tuple[str, ...]
    sentence: str
    word: str


@functools.cache
def _facts() -> dict[str, list[Fact]]:
    """All facts by topic, each with several ways to ask for it."""
    found: dict[str, list[Fact]] = {
        topic: []
        for topic in (
            "places",
            "words",
            "colours",
            "units",
            "animals",
            "calendar",
            "numbers",
            "times",
        )
    }

    def add(topic: str, name: str, sentence: str, word: str, *questions: str) -> None:
        found[topic].append(Fact(name, questions, sentence, word))

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
        add("colours", f"colour of {thing}", f"{_capital(thing)} is {colour}.", colour,
            f"What colour is {thing}?", f"What color is {thing}?",
            f"Which colour does {thing} have?", f"Tell me the colour of {thing}.",
            f"What is the colour of {thing}?")  # fmt: skip
    for (a, b), colour in t.MIXTURES.items():
        for first, second in ((a, b), (b, a)):
            add("colours", f"{first} and {second}", f"{_capital(first)} and {second} make {colour}.",
                colour, f"What do {first} and {second} make?", f"Mix {first} and {second}.",
                f"Which colour do {first} and {second} make?",
                f"What colour do you get from {first} and {second}?")  # fmt: skip
    for (small, large), count in t.UNITS.items():
        add("units", f"{small} in {large}", f"There are {count} {small} in {large}.", count,
            f"How many {small} are in {large}?", f"How many {small} does {large} have?",
            f"How many {small} are there in {large}?", f"{_capital(large)} has how many {small}?",
            f"Tell me how many {small} are in {large}.")  # fmt: skip
    for animal, (sound, young, legs) in t.ANIMALS.items():
        an = _article(animal)
        add("animals", f"sound of {animal}", f"{_capital(an)} {animal} {sound}.", sound,
            f"What sound does {an} {animal} make?", f"Which sound does {an} {animal} make?",
            f"What does {an} {animal} do to make a sound?", f"How does {an} {animal} sound?")  # fmt: skip
        add("animals", f"young {animal}", f"A young {animal} is a {young}.".replace("a owl", "an owl"),
            young, f"What is a young {animal} called?", f"What is a young {animal}?",
            f"How do you call a young {animal}?", f"Tell me the word for a young {animal}.")  # fmt: skip
        add("animals", f"legs of {animal}", f"{_capital(an)} {animal} has {legs} legs.", str(legs),
            f"How many legs does {an} {animal} have?", f"How many legs has {an} {animal}?",
            f"Tell me how many legs {an} {animal} has.", f"{_capital(an)} {animal} has how many legs?")  # fmt: skip
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
        add("numbers", f"digits of {word}", f"{_capital(word)} is {number}.", str(number),
            f"Write {word} as a number.", f"Write {word} in digits.", f"Which number is {word}?",
            f"What is {word} in digits?", f"What number is {word}?")  # fmt: skip
    for a, b in itertools.product(range(11), range(11)):
        add("times", f"{a} times {b}", f"{a} * {b} = {a * b}", str(a * b), f"What is {a} * {b}?",
            f"What is {a} times {b}?", f"{a} * {b}", f"{a} times {b}", f"{a}*{b}",
            f"How much is {a} times {b}?", f"Multiply {a} by {b}.")  # fmt: skip
    for number in range(100):
        add("numbers", f"after {number}", f"{number + 1} comes after {number}.", str(number + 1),
            f"What number comes after {number}?", f"What comes after {number}?",
            f"Which number comes after {number}?", f"What is the next number after {number}?")  # fmt: skip
        add("numbers", f"before {number + 1}", f"{number} comes before {number + 1}.", str(number),
            f"What number comes before {number + 1}?", f"What comes before {number + 1}?",
            f"Which number comes before {number + 1}?")  # fmt: skip
    return found


def _fact(rng: random.Random) -> Fact:
    facts = _facts()
    weights = {"places": 4, "words": 3, "colours": 2, "units": 2, "animals": 3, "calendar": 2,
               "numbers": 3, "times": 3}  # fmt: skip
    return rng.choice(facts[rng.choices(list(weights), list(weights.values()))[0]])


def facts(rng: random.Random) -> Sample:
    fact = _fact(rng)
    form = rng.randrange(len(fact.questions))
    prefix, question = _wrapped(rng, fact.questions[form])
    return _turn("facts", f"{fact.name}/{form}/{prefix}", question, fact.sentence)


def yes_or_no(rng: random.Random) -> Sample:
    key, question, word, sentence = _claim(rng)
    return _turn("yes or no", key, question, f"{word}, {sentence}")


def _claim(rng: random.Random) -> tuple[str, str, str, str]:
    """A question with its yes or no, and the sentence that says what is true."""
    shape = rng.choice(["capital", "opposite", "colour", "larger", "smaller", "member"])
    if shape == "capital":
        country = rng.choice(list(t.CAPITALS))
        true = t.CAPITALS[country]
        said = true if rng.random() < 0.5 else rng.choice(list(t.CAPITALS.values()))
        question, sentence = (
            f"Is {said} the capital of {country}?",
            f"the capital of {country} is {true}.",
        )
    elif shape == "opposite":
        word, true = rng.choice(t.OPPOSITES)
        said = true if rng.random() < 0.5 else rng.choice(t.OPPOSITES)[1]
        question, sentence = (
            f"Is {said} the opposite of {word}?",
            f"the opposite of {word} is {true}.",
        )
    elif shape == "colour":
        thing, true = rng.choice(list(t.COLOURS.items()))
        said = true if rng.random() < 0.5 else rng.choice(list(t.COLOURS.values()))
        question, sentence = f"Is {thing} {said}?", f"{thing} is {true}."
    elif shape == "member":
        group = rng.choice(list(t.CATEGORIES))
        other = group if rng.random() < 0.5 else rng.choice(list(t.CATEGORIES))
        thing = rng.choice(t.CATEGORIES[other])
        true, said = t.MEMBER_OF[other], t.MEMBER_OF[group]
        if other == "colours" and group == "fruits" and thing == "orange":
            return _claim(rng)
        question, sentence = f"Is {thing} {said}?", f"{thing} is {true}."
    else:
        a, b = rng.sample(range(51), 2)
        low, high = min(a, b), max(a, b)
        question, said, true = (
            f"Is {a} {shape} than {b}?",
            str(a),
            str(high if shape == "larger" else low),
        )
        sentence = (
            f"{high} is larger than {low}."
            if shape == "larger"
            else f"{low} is smaller than {high}."
        )
    return question, question, "Yes" if said == true else "No", sentence


# ---------------------------------------------------------------- copying and lists


def copy(rng: random.Random) -> Sample:
    text = _copyable(rng)
    form = rng.choice([
        "Repeat: {}", "Repeat after me: {}", 'Say "{}"', "Copy this text: {}", "Copy: {}", "Say: {}",
        'Repeat "{}"', "Write this again: {}", "Please repeat: {}", 'Write "{}"', "Echo: {}",
    ])  # fmt: skip
    return _turn("copying", text, form.format(text), text)


def repeat(rng: random.Random) -> Sample:
    word, count = _word(rng), rng.randint(2, 6)
    times = t.ONES[count] if rng.random() < 0.6 else str(count)
    form = rng.choice(["Say {} {} times.", "Write {} {} times.", "Repeat {} {} times.",
                       "Write the word {} {} times.", "Say the word {} {} times."])  # fmt: skip
    return _turn("repeating", f"{word}/{count}", form.format(word, times), " ".join([word] * count))


def count(rng: random.Random) -> Sample:
    start = rng.randint(0, 80)
    end = start + rng.randint(2, 20)
    shape = rng.random()
    if shape < 0.3:
        start, end = 1, rng.randint(3, 100 if shape < 0.05 else 40)
        question = rng.choice([f"Count to {end}.", f"Count from 1 to {end}."])
    elif shape < 0.8:
        question = rng.choice(
            [f"Count from {start} to {end}.", f"List the numbers from {start} to {end}."]
        )
    else:
        start, end = end, start
        question = f"Count down from {start} to {end}."
    step = 1 if end >= start else -1
    numbers = ", ".join(str(n) for n in range(start, end + step, step))
    return _turn("counting", f"{start}-{end}", question, numbers)


def lists(rng: random.Random) -> Sample:
    shape = rng.choice(
        ["name", "pick", "bullets", "first", "last", "sort", "reverse", "length", "comma"]
    )
    if shape == "name":
        group, number = rng.choice(list(t.CATEGORIES)), rng.randint(2, 6)
        form = rng.choice(
            ["Name {} {}.", "List {} {}.", "Give me {} {}.", "Tell me {} {}.", "Write {} {}."]
        )
        said = rng.choice([t.ONES[number], str(number)])
        answer = _capital(_and(t.CATEGORIES[group][:number])) + "."
        return _asked(
            "lists", rng, form.format(said, group), answer, key=f"{group}/{number}/{form}/{said}"
        )
    if shape == "pick":
        group, *others = rng.sample(list(t.CATEGORIES), rng.randint(3, 4))
        right = rng.choice(t.CATEGORIES[group])
        words = [right] + [rng.choice(t.CATEGORIES[o]) for o in others]
        if "orange" in words:
            return lists(rng)
        rng.shuffle(words)
        form = rng.choice(["Which of these is {}: {}?", "Find {}: {}"])
        question = form.format(t.MEMBER_OF[group], ", ".join(words))
        return _turn("lists", question, question, f"{_capital(right)} is {t.MEMBER_OF[group]}.")
    if shape == "sort":
        numbers = rng.sample(range(31), rng.randint(3, 5))
        form = rng.choice(["Sort these numbers: {}", "Sort: {}", "Put these numbers in order: {}"])
        question = form.format(", ".join(map(str, numbers)))
        return _turn("lists", str(numbers), question, ", ".join(map(str, sorted(numbers))))
    words = [_word(rng) for _ in range(rng.randint(3, 6))]
    if len(set(words)) < len(words):
        return lists(rng)
    if shape == "bullets":
        form = rng.choice(["Make a list of {}.", "Write a list with {}.", "Make a list: {}"])
        question, answer = form.format(_and(words)), "\n".join(f"- {word}" for word in words)
    elif shape in ("first", "last"):
        form = rng.choice(
            ["What is the {} word of: {}", "Give me the {} word: {}", "Which word is {}: {}"]
        )
        question = form.format(shape, " ".join(words))
        answer = f"The {shape} word is {words[0 if shape == 'first' else -1]}."
    elif shape == "reverse":
        words = words[:4]
        form = rng.choice(["Reverse this list: {}", "Say these words backwards: {}", "Reverse: {}"])
        question, answer = form.format(", ".join(words)), ", ".join(reversed(words))
    elif shape == "length":
        form = rng.choice(
            ["How many words are here: {}", "Count the words: {}", "How many words: {}"]
        )
        question, answer = form.format(" ".join(words)), f"There are {len(words)} words."
    else:
        form = rng.choice(["Write with commas: {}", "Put commas between these words: {}"])
        question, answer = form.format(" ".join(words)), ", ".join(words)
    return _turn("lists", f"{shape}/{words}", question, answer)


# ---------------------------------------------------------------- numbers


def sums(rng: random.Random) -> Sample:
    key, text, result = _sum(rng)
    a, sign, b = text.split()
    word = {"+": "plus", "-": "minus"}[sign]
    forms = [f"What is {text}?", f"{text}", f"{text} =", f"{text} = ?", f"How much is {a} {word} {b}?",
             f"What is {a} {word} {b}?", f"{a} {word} {b}", f"Calculate {text}.", f"{a}{sign}{b}",
             f"What is {a}{sign}{b}?", f"{a}{sign}{b}="]  # fmt: skip
    if sign == "+":
        forms += [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?"]
    else:
        forms += [f"Take {b} from {a}.", f"Subtract {b} from {a}."]
    _, question = _wrapped(rng, rng.choice(forms))
    return _turn("small sums", key, question, f"{text} = {result}")


def word_problem(rng: random.Random) -> Sample:
    key, text, result = _sum(rng, limit=20)
    a, sign, b = text.split()
    name, things = _name(rng), rng.choice(list(t.GOODS.values()))
    if sign == "+":
        story = rng.choice([f"{name} has {a} {things} and gets {b} more.",
                            f"{name} has {a} {things} and buys {b} more.",
                            f"{name} has {a} {things} and finds {b} more."])  # fmt: skip
    else:
        story = rng.choice([f"{name} has {a} {things} and loses {b}.",
                            f"{name} has {a} {things} and gives away {b}.",
                            f"{name} has {a} {things} and sells {b}."])  # fmt: skip
    question = rng.choice(
        [f"How many {things} does {name} have now?", f"How many {things} are left?"]
    )
    if sign == "+":
        question = f"How many {things} does {name} have now?"
    answer = f"{text} = {result}, so {name} has {result} {things}."
    return _turn("word problems", key, f"{story} {question}", answer)


def _sum(rng: random.Random, limit: int = 50) -> tuple[str, str, int]:
    """A sum that is for training or held back as a pair: 5 + 7 and 7 + 5 share a key."""
    if limit > 20 and rng.random() < 0.6:
        limit = 20
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    if rng.random() < 0.6:
        return f"{min(a, b)}+{max(a, b)}", f"{a} + {b}", a + b
    a, b = max(a, b), min(a, b)
    return f"{a}-{b}", f"{a} - {b}", a - b


def compare(rng: random.Random) -> Sample:
    a, b = rng.sample(range(100), 2)
    word = rng.choice(["larger", "smaller"])
    form = rng.choice(
        [
            "Which is {0}, {1} or {2}?",
            "Which number is {0}: {1} or {2}?",
            "What is {0}, {1} or {2}?",
        ]
    )
    right, wrong = (max(a, b), min(a, b)) if word == "larger" else (min(a, b), max(a, b))
    answer = f"{right} is {word} than {wrong}."
    return _turn("comparing numbers", f"{min(a, b)},{max(a, b)}", form.format(word, a, b), answer)


# ---------------------------------------------------------------- JSON


def fill_json(rng: random.Random) -> Sample:
    sentence, fields = _described(rng)
    keys = list(fields)
    if rng.random() < 0.5:
        keys = rng.sample(keys, rng.randint(1, len(keys)))
    wanted = {key: fields[key] for key in keys}
    shape = rng.random()
    if shape < 0.4:
        form = rng.choice(["Write a JSON object with {}: {}", "Give {} as JSON: {}", "Make a JSON object with {}: {}",
                           "JSON with {}: {}", "Extract {} as JSON: {}"])  # fmt: skip
        question = form.format(_and(keys), sentence)
    elif shape < 0.7:
        empty = {key: 0 if isinstance(value, int) else "" for key, value in wanted.items()}
        form = rng.choice(
            ["Fill in {}: {}", "Fill this JSON object {}: {}", "Fill {} from this: {}"]
        )
        question = form.format(json.dumps(empty), sentence)
    else:
        form = rng.choice(["{1} Give me {0} as JSON.", "{1} Write {0} as a JSON object.",
                           "{1} Make a JSON object with {0}."])  # fmt: skip
        question = form.format(_and(keys), sentence)
    return _turn("filling JSON", f"{sorted(wanted.items())}", question, json.dumps(wanted))


def _described(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    """A sentence, and the fields it tells."""
    name, city, number = _name(rng), _city(rng), rng.randint(2, 99)
    shape = rng.randrange(7)
    if shape == 0:
        return f"{name} is {number} years old and lives in {city}.", {
            "name": name,
            "age": number,
            "city": city,
        }
    if shape == 1:
        job = rng.choice(t.JOBS)
        return (
            f"{name} is {_article(job)} {job} from {city}.",
            {"name": name, "job": job, "city": city},
        )
    if shape == 2:
        item, colour = rng.choice(list(t.GOODS)), rng.choice(t.CATEGORIES["colours"])
        sentence = f"The {item} is {colour} and costs {number} euros."
        return sentence, {"item": item, "colour": colour, "price": number}
    if shape == 3:
        food, day = rng.choice(t.FOODS), rng.choice(t.DAYS)
        return f"{name} eats {food} on {day}.", {"name": name, "food": food, "day": day}
    if shape == 4:
        animal, pet = rng.choice(list(t.ANIMALS)), _name(rng)
        sentence = f"{name} has {_article(animal)} {animal} named {pet}."
        return sentence, {"owner": name, "animal": animal, "pet": pet}
    if shape == 5:
        item = rng.choice(list(t.GOODS))
        sentence = f"{name} buys {number} {t.GOODS[item]} in {city}."
        return sentence, {"name": name, "count": number, "item": t.GOODS[item], "city": city}
    hobby = rng.choice(t.HOBBIES)
    return (
        f"{name} is {number} years old and likes {hobby}.",
        {"name": name, "age": number, "hobby": hobby},
    )


# ---------------------------------------------------------------- tools


@dataclass(frozen=True)
class Use:
    """One use of a tool: what is asked, the arguments, what the tool says, and what we tell."""

    tool: dict[str, Any]
    question: str
    arguments: dict[str, str | int]
    result: str
    answer: str


def tool_call(rng: random.Random) -> Sample:
    use, tools = _use_among_others(rng)
    messages = (_user(use.question), _call(use))
    return Sample("calling a tool", _use_key(use), messages, tools)


def tool_answer(rng: random.Random) -> Sample:
    use, tools = _use_among_others(rng)
    messages = (
        _user(use.question),
        _call(use),
        {"role": "tool", "content": use.result},
        _said(use.answer),
    )
    return Sample("reading a tool's answer", f"{_use_key(use)}/{use.result}", messages, tools)


def no_tool(rng: random.Random) -> Sample:
    """Tools are there, but the question needs none of them, or one that is missing."""
    use, tools = _use_among_others(rng)
    if rng.random() < 0.4:
        others = tuple(tool for tool in tools if tool != use.tool)
        if others:
            key = f"{use.question}/{len(others)}"
            messages = (_user(use.question), _said("I have no tool for that."))
            return Sample("leaving tools alone", key, messages, others)
    sample = rng.choice([small_talk, about, facts, copy, reasons])(rng)
    return replace(sample, kind="leaving tools alone", tools=tools)


def _use_among_others(rng: random.Random) -> tuple[Use, tuple[dict[str, Any], ...]]:
    makers = rng.sample(_TOOL_MAKERS, rng.choice([1, 1, 2, 2, 3]))
    uses = [maker(rng) for maker in makers]
    tools = [use.tool for use in uses]
    rng.shuffle(tools)
    return uses[0], tuple(tools)


def _weather(rng: random.Random) -> Use:
    city, degrees = _city(rng), rng.randint(-9, 39)
    sky = rng.choice(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear"])
    place = rng.choice(["city", "city", "location", "place"])
    tool = _tool(rng, rng.choice(["get_weather", "get_weather", "weather", "current_weather"]),
                 rng.choice(["Get the weather in a city", "Tells the weather", "Get the current weather",
                             "Get the current weather in a given place", "Weather of a city"]),
                 {place: "string"})  # fmt: skip
    question = rng.choice([f"What is the weather in {city}?", f"How is the weather in {city}?",
                           f"What is the weather like in {city}?", f"Tell me the weather in {city}.",
                           f"How warm is it in {city}?"])  # fmt: skip
    result = rng.choice([json.dumps({"temperature": degrees, "sky": sky}), f"{sky}, {degrees} degrees",
                         json.dumps({place: city, "weather": sky, "temperature": degrees}),
                         f"{degrees} degrees and {sky}"])  # fmt: skip
    return Use(
        tool, question, {place: city}, result, f"It is {degrees} degrees and {sky} in {city}."
    )


def _time(rng: random.Random) -> Use:
    city, clock = _city(rng), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    place = rng.choice(["city", "city", "location", "place"])
    tool = _tool(rng, rng.choice(["get_time", "time_in", "current_time"]),
                 rng.choice(["Get the time in a city", "Tells the time"]), {place: "string"})  # fmt: skip
    question = rng.choice([f"What time is it in {city}?", f"Tell me the time in {city}.",
                           f"How late is it in {city}?"])  # fmt: skip
    result = rng.choice([clock, json.dumps({"time": clock})])
    return Use(tool, question, {place: city}, result, f"It is {clock} in {city}.")


def _calculator(rng: random.Random) -> Use:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    word, done, total = rng.choice([("add", "plus", a + b), ("multiply", "times", a * b),
                                    ("subtract", "minus", a - b)])  # fmt: skip
    sign = {"add": "+", "multiply": "*", "subtract": "-"}[word]
    first, second = rng.choice([("a", "b"), ("a", "b"), ("x", "y"), ("first", "second")])
    kind, noun = rng.choice(["integer", "number"]), rng.choice(["numbers", "integers"])
    tool = _tool(rng, rng.choice([word, f"{word}_numbers"]), f"{_capital(word)} two {noun}",
                 {first: kind, second: kind})  # fmt: skip
    forms = [f"What is {a} {done} {b}?", f"What is {a} {sign} {b}?", f"How much is {a} {done} {b}?"]
    if word != "subtract":
        forms += [f"{_capital(word)} {a} and {b}.", f"Please {word} {a} and {b}."]
    result = rng.choice([str(total), json.dumps({"result": total})])
    return Use(tool, rng.choice(forms), {first: a, second: b}, result, f"The result is {total}.")


def _mail(rng: random.Random) -> Use:
    name, text = _name(rng), _copyable(rng)
    to = rng.choice(["to", "name", "person"])
    tool = _tool(rng, rng.choice(["send_message", "send_mail", "write_message"]),
                 rng.choice(["Send a message to a person", "Send a text"]), {to: "string", "text": "string"})  # fmt: skip
    question = rng.choice([f'Send "{text}" to {name}.', f"Send {name} this message: {text}",
                           f"Write to {name}: {text}", f"Tell {name}: {text}"])  # fmt: skip
    result = rng.choice(["sent", "ok", json.dumps({"status": "sent"}), json.dumps({"ok": True})])
    return Use(tool, question, {to: name, "text": text}, result, f"I sent the message to {name}.")


def _timer(rng: random.Random) -> Use:
    number, unit = rng.randint(1, 90), rng.choice(["minutes", "seconds", "hours"])
    tool = _tool(rng, rng.choice(["set_timer", "start_timer", "timer"]),
                 rng.choice(["Set a timer", "Start a timer"]), {unit: "integer"})  # fmt: skip
    question = rng.choice([f"Set a timer for {number} {unit}.", f"Start a timer: {number} {unit}.",
                           f"Wake me in {number} {unit}.", f"Timer for {number} {unit}, please."])  # fmt: skip
    result = rng.choice(
        ["ok", "started", json.dumps({"ok": True}), json.dumps({"status": "started"})]
    )
    return Use(tool, question, {unit: number}, result, f"The timer is set to {number} {unit}.")


def _light(rng: random.Random) -> Use:
    room = rng.choice(["kitchen", "garden", "bedroom", "office", "hall", "cellar", "bathroom"])
    state = rng.choice(["on", "off"])
    tool = _tool(rng, rng.choice(["set_light", "switch_light", "light"]),
                 rng.choice(["Switch the light in a room", "Turn a light on or off"]),
                 {"room": "string", "state": "string"})  # fmt: skip
    question = rng.choice([f"Turn {state} the light in the {room}.", f"Switch the light in the {room} {state}.",
                           f"Light {state} in the {room}, please."])  # fmt: skip
    result = rng.choice(["ok", "done", json.dumps({"ok": True}), json.dumps({"status": "done"})])
    return Use(
        tool,
        question,
        {"room": room, "state": state},
        result,
        f"The light in the {room} is {state}.",
    )


def _price(rng: random.Random) -> Use:
    item, price = rng.choice(t.NOUNS), rng.randint(1, 999)
    key = rng.choice(["item", "product", "name"])
    tool = _tool(rng, rng.choice(["get_price", "find_price", "price_of"]),
                 rng.choice(["Get the price of an item", "Tells what something costs"]), {key: "string"})  # fmt: skip
    question = rng.choice([f"How much is the {item}?", f"What does the {item} cost?",
                           f"What is the price of the {item}?", f"Tell me the price of the {item}."])  # fmt: skip
    result = rng.choice([str(price), json.dumps({"price": price}), f"{price} euros"])
    return Use(tool, question, {key: item}, result, f"The {item} costs {price} euros.")


def _search(rng: random.Random) -> Use:
    topic = (
        f"the {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}"
        if rng.random() < 0.7
        else _name(rng)
    )
    key = rng.choice(["query", "query", "text", "topic"])
    tool = _tool(rng, rng.choice(["search", "web_search", "lookup", "find"]),
                 rng.choice(["Search the web", "Search for a text", "Find facts about a topic"]), {key: "string"})  # fmt: skip
    question = rng.choice([f"Search for {topic}.", f"Find something about {topic}.", f"Look up {topic}.",
                           f"Search the web for {topic}."])  # fmt: skip
    found = _sentence(rng)
    result = rng.choice([found, json.dumps({"result": found}), json.dumps({"text": found})])
    return Use(tool, question, {key: topic}, result, found)


def _action(rng: random.Random) -> Use:
    """A tool that was never seen: its name is what it does."""
    verb = rng.choice(["open", "close", "paint", "clean", "start", "stop", "buy", "sell", "find", "move", "count",
                       "lock", "check", "show", "wash", "break"])  # fmt: skip
    noun = rng.choice(t.NOUNS) if rng.random() < 0.8 else _invented(rng)
    task = f"{verb} the {noun}"
    parameter = rng.choice([None, None, "colour", "number", "name"])
    value = {
        "colour": rng.choice(t.CATEGORIES["colours"]),
        "number": rng.randint(1, 99),
        "name": _name(rng),
    }
    form = {None: "", "colour": " in {}", "number": " {} times", "name": " for {}"}[parameter]
    tool = _tool(rng, f"{verb}_{noun}", _capital(task),
                 {} if parameter is None else {parameter: "integer" if parameter == "number" else "string"})  # fmt: skip
    question = rng.choice(["{}.", "Please {}.", "{}, please.", "Can you {}?", "I want you to {}."])
    said = question.format(task + form.format(value.get(parameter)))
    result = rng.choice(["ok", "done", json.dumps({"ok": True}), json.dumps({"status": "done"})])
    return Use(
        tool,
        _capital(said),
        {} if parameter is None else {parameter: value[parameter]},
        result,
        "It is done.",
    )


_TOOL_MAKERS: list[Callable[[random.Random], Use]] = [
    _weather, _weather, _time, _calculator, _mail, _timer, _light, _price, _search, _action,
    _action,
]  # fmt: skip


def _tool(
    rng: random.Random, name: str, description: str, parameters: dict[str, str]
) -> dict[str, Any]:
    """The schema as people write it, or as a library makes it from a signature."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    dice = rng.random()
    if dice < 0.2:
        properties = {
            key: value | {"description": f"The {key}"} for key, value in properties.items()
        }
    elif dice < 0.35:
        properties = {key: {"title": _capital(key)} | value for key, value in properties.items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        schema["required"] = list(parameters)
    if rng.random() < 0.15:
        schema["additionalProperties"] = False
    if rng.random() < 0.2:
        schema = dict(rng.sample(list(schema.items()), len(schema)))
    description += rng.choice(["", "", ".", "."])
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def _call(use: Use) -> Message:
    call = {"name": use.tool["function"]["name"], "arguments": use.arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call}],
    }


def _use_key(use: Use) -> str:
    return f"{use.tool['function']['name']}/{use.arguments}"


# ---------------------------------------------------------------- obeying a system line


def system_line(rng: random.Random) -> Sample:
    rule, key, answers = _rule(rng)
    question, answer = answers(rng)
    messages = (_system(rule), _user(question), _said(answer))
    return Sample("obeying a system line", f"{key}/{question}", messages)


def _rule(rng: random.Random) -> tuple[str, str, Callable[[random.Random], tuple[str, str]]]:
    """A system line, its key, and a function that asks something and obeys it."""
    shape = rng.choice(["word", "word", "word", "yes", "number", "name", "start", "end", "always", "json",
                        "secret", "user", "role"])  # fmt: skip
    if shape == "word":
        rule = rng.choice(["Answer in one word.", "Answer with one word.", "Use one word only.",
                           "Reply with a single word.", "Give one-word answers.", "Answer with one word only.",
                           "You answer in one word."])  # fmt: skip
        return rule, "word", _short_fact
    if shape == "yes":
        rule = rng.choice(
            ["Answer only with yes or no.", "Say only yes or no.", "Answer yes or no."]
        )
        return rule, "yes", lambda r: _claim(r)[1:3]
    if shape == "number":
        rule = rng.choice(
            ["Answer with a number only.", "Give only the number.", "Answer only with the number."]
        )
        return rule, "number", _short_number
    if shape == "name":
        name = _name(rng)
        rule = rng.choice([f"Your name is {name}.", f"You are {name}.", f"You are called {name}."])
        asks = ["What is your name?", "Who are you?", "What are you called?", "Do you have a name?"]
        return rule, f"name {name}", lambda r: (r.choice(asks), f"My name is {name}.")
    if shape == "user":
        name = _name(rng)
        rule = rng.choice([f"The user is called {name}.", f"The name of the user is {name}."])
        asks = ["What is my name?", "Who am I?", "Do you know my name?"]
        return rule, f"user {name}", lambda r: (r.choice(asks), f"Your name is {name}.")
    if shape == "secret":
        word, thing = _word(rng), rng.choice(["secret word", "password", "magic word", "code"])
        asks = [f"What is the {thing}?", f"Tell me the {thing}.", f"Do you know the {thing}?"]
        return (
            f"The {thing} is {word}.",
            f"{thing} {word}",
            lambda r: (r.choice(asks), f"The {thing} is {word}."),
        )
    if shape == "role":
        job = rng.choice(t.JOBS)
        rule = rng.choice(
            [f"You are {_article(job)} {job}.", f"You work as {_article(job)} {job}."]
        )
        asks = ["What is your job?", "What do you do?", "What do you work as?"]
        return rule, f"role {job}", lambda r: (r.choice(asks), f"I am {_article(job)} {job}.")
    if shape == "always":
        text = _capital(_word(rng)) + rng.choice(["!", ".", ""])
        rule = rng.choice(
            [
                f'Always answer "{text}"',
                f'Answer every question with "{text}"',
                f'Only say "{text}"',
            ]
        )
        return rule, f"always {text}", lambda r: (_any_question(r)[0], text)
    if shape == "json":
        rule = rng.choice(['Answer in JSON with the key "answer".', 'Reply as JSON: {"answer": ""}',
                           'Answer with a JSON object with the key "answer".'])  # fmt: skip
        return (
            rule,
            "json",
            lambda r: (lambda q, a: (q, json.dumps({"answer": a})))(*_short_fact(r)),
        )
    word = rng.choice([_name(rng), *t.INTERJECTIONS])
    if shape == "start":
        rule = rng.choice(
            [f'Start every answer with "{word}:"', f'Begin each answer with "{word}:"']
        )
        return (
            rule,
            f"start {word}",
            lambda r: (lambda q, a: (q, f"{word}: {a}"))(*_any_question(r)),
        )
    rule = rng.choice([f'End every answer with "{word}!"', f'Finish each answer with "{word}!"'])
    return rule, f"end {word}", lambda r: (lambda q, a: (q, f"{a} {word}!"))(*_any_question(r))


def _short_fact(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.1:
        return _short_number(rng)
    fact = _fact(rng)
    return rng.choice(fact.questions), fact.word


def _short_number(rng: random.Random) -> tuple[str, str]:
    if rng.random() < 0.5:
        fact = rng.choice(_facts()["units"] + [f for f in _facts()["animals"] if f.word.isdigit()])
        return rng.choice(fact.questions), fact.word
    sample = _trained(rng, sums)
    text = str(sample.messages[-1]["content"])
    return str(sample.messages[0]["content"]), text.split(" = ")[1]


def _any_question(rng: random.Random) -> tuple[str, str]:
    sample = _trained(rng, rng.choice([facts, facts, sums, reasons]))
    return str(sample.messages[0]["content"]), str(sample.messages[1]["content"])


# ---------------------------------------------------------------- remembering, and stories


def memory(rng: random.Random) -> Sample:
    """Something is told, other things are said, and then it is asked for."""
    told = [
        _told(rng, topic)
        for topic in rng.sample(["name", "colour", "age", "city", "pet"], rng.randint(1, 3))
    ]
    turns: list[Message] = []
    for said, reply, _, _ in told:
        turns += [_user(said), _said(reply)]
    for _ in range(rng.choice([0, 0, 1, 1, 2])):
        turns += _plain_turn(rng)
    _, _, question, answer = rng.choice(told)
    turns += [_user(question), _said(answer)]
    return Sample("remembering", f"{[said for said, *_ in told]}/{question}", tuple(turns))


def _told(rng: random.Random, topic: str) -> tuple[str, str, str, str]:
    """What the user says, the reply, the later question, and its answer."""
    if topic == "name":
        name = _name(rng)
        said = rng.choice(
            [f"My name is {name}.", f"I am called {name}.", f"Hello, my name is {name}."]
        )
        ask = rng.choice(
            ["What is my name?", "Who am I?", "Do you know my name?", "How am I called?"]
        )
        return said, f"Nice to meet you, {name}!", ask, f"Your name is {name}."
    if topic == "colour":
        colour = rng.choice(t.CATEGORIES["colours"])
        ask = rng.choice(["What is my favourite colour?", "Which colour do I like?"])
        return (
            f"My favourite colour is {colour}.",
            f"{_capital(colour)} is a nice colour!",
            ask,
            (f"Your favourite colour is {colour}."),
        )
    if topic == "age":
        age = rng.randint(5, 99)
        ask = rng.choice(["How old am I?", "What is my age?"])
        return (
            f"I am {age} years old.",
            "Thank you for telling me!",
            ask,
            f"You are {age} years old.",
        )
    if topic == "city":
        city = _city(rng)
        ask = rng.choice(["Where do I live?", "In which city do I live?"])
        return f"I live in {city}.", f"{city} is a nice place!", ask, f"You live in {city}."
    animal, pet = rng.choice(list(t.ANIMALS)), _name(rng)
    ask = rng.choice([f"What is the name of my {animal}?", f"How is my {animal} called?"])
    said = f"I have {_article(animal)} {animal} named {pet}."
    return said, f"{pet} is a nice name!", ask, f"Your {animal} is called {pet}."


def story(rng: random.Random) -> Sample:
    hero, name = rng.choice(t.HEROES), _name(rng)
    if rng.random() < 0.5:
        form = rng.choice(
            ["Tell me a story about {} {} named {}.", "Write a story about {} {} named {}."]
        )
        question = form.format(_article(hero), hero, name)
    else:
        form = rng.choice(
            [
                "Tell me a story about {} {}.",
                "Write a short story about {} {}.",
                "A story about {} {}, please.",
            ]
        )
        question, name = form.format(_article(hero), hero), t.HERO_NAMES[hero]
    return _turn("telling a story", f"{hero}/{name}/{form}", question, _story(rng, hero, name))


def _story(rng: random.Random, hero: str, name: str) -> str:
    other = rng.choice([h for h in t.HEROES if h != hero])
    wish = rng.choice(list(t.WISHES))
    adjective, kind = (
        rng.choice(["little", "brave", "happy", "small", "clever"]),
        rng.choice(["old", "kind", "wise"]),
    )
    return (
        f"Once upon a time there was {_article(adjective)} {adjective} {hero} named {name}. "
        f"{name} lived in {_article(place := rng.choice(t.PLACES))} {place}. "
        f"One day {name} wanted to find {wish}. "
        f"{name} asked {_article(kind)} {kind} {other} for help. "
        f"They looked everywhere. At last they found {wish} {t.WISHES[wish]}. {name} was very happy."
    )


# ---------------------------------------------------------------- longer texts


def _conversation(rng: random.Random, turns: int) -> Sample:
    """Several turns about different things; now and then under one system line, or remembering."""
    messages: list[Message] = []
    if rng.random() < 0.2:
        rule, key, answers = _rule(rng)
        asked = [answers(rng) for _ in range(turns)]
        if any(is_held_back(f"{key}/{question}") for question, _ in asked):
            return _conversation(rng, turns)
        messages = [_system(rule)]
        for question, answer in asked:
            messages += [_user(question), _said(answer)]
        return Sample("conversation", "", tuple(messages))
    if rng.random() < 0.3:
        messages.append(_system(rng.choice(t.NEUTRAL_SYSTEM)))
    told: list[tuple[str, str, str, str]] = []
    topics = rng.sample(["name", "colour", "age", "city", "pet"], 5)
    for _ in range(turns):
        dice = rng.random()
        if dice < 0.15 and topics:
            told.append(_told(rng, topics.pop()))
            messages += [_user(told[-1][0]), _said(told[-1][1])]
        elif dice < 0.3 and told:
            *_, question, answer = rng.choice(told)
            messages += [_user(question), _said(answer)]
        else:
            messages += _plain_turn(rng)
    return Sample("conversation", "", tuple(messages))


def _plain_turn(rng: random.Random) -> tuple[Message, ...]:
    while True:
        sample = training_sample(rng)
        if len(sample.messages) == 2 and not sample.tools:
            return sample.messages


def _with_neutral_system(rng: random.Random, sample: Sample) -> Sample:
    if rng.random() > 0.12 or sample.messages[0]["role"] == "system":
        return sample
    return replace(sample, messages=(_system(rng.choice(t.NEUTRAL_SYSTEM)), *sample.messages))


def _plain(rng: random.Random) -> str:
    """Text without a template: prose, rows of sums, questions with their answers."""
    shape = rng.random()
    if shape < 0.2:
        return _story(rng, rng.choice(t.HEROES), _name(rng))
    if shape < 0.35:
        return _portrait(rng)
    if shape < 0.45:
        return " ".join(_fact(rng).sentence for _ in range(rng.randint(1, 5)))
    if shape < 0.7:
        rows = []
        while len(rows) < 8:
            key, text, result = _sum(rng)
            if not is_held_back(key):
                rows.append(f"{text} = {result}")
        return "\n".join(rows)
    if shape < 0.8:
        return " ".join(_sentence(rng) for _ in range(rng.randint(1, 5)))
    question, answer = _plain_turn(rng)
    if rng.random() < 0.7:
        return f"{question['content']}\n{answer['content']}"
    return f"Question: {question['content']}\nAnswer: {answer['content']}"


def _portrait(rng: random.Random) -> str:
    name, job, city = _name(rng), rng.choice(t.JOBS), _city(rng)
    sentences = [
        f"{name} is {_article(job)} {job}.", f"{name} lives in {city}.",
        f"{name} likes {rng.choice(t.HOBBIES)}.", f"On {rng.choice(t.DAYS)} {name} eats {rng.choice(t.FOODS)}.",
        f"{name} has a {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}.".replace("a old", "an old"),
        f"Every day {name} goes to the {rng.choice(t.NOUNS)}.",
    ]  # fmt: skip
    first, rest = sentences[0], sentences[1:]
    return " ".join([first, *rng.sample(rest, rng.randint(2, 4))])


# ---------------------------------------------------------------- words


def _name(rng: random.Random) -> str:
    return rng.choice(t.NAMES) if rng.random() < 0.6 else _invented(rng).capitalize()


def _city(rng: random.Random) -> str:
    return (
        rng.choice(list(t.CAPITALS.values())) if rng.random() < 0.7 else _invented(rng).capitalize()
    )


def _invented(rng: random.Random) -> str:
    """A word that nobody knows, so that the model learns to copy instead of to remember."""
    syllables = [
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3))
    ]
    return "".join(syllables) + rng.choice(["", "", "n", "r", "s", "l", "x"])


def _word(rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.5:
        return rng.choice(t.NOUNS)
    if dice < 0.7:
        return rng.choice(t.ADJECTIVES)
    return rng.choice(t.ONES) if dice < 0.8 else _name(rng) if dice < 0.9 else _invented(rng)


def _sentence(rng: random.Random) -> str:
    subject = (
        _name(rng)
        if rng.random() < 0.3
        else f"The {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}"
    )
    return f"{subject} {rng.choice(t.VERBS)} the {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}."


def _copyable(rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.4:
        return " ".join(_word(rng) for _ in range(rng.randint(2, 8)))
    if dice < 0.6:
        return _sentence(rng)
    if dice < 0.7:
        return " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(2, 6)))
    if dice < 0.8:
        return " ".join(_invented(rng) for _ in range(rng.randint(1, 4)))
    if dice < 0.9:
        return _fact(rng).sentence
    return f"{_capital(_word(rng))}, {_word(rng)} and {_word(rng)}" + rng.choice(
        ["!", "?", ".", ""]
    )


def _wrapped(rng: random.Random, question: str) -> tuple[str, str]:
    """A question as people ask it: with a polite word before it, or without its mark."""
    if rng.random() < 0.6:
        return "", question
    form = rng.choice(t.WRAPPERS)
    lowered = question[0].lower() + question[1:]
    if form == "lower":
        return form, lowered.rstrip("?.")
    if form == "short":
        return form, question.replace("What is", "What's").replace("Who is", "Who's")
    return form, form.format(question, lowered)


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _system(text: str) -> Message:
    return {"role": "system", "content": text}


def _turn(kind: str, key: str, question: str, answer: str) -> Sample:
    return Sample(kind, key, (_user(question), _said(answer)))


def _asked(
    kind: str, rng: random.Random, question: str, answer: str, key: str | None = None
) -> Sample:
    prefix, text = _wrapped(rng, question)
    return _turn(kind, f"{key or question}/{prefix}", text, answer)


KINDS: dict[str, tuple[int, Callable[[random.Random], Sample]]] = {  # kind: (weight, maker)
    "small talk": (4, small_talk),
    "about itself and the package": (8, about),
    "simple knowledge": (3, reasons),
    "says that it does not know": (6, unknown),
    "facts": (16, facts),
    "yes or no": (6, yes_or_no),
    "copying": (10, copy),
    "repeating": (3, repeat),
    "counting": (3, count),
    "lists": (9, lists),
    "small sums": (12, sums),
    "word problems": (4, word_problem),
    "comparing numbers": (3, compare),
    "filling JSON": (9, fill_json),
    "calling a tool": (4, tool_call),
    "reading a tool's answer": (7, tool_answer),
    "leaving tools alone": (2, no_tool),
    "obeying a system line": (10, system_line),
    "remembering": (4, memory),
    "telling a story": (2, story),
}


def _any_kind(rng: random.Random) -> Sample:
    weights = [weight for weight, _ in KINDS.values()]
    return rng.choices(list(KINDS.values()), weights)[0][1](rng)


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(TEMPLATE)


def main() -> None:
    rng = random.Random(0)
    for kind, (_, maker) in KINDS.items():
        print(f"\n==== {kind}\n")
        for _ in range(3):
            print(render(maker(rng)))


if __name__ == "__main__":
    main()
