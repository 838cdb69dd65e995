"""A short run of the fuzzer; tests/fuzz_server.py does longer ones."""

import pytest

from tests.fuzz_server import fuzz
from tests.hostile.conftest import Served


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_conversations_do_no_harm(server: Served, seed: int) -> None:
    fuzz(server, seed, cases=500)
