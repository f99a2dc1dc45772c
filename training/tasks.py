"""Small tasks with words and numbers: copying, counting, lists, sums, filling JSON objects."""

from __future__ import annotations

import json
import random

import facts
import tables as t
import words
from sample import Sample, turn

# ---------------------------------------------------------------- copying


def copy(rng: random.Random) -> Sample:
    text = copyable(rng)
    form = rng.choice([
        "Repeat: {}", "Repeat after me: {}", 'Say "{}"', "Copy this text: {}", "Copy: {}",
        "Say: {}", 'Repeat "{}"', "Write this again: {}", "Please repeat: {}", 'Write "{}"',
        "Echo: {}",
    ])  # fmt: skip
    return turn("copying", text, form.format(text), text)


def copyable(rng: random.Random) -> str:
    dice = rng.random()
    if dice < 0.4:
        return " ".join(words.word(rng) for _ in range(rng.randint(2, 6)))
    if dice < 0.6:
        return words.sentence(rng)
    if dice < 0.7:
        return " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(2, 6)))
    if dice < 0.8:
        return " ".join(words.invented(rng) for _ in range(rng.randint(1, 4)))
    if dice < 0.9:
        return facts.any_fact(rng).sentence
    first, second, third = (words.word(rng) for _ in range(3))
    return f"{words.capital(first)}, {second} and {third}" + rng.choice(["!", "?", ".", ""])


def repeat(rng: random.Random) -> Sample:
    word, count = words.word(rng), rng.randint(2, 6)
    times = t.ONES[count] if rng.random() < 0.6 else str(count)
    form = rng.choice(["Say {} {} times.", "Write {} {} times.", "Repeat {} {} times.",
                       "Write the word {} {} times.", "Say the word {} {} times."])  # fmt: skip
    answer = " ".join([word] * count)
    return turn("repeating", f"{word}/{count}", form.format(word, times), answer)


def count(rng: random.Random) -> Sample:
    start = rng.randint(0, 80)
    end = start + rng.randint(2, 20)
    dice = rng.random()
    if dice < 0.3:
        start, end = 1, rng.randint(3, 100 if dice < 0.05 else 40)
        question = rng.choice([f"Count to {end}.", f"Count from 1 to {end}."])
    elif dice < 0.8:
        form = rng.choice(["Count from {} to {}.", "List the numbers from {} to {}."])
        question = form.format(start, end)
    else:
        start, end = end, start
        question = f"Count down from {start} to {end}."
    step = 1 if end >= start else -1
    numbers = ", ".join(str(n) for n in range(start, end + step, step))
    return turn("counting", f"{start}-{end}", question, numbers)


# ---------------------------------------------------------------- lists


def lists(rng: random.Random) -> Sample:
    return rng.choice([_members, _pick, _sort, *[_row_of_words] * 6])(rng)


def _members(rng: random.Random) -> Sample:
    group, count = rng.choice(list(t.CATEGORIES)), rng.randint(2, 6)
    form = rng.choice(["Name {} {}.", "List {} {}.", "Give me {} {}.", "Tell me {} {}."])
    prefix, question = words.wrapped(rng, form.format(rng.choice([t.ONES[count], count]), group))
    answer = words.capital(words.joined(t.CATEGORIES[group][:count])) + "."
    return turn("lists", f"{group}/{count}/{form}/{prefix}", question, answer)


def _pick(rng: random.Random) -> Sample:
    group, *others = rng.sample(list(t.CATEGORIES), rng.randint(3, 4))
    right, *wrong = (
        rng.choice([word for word in t.CATEGORIES[g] if word != "orange"]) for g in (group, *others)
    )
    choice = rng.sample([right, *wrong], 1 + len(wrong))
    form = rng.choice(["Which of these is {}: {}?", "Find {}: {}"])
    question = form.format(t.MEMBER_OF[group], ", ".join(choice))
    return turn("lists", question, question, f"{words.capital(right)} is {t.MEMBER_OF[group]}.")


def _sort(rng: random.Random) -> Sample:
    numbers = rng.sample(range(31), rng.randint(3, 4))
    form = rng.choice(["Sort these numbers: {}", "Sort: {}", "Put these numbers in order: {}"])
    question = form.format(", ".join(map(str, numbers)))
    return turn("lists", str(numbers), question, ", ".join(map(str, sorted(numbers))))


def _row_of_words(rng: random.Random) -> Sample:
    row = list(dict.fromkeys(words.word(rng) for _ in range(rng.randint(3, 5))))
    spaced, commas = " ".join(row), ", ".join(row)
    shape = rng.choice(["bullets", "first", "last", "reverse", "commas"])
    if shape == "bullets":
        form = rng.choice(["Make a list of {}.", "Write a list with {}.", "Make a list: {}"])
        question, answer = form.format(words.joined(row)), "\n".join(f"- {word}" for word in row)
    elif shape == "reverse":
        row = row[:4]
        form = rng.choice(["Reverse this list: {}", "Say these words backwards: {}", "Reverse: {}"])
        question, answer = form.format(", ".join(row)), ", ".join(row[::-1])
    elif shape == "commas":
        form = rng.choice(["Write with commas: {}", "Put commas between these words: {}"])
        question, answer = form.format(spaced), commas
    else:
        form = rng.choice(["What is the {} word of: {}", "Give me the {} word: {}"])
        question = form.format(shape, spaced)
        answer = f"The {shape} word is {row[0 if shape == 'first' else -1]}."
    return turn("lists", f"{shape}/{row}", question, answer)


