"""Tools: calling the right one with the right arguments, reading its answer, or leaving it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

import tables as t
import words
from sample import Maker, Message, Sample, Tool, assistant, user
from tasks import copyable


@dataclass(frozen=True)
class Use:
    """One use of a tool: what is asked, the arguments, what the tool says, and what we tell."""

    tool: Tool
    question: str
    arguments: dict[str, str | int]
    result: str
    answer: str

    @property
    def call(self) -> Message:
        call = {"name": self.tool["function"]["name"], "arguments": self.arguments}
        tool_calls = [{"type": "function", "function": call}]
        return {"role": "assistant", "content": "", "tool_calls": tool_calls}

    @property
    def key(self) -> str:
        return f"{self.tool['function']['name']}/{self.arguments}"


def tool_call(rng: random.Random) -> Sample:
    use, tools = _use_among_others(rng)
    return Sample("calling a tool", use.key, (user(use.question), use.call), tools)


def tool_answer(rng: random.Random) -> Sample:
    use, tools = _use_among_others(rng)
    said = {"role": "tool", "content": use.result}
    messages = (user(use.question), use.call, said, assistant(use.answer))
    return Sample("reading a tool's answer", f"{use.key}/{use.result}", messages, tools)


def no_tool(other: Maker) -> Maker:
    """Tools are there, but the question needs none of them, or one that is missing."""

    def maker(rng: random.Random) -> Sample:
        use, tools = _use_among_others(rng)
        others = tuple(tool for tool in tools if tool != use.tool)
        if others and rng.random() < 0.4:
            messages = (user(use.question), assistant("I have no tool for that."))
            return Sample("leaving tools alone", use.question, messages, others)
        return replace(other(rng), kind="leaving tools alone", tools=tools)

    return maker


def _use_among_others(rng: random.Random) -> tuple[Use, tuple[Tool, ...]]:
    makers = rng.sample(
        [_weather, _time, _calculator, _mail, _timer, _light, _price, _search, _action, _action],
        rng.choice([1, 1, 1, 1, 2, 2, 3]),
    )
    uses = [maker(rng) for maker in makers]
    tools = [use.tool for use in uses]
    rng.shuffle(tools)
    return uses[0], tuple(tools)


def _tool(rng: random.Random, name: str, description: str, parameters: dict[str, str]) -> Tool:
    """The schema as people write it, or as a library makes it from a signature."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    dice = rng.random()
    if dice < 0.2:
        properties = {k: value | {"description": f"The {k}"} for k, value in properties.items()}
    elif dice < 0.35:
        properties = {k: {"title": words.capital(k)} | value for k, value in properties.items()}
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if rng.random() < 0.8:
        schema["required"] = list(parameters)
    if rng.random() < 0.15:
        schema["additionalProperties"] = False
    if rng.random() < 0.2:
        schema = dict(rng.sample(list(schema.items()), len(schema)))
    description += rng.choice(["", "."])
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


def _done(rng: random.Random) -> str:
    said = rng.choice(["ok", "done", "sent", "started"])
    return rng.choice([said, json.dumps({"ok": True}), json.dumps({"status": said})])


# ---------------------------------------------------------------- the tools


def _weather(rng: random.Random) -> Use:
    city, degrees = words.city(rng), rng.randint(-9, 39)
    sky = rng.choice(["sunny", "cloudy", "rainy", "windy", "snowy", "foggy", "clear"])
    place = rng.choice(["city", "city", "location", "place"])
    name = rng.choice(["get_weather", "get_weather", "weather", "current_weather"])
    about = rng.choice([
        "Get the weather in a city", "Tells the weather", "Weather of a city",
        "Get the current weather", "Get the current weather in a given place",
    ])  # fmt: skip
    question = rng.choice(["What is the weather in {}?", "How is the weather in {}?",
                           "What is the weather like in {}?", "Tell me the weather in {}.",
                           "How warm is it in {}?"])  # fmt: skip
    result = rng.choice([
        json.dumps({"temperature": degrees, "sky": sky}), f"{sky}, {degrees} degrees",
        json.dumps({place: city, "weather": sky, "temperature": degrees}),
        f"{degrees} degrees and {sky}",
    ])  # fmt: skip
    tool = _tool(rng, name, about, {place: "string"})
    answer = f"It is {degrees} degrees and {sky} in {city}."
    return Use(tool, question.format(city), {place: city}, result, answer)


def _time(rng: random.Random) -> Use:
    city, clock = words.city(rng), f"{rng.randint(0, 23):02}:{rng.randint(0, 59):02}"
    place = rng.choice(["city", "city", "location", "place"])
    name = rng.choice(["get_time", "time_in", "current_time"])
    about = rng.choice(["Get the time in a city", "Tells the time", "Get the current time"])
    question = rng.choice(
        ["What time is it in {}?", "Tell me the time in {}.", "How late is it in {}?"]
    )
    result = rng.choice([clock, json.dumps({"time": clock})])
    tool = _tool(rng, name, about, {place: "string"})
    return Use(tool, question.format(city), {place: city}, result, f"It is {clock} in {city}.")


