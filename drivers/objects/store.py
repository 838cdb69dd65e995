"""The objects of one program, by their ids."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Mapping
from typing import ClassVar, Protocol, TypeVar

from drivers.errors import OptionError
from drivers.options.schema import Options, Tree, Value

_ID = re.compile(r"[A-Za-z][A-Za-z0-9._-]*", re.ASCII)

# Type to "module:Class"; each is imported when it is first used.
TYPES = {"secret": "drivers.objects.secret:Secret"}

# What QEMU's tools define beside them.
NOT_YET = (
    *("authz-list", "authz-list-file", "authz-simple", "iothread", "secret_keyring", "throttle-group"),
    *("tls-creds-anon", "tls-creds-psk", "tls-creds-x509"),
)


class ObjectType(Protocol):
    """What a row of TYPES leads to. `properties`: name to kind, as the help shows them."""

    properties: ClassVar[Mapping[str, str]]

    @classmethod
    def create(cls, store: ObjectStore, options: Options, /) -> object:
        """An object of its own options; leave none behind that it knows. Raises OptionError."""
        ...


T = TypeVar("T")


class ObjectStore:
    """Nothing is shared between two stores."""

    def __init__(self) -> None:
        self._objects: dict[str, object] = {}

    @classmethod
    def of(cls, trees: Iterable[Tree]) -> ObjectStore:
        """A store with these objects, made in their order."""
        store = cls()
        for tree in trees:
            store.add(tree)
        return store

    def add(self, tree: Mapping[str, Value]) -> None:
        """Make the object that `tree` describes: "qom-type", "id", and its properties. Raises OptionError."""
        properties = dict(tree)
        type_name, name = properties.pop("qom-type", None), properties.pop("id", None)
        for key, value in (("qom-type", type_name), ("id", name)):
            if key in tree and not isinstance(value, str):
                raise OptionError(f"Invalid parameter type for '{key}', expected: string")
        if type_name is None:
            raise OptionError("Parameter 'qom-type' is missing")
        if type_name in NOT_YET:
            raise OptionError(f"--object: objects of type '{type_name}' are not supported yet")
        if not isinstance(type_name, str) or type_name not in TYPES:
            raise OptionError(f"Parameter 'qom-type' does not accept value '{type_name}'")
        if name is None:
            raise OptionError("Parameter 'id' is missing")
        if not isinstance(name, str) or not _ID.fullmatch(name):
            raise OptionError(
                "Parameter 'id' expects an identifier\n"
                "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
            )
        options = Options(properties, owner=f"Object '{name}'")
        made = object_type(type_name).create(self, options)
        if left := options.left():
            raise OptionError(f"Parameter '{left.partition('.')[0]}' is unexpected")
        if name in self._objects:
            raise OptionError(f"attempt to add duplicate property '{name}' to object (type 'container')")
        self._objects[name] = made

    def remove(self, name: str) -> None:
        if self._objects.pop(name, None) is None:
            raise OptionError(f"object '{name}' not found")

    def get(self, name: str, kind: type[T]) -> T | None:
        """The object `name`, if there is one and it is a `kind`."""
        found = self._objects.get(name)
        return found if isinstance(found, kind) else None


def object_type(type_name: str) -> ObjectType:
    module, _, attribute = TYPES[type_name].partition(":")
    found: ObjectType = getattr(importlib.import_module(module), attribute)
    return found


def help_text(type_name: str) -> str:
    """The lines for --object help and --object TYPE,help."""
    if type_name in TYPES:
        properties = object_type(type_name).properties
        lines = [f"{type_name} options:", *(f"  {key}=<{kind}>" for key, kind in sorted(properties.items()))]
    else:
        lines = ["List of user creatable objects:", *(f"  {name}" for name in sorted(TYPES))]
    return "\n".join(lines)