# ---------------------------------------------------------------- numbers


def sums(rng: random.Random) -> Sample:
    key, text, result = any_sum(rng)
    a, sign, b = text.split()
    word = {"+": "plus", "-": "minus"}[sign]
    forms = [f"What is {text}?", text, f"{text} =", f"{text} = ?", f"How much is {a} {word} {b}?",
             f"What is {a} {word} {b}?", f"{a} {word} {b}", f"Calculate {text}.", f"{a}{sign}{b}",
             f"What is {a}{sign}{b}?", f"{a}{sign}{b}="]  # fmt: skip
    if sign == "+":
        forms += [f"Add {a} and {b}.", f"What is the sum of {a} and {b}?"]
    else:
        forms += [f"Take {b} from {a}.", f"Subtract {b} from {a}."]
    _, question = words.wrapped(rng, rng.choice(forms))
    return turn("small sums", key, question, f"{text} = {result}")


def any_sum(rng: random.Random, limit: int = 50) -> tuple[str, str, int]:
    """Its key, its text and its result. 5 + 7 and 7 + 5 share a key, and so one fate."""
    if rng.random() < 0.6:
        limit = 20
    a, b = rng.randint(0, limit), rng.randint(0, limit)
    low, high = min(a, b), max(a, b)
    if rng.random() < 0.6:
        return f"{low}+{high}", f"{a} + {b}", a + b
    return f"{high}-{low}", f"{high} - {low}", high - low


def word_problem(rng: random.Random) -> Sample:
    key, text, result = any_sum(rng, limit=20)
    a, sign, b = text.split()
    name, things = words.name(rng), rng.choice(list(t.GOODS.values()))
    change = {
        "+": [f"gets {b} more", f"buys {b} more", f"finds {b} more"],
        "-": [f"loses {b}", f"gives away {b}", f"sells {b}"],
    }
    story = f"{name} has {a} {things} and {rng.choice(change[sign])}."
    question = f"{story} How many {things} does {name} have now?"
    answer = f"{text} = {result}, so {name} has {result} {things}."
    return turn("word problems", key, question, answer)


def compare(rng: random.Random) -> Sample:
    low, high = sorted(rng.sample(range(100), 2))
    word, right, wrong = rng.choice([("larger", high, low), ("smaller", low, high)])
    first, second = rng.sample([low, high], 2)
    form = rng.choice(
        ["Which is {}, {} or {}?", "Which number is {}: {} or {}?", "What is {}, {} or {}?"]
    )
    question = form.format(word, first, second)
    return turn("comparing numbers", f"{low},{high}", question, f"{right} is {word} than {wrong}.")


# ---------------------------------------------------------------- JSON


def fill_json(rng: random.Random) -> Sample:
    sentence, fields = _described(rng)
    keys = list(fields)
    if rng.random() < 0.5:
        keys = rng.sample(keys, rng.randint(1, len(keys)))
    wanted = {key: fields[key] for key in keys}
    listed = words.joined(keys)
    dice = rng.random()
    if dice < 0.4:
        form = rng.choice(["Write a JSON object with {}: {}", "Give {} as JSON: {}",
                           "Make a JSON object with {}: {}", "JSON with {}: {}",
                           "Extract {} as JSON: {}"])  # fmt: skip
        question = form.format(listed, sentence)
    elif dice < 0.7:
        empty = {key: 0 if isinstance(value, int) else "" for key, value in wanted.items()}
        form = rng.choice(["Fill in {}: {}", "Fill this JSON object {}: {}",
                           "Fill {} from this: {}"])  # fmt: skip
        question = form.format(json.dumps(empty), sentence)
    else:
        form = rng.choice(["{} Give me {} as JSON.", "{} Write {} as a JSON object.",
                           "{} Make a JSON object with {}."])  # fmt: skip
        question = form.format(sentence, listed)
    return turn("filling JSON", f"{sorted(wanted.items())}", question, json.dumps(wanted))


def _described(rng: random.Random) -> tuple[str, dict[str, str | int]]:
    """A sentence, and the fields that it tells."""
    name, city, number = words.name(rng), words.city(rng), rng.randint(2, 99)
    thing, things = rng.choice(list(t.GOODS.items()))
    job, hobby, food = rng.choice(t.JOBS), rng.choice(t.HOBBIES), rng.choice(t.FOODS)
    colour, day = rng.choice(t.CATEGORIES["colours"]), rng.choice(t.DAYS)
    animal, pet = rng.choice(list(t.ANIMALS)), words.name(rng)
    return rng.choice([
        (f"{name} is {number} years old and lives in {city}.",
         {"name": name, "age": number, "city": city}),
        (f"{name} is {words.a(job)} from {city}.", {"name": name, "job": job, "city": city}),
        (f"{name} is {number} years old and likes {hobby}.",
         {"name": name, "age": number, "hobby": hobby}),
        (f"{name} eats {food} on {day}.", {"name": name, "food": food, "day": day}),
        (f"{name} has {words.a(animal)} named {pet}.",
         {"owner": name, "animal": animal, "pet": pet}),
        (f"{name} buys {number} {things} in {city}.",
         {"name": name, "count": number, "item": things, "city": city}),
        (f"The {thing} is {colour} and costs {number} euros.",
         {"item": thing, "colour": colour, "price": number}),
    ])  # fmt: skip
