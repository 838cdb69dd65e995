"""The argument of --object: TYPE,id=ID,... or JSON, or a question."""

from __future__ import annotations

from dataclasses import dataclass

from drivers.options.keyval import parse_keyval
from drivers.options.pseudo import parse_json
from drivers.options.schema import Tree

_HELP = ("help", "?")


@dataclass(frozen=True, slots=True)
class HelpWanted:
    """A question: about the type `type_name`, or which types there are if it is empty."""

    type_name: str = ""


def parse_object(text: str) -> Tree | HelpWanted:
    """The properties, with "qom-type" and "id" among them. Raises OptionError."""
    if text.startswith("{"):
        value = parse_json(text)
        assert isinstance(value, dict)  # it begins with a brace
        return value
    if text in _HELP:
        return HelpWanted()
    type_name, _, rest = text.partition(",")
    if "=" not in type_name and any(word in rest.split(",") for word in _HELP):
        return HelpWanted(type_name)
    return parse_keyval(text, implied_key="qom-type")
