"""Where the backing file lies that an image names."""

from __future__ import annotations

import os

from drivers.errors import OptionError
from drivers.options.pseudo import protocol_prefix


def resolve_backing(image: str, backing: str) -> str:
    """The name to open `backing` by, as the image named `image` refers to it.

    A relative path is relative to the image's directory. Raises OptionError where that is not known.
    """
    if not backing or os.path.isabs(backing) or protocol_prefix(backing) is not None:
        return backing
    if image.startswith("json:"):
        raise OptionError(f"Cannot use relative backing file names for '{image}'")
    # Not os.path.join() with a normalised path: what is shown is what was written.
    directory, slash, _ = image.rpartition("/")
    return f"{directory}{slash}{backing}"
