"""Opens mutated images of a format.

    python -m tests.fuzz qcow2 --seed 1 [--count 1000] [--first 4711] [--trace]

Every case is made from the seed and its number alone. Of the failures each kind is told once, with the
case that repeats it; with any the exit status is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback

from tests.fuzz.exercise import Watch, run_case, where
from tests.fuzz.mutate import Case, Format
from tests.fuzz.qcow2 import QCOW2

FORMATS = {image_format.name: image_format for image_format in (QCOW2,)}


def fuzz(image_format: Format, seed: int, first: int, count: int, *, trace: bool = False) -> dict[str, str]:
    """Kind of failure to the case that showed it first."""
    watch = Watch()
    failures: dict[str, str] = {}
    for number in range(first, first + count):
        case = Case(image_format, seed, number)
        try:
            run_case(case, watch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            kind = where(error)
            if kind not in failures:
                failures[kind] = f"--seed {seed} --first {number} --count 1 ({case})"
                print(f"{kind}\n    {failures[kind]}", flush=True)
                if trace:
                    traceback.print_exception(error, file=sys.stdout)
    return failures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--trace", action="store_true", help="with the traceback of each kind")
    given = parser.parse_args()
    # Complaints about the images are what is to be expected.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        failures = fuzz(FORMATS[given.format], given.seed, given.first, given.count, trace=given.trace)
    print(f"{given.count} images, {len(failures)} kinds of failure")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
