"""`-o help`: the options that a format takes."""

from __future__ import annotations

from collections.abc import Iterable

from drivers.block.creating import NewImage, check_makes_images, find_format
from drivers.block.graph import Graph
from drivers.block.image import CreateOption
from drivers.catalog import Catalog

_KINDS = {"string": "str", "boolean": "bool (on/off)", "number": "num", "size": "size"}


def show_create_options(filename: str | None, image_format: str) -> int:
    """Those of the storage too, if there is a `filename` to tell what it is. Raises OptionError."""
    graph = Graph(Catalog())
    if filename is not None:
        print("Supported options:")
        show(NewImage.plan(graph, filename, image_format).options)
        return 0
    driver = find_format(graph, image_format)
    check_makes_images(driver, image_format)
    print(f"Supported {image_format} options:")
    show(driver.create_options)
    print("\nThe protocol level may support further options.")
    print("Specify the target filename to include those options.")
    return 0


def show(options: Iterable[CreateOption]) -> None:
    for option in sorted(options, key=lambda option: option.name):
        name = f"{option.name}=<{_KINDS[option.kind]}>"
        print(f"  {name:<22} - {option.help}")