def _calculator(rng: random.Random) -> Use:
    a, b = rng.randint(0, 999), rng.randint(0, 999)
    verb, sign, said, total = rng.choice([
        ("add", "+", "plus", a + b), ("multiply", "*", "times", a * b),
        ("subtract", "-", "minus", a - b),
    ])  # fmt: skip
    first, second = rng.choice([("a", "b"), ("a", "b"), ("x", "y"), ("first", "second")])
    kind, noun = rng.choice(["integer", "number"]), rng.choice(["numbers", "integers"])
    name, about = rng.choice([verb, f"{verb}_numbers"]), f"{words.capital(verb)} two {noun}"
    questions = [f"What is {a} {said} {b}?", f"What is {a} {sign} {b}?",
                 f"How much is {a} {said} {b}?"]  # fmt: skip
    if verb != "subtract":
        questions += [f"{words.capital(verb)} {a} and {b}.", f"Please {verb} {a} and {b}."]
    result = rng.choice([str(total), json.dumps({"result": total})])
    tool = _tool(rng, name, about, {first: kind, second: kind})
    arguments: dict[str, str | int] = {first: a, second: b}
    return Use(tool, rng.choice(questions), arguments, result, f"The result is {total}.")


def _mail(rng: random.Random) -> Use:
    name, text = words.name(rng), copyable(rng)
    to = rng.choice(["to", "name", "person"])
    tool_name = rng.choice(["send_message", "send_mail", "write_message"])
    about = rng.choice(["Send a message to a person", "Send a text"])
    question = rng.choice([f'Send "{text}" to {name}.', f"Send {name} this message: {text}",
                           f"Write to {name}: {text}", f"Tell {name}: {text}"])  # fmt: skip
    tool = _tool(rng, tool_name, about, {to: "string", "text": "string"})
    answer = f"I sent the message to {name}."
    return Use(tool, question, {to: name, "text": text}, _done(rng), answer)


def _timer(rng: random.Random) -> Use:
    number, unit = rng.randint(1, 90), rng.choice(["minutes", "seconds", "hours"])
    name = rng.choice(["set_timer", "start_timer", "timer"])
    about = rng.choice(["Set a timer", "Start a timer"])
    question = rng.choice(["Set a timer for {} {}.", "Start a timer: {} {}.", "Wake me in {} {}.",
                           "Timer for {} {}, please."])  # fmt: skip
    tool, question = _tool(rng, name, about, {unit: "integer"}), question.format(number, unit)
    answer = f"The timer is set to {number} {unit}."
    return Use(tool, question, {unit: number}, _done(rng), answer)


def _light(rng: random.Random) -> Use:
    room = rng.choice(["kitchen", "garden", "bedroom", "office", "hall", "cellar", "bathroom"])
    state = rng.choice(["on", "off"])
    name = rng.choice(["set_light", "switch_light", "light"])
    about = rng.choice(["Switch the light in a room", "Turn a light on or off"])
    question = rng.choice(["Turn {0} the light in the {1}.", "Light {0} in the {1}, please.",
                           "Switch the light in the {1} {0}."])  # fmt: skip
    tool = _tool(rng, name, about, {"room": "string", "state": "string"})
    arguments: dict[str, str | int] = {"room": room, "state": state}
    answer = f"The light in the {room} is {state}."
    return Use(tool, question.format(state, room), arguments, _done(rng), answer)


def _price(rng: random.Random) -> Use:
    item, price = rng.choice(t.NOUNS), rng.randint(1, 999)
    key = rng.choice(["item", "product", "name"])
    name = rng.choice(["get_price", "find_price", "price_of"])
    about = rng.choice(["Get the price of an item", "Tells what something costs"])
    question = rng.choice(["How much is the {}?", "What does the {} cost?",
                           "What is the price of the {}?",
                           "Tell me the price of the {}."])  # fmt: skip
    result = rng.choice([str(price), json.dumps({"price": price}), f"{price} euros"])
    tool, answer = _tool(rng, name, about, {key: "string"}), f"The {item} costs {price} euros."
    return Use(tool, question.format(item), {key: item}, result, answer)


def _search(rng: random.Random) -> Use:
    topic = f"the {rng.choice(t.ADJECTIVES)} {rng.choice(t.NOUNS)}"
    if rng.random() < 0.3:
        topic = words.name(rng)
    key = rng.choice(["query", "query", "text", "topic"])
    name = rng.choice(["search", "web_search", "lookup", "find"])
    about = rng.choice(["Search the web", "Search for a text", "Find facts about a topic"])
    question = rng.choice(["Search for {}.", "Find something about {}.", "Look up {}.",
                           "Search the web for {}."])  # fmt: skip
    found = words.sentence(rng)
    result = rng.choice([found, json.dumps({"result": found}), json.dumps({"text": found})])
    tool = _tool(rng, name, about, {key: "string"})
    return Use(tool, question.format(topic), {key: topic}, result, found)


def _action(rng: random.Random) -> Use:
    """A tool that was seldom or never seen: its name says what it does."""
    verb = rng.choice(["open", "close", "paint", "clean", "start", "stop", "buy", "sell", "move",
                       "lock", "check", "show", "wash", "break"])  # fmt: skip
    noun = rng.choice(t.NOUNS) if rng.random() < 0.8 else words.invented(rng)
    task, detail = f"{verb} the {noun}", ""
    parameters: dict[str, str] = {}
    arguments: dict[str, str | int] = {}
    if rng.random() < 0.6:
        number, colour = rng.randint(1, 99), rng.choice(t.CATEGORIES["colours"])
        name = words.name(rng)
        parameter, kind, value, detail = rng.choice([
            ("number", "integer", number, f" {number} times"),
            ("name", "string", name, f" for {name}"),
            ("colour", "string", colour, f" in {colour}"),
        ])  # fmt: skip
        parameters, arguments = {parameter: kind}, {parameter: value}
    form = rng.choice(["{}.", "Please {}.", "{}, please.", "Can you {}?", "I want you to {}."])
    tool = _tool(rng, f"{verb}_{noun}", words.capital(task), parameters)
    question = words.capital(form.format(task + detail))
    return Use(tool, question, arguments, _done(rng), "It is done.")
