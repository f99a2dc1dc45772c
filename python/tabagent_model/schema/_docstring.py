"""What a docstring says about a function and its parameters: Google's, numpy's and reST's ways."""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple


class Docstring(NamedTuple):
    description: str
    parameters: dict[str, str]

    @classmethod
    def of(cls, text: str | None) -> Docstring:
        """What stands before the first section, and a line for each parameter."""
        lines = inspect.cleandoc(text or "").splitlines()
        description: list[str] = []
        parameters: dict[str, str] = {}
        section, field = "", None
        for at, line in enumerate(lines):
            if (found := _section_at(lines, at)) is not None:
                section, field = found, None
            elif match := _REST.match(line):
                section, field = "rest", match["name"]
                if field:
                    parameters[field] = match["text"]
            elif not section:
                description.append(line)
            elif (match := _entry(line, section)) is not None:
                field = match["name"]
                parameters[field] = match["text"] or ""
            elif field and line.startswith(" "):
                parameters[field] += " " + line.strip()
            elif line.strip():
                field = None
        told = {name: text.strip() for name, text in parameters.items() if text.strip()}
        return cls("\n".join(description).strip(), told)


def _section_at(lines: list[str], at: int) -> str | None:
    """The section that begins at a line, or goes on as its underline."""
    line = lines[at].rstrip()
    if (google := _GOOGLE.fullmatch(line)) is not None:
        return "google" if google["name"].lower() in _OF_PARAMETERS else "other"
    after = lines[at + 1].strip() if at + 1 < len(lines) else ""
    if line and not line.startswith(" ") and len(after) >= 3 and set(after) == {"-"}:
        return "numpy" if line.lower() in _OF_PARAMETERS else "other"
    return None


def _entry(line: str, section: str) -> re.Match[str] | None:
    if section == "google":
        return _GOOGLE_ENTRY.match(line)
    return _NUMPY_ENTRY.match(line) if section == "numpy" else None


_OF_PARAMETERS = ("args", "arguments", "parameters", "params", "other parameters")
_GOOGLE = re.compile(
    r"(?P<name>args|arguments|parameters|params|returns?|yields?|raises|examples?|notes?):",
    re.IGNORECASE,
)
# The less indented lines of a section are its entries; their text may go on, indented further.
_GOOGLE_ENTRY = re.compile(r" {2,4}\*{0,2}(?P<name>\w+)(?: *\([^)]*\))?: *(?P<text>.*)")
_NUMPY_ENTRY = re.compile(r"\*{0,2}(?P<name>\w+)(?: *: *.*)?$(?P<text>)")
_REST = re.compile(
    r":(?:param(?: [^:]*?)? (?P<name>\w+)|(?:type|rtype|returns?|raises?|yields?)\b[^:]*):"
    r"\s*(?P<text>.*)"
)
