"""JSON as models write it: read whole, or as far as it has come."""

from __future__ import annotations

import re
from typing import Any


class Mismatch(ValueError):  # noqa: N818 - said of a value, not of the program
    """A value is not what was asked for; the message names the place, the rule and the value."""

    def __init__(self, where: str, rule: str) -> None:
        super().__init__(f"`{where}` {rule}" if where else f"the answer {rule}")
        self.where, self.rule = where, rule


def must_be(where: str, allowed: str, value: object) -> Mismatch:
    return Mismatch(where, f"must be {allowed}, got {shown(value)}")


def shown(value: object) -> str:
    """A value as JSON, and a long one in part."""
    import json

    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:60]}…"


def read(text: str, where: str = "") -> Any:
    """The value of a JSON text. What only Python takes for JSON, like NaN, is refused."""
    import json

    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise Mismatch(where, "is nested too deeply to be read") from None
    except ValueError as error:
        raise Mismatch(where, f"is no JSON: {error}") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


class UnfinishedJson:
    """A JSON text that is still being written, and what it says so far.

    It remembers up to where the text can be understood, and what would close it there, so each
    piece is looked at once:

        {"name": "Rome", "sights": ["Foru      {"name": "Rome", "sights": ["Foru"]}
        {"name": "Rome", "popul                {"name": "Rome"}
        {"name": "Rome", "population": 28      {"name": "Rome"}      there may be more digits
    """

    def __init__(self) -> None:
        self.size = 0
        self._pieces: list[str] = []
        self._sound = 0
        """So many characters can be understood."""
        self._closers: list[str] = []
        self._is_text = self._is_key = False
        """Inside of a string; and that one, or the next, is the name of a field."""
        self._escape = ""
        """The beginning of an escape inside of a string."""

    @property
    def depth(self) -> int:
        """How many values are unfinished: the outermost, the last one in it, and so on."""
        return len(self._closers) + (self._is_text and not self._is_key)

    def feed(self, piece: str) -> None:
        self._pieces.append(piece)
        at, end = 0, len(piece)
        while at < end:
            at = (self._in_text if self._is_text else self._outside)(piece, at)
        self.size += end

    def value(self) -> Any:
        """What can be understood so far; None if that is nothing, or no JSON."""
        if not self._sound:
            return None
        quote = '"' if self._is_text and not self._is_key else ""
        sound = "".join(self._pieces)[: self._sound]
        try:
            return read("".join((sound, quote, *reversed(self._closers))))
        except Mismatch:
            return None

    def _outside(self, piece: str, at: int) -> int:
        found = _MARK.search(piece, at)
        if found is None:
            return len(piece)
        mark = found[0]
        after = found.end()
        if mark == '"':
            self._is_text = True
            if not self._is_key:
                self._sound = self.size + after
            return after
        if mark in "{[":
            self._closers.append("}" if mark == "{" else "]")
            self._sound = self.size + after
        elif mark in "}]":
            if self._closers:
                self._closers.pop()
            self._sound = self.size + after
        elif mark == ",":
            self._sound = self.size + found.start()  # a number in front of it is complete
        self._is_key = mark in "{," and self._closers[-1:] == ["}"]
        return after

    def _in_text(self, piece: str, at: int) -> int:
        if self._escape:
            return self._in_escape(piece, at)
        found = _END_OR_ESCAPE.search(piece, at)
        if found is None:
            after = len(piece)
        elif found[0] == "\\":
            self._escape = "\\"
            self._keep(self.size + found.start())
            return found.end()
        else:
            self._is_text = False
            after = found.end()
        self._keep(self.size + after)
        return after

    def _in_escape(self, piece: str, at: int) -> int:
        """Half an escape is not shown, and half of a surrogate pair neither."""
        longer = self._escape + piece[at]
        if _GOES_ON.fullmatch(longer):
            self._escape = longer
            return at + 1
        after = at if _HIGH_HALF.fullmatch(self._escape) else at + 1
        self._escape = ""
        self._keep(self.size + after)
        return after

    def _keep(self, sound: int) -> None:
        if not self._is_key:
            self._sound = sound


_MARK = re.compile(r'["{}\[\],:]')
_END_OR_ESCAPE = re.compile(r'["\\]')
_HIGH_HALF = re.compile(r"\\u[dD][89abAB][0-9a-fA-F]{2}")
_GOES_ON = re.compile(rf"\\(u[0-9a-fA-F]{{0,3}})?|{_HIGH_HALF.pattern}(\\(u[0-9a-fA-F]{{0,3}})?)?")
