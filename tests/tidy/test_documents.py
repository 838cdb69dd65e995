"""What is documented exists, and what exists is documented."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from drivers.catalog import ROWS
from drivers.format.qcow2.new import CREATE_OPTIONS
from drivers.format.qcow2.options import OVERLAP_CHECKS
from nbdclient.cli.arguments import parser
from nbdserve.cli.help import TEXT
from nbdserve.cli.nbd import NOT_YET, TABLE
from nbdserve.trace import EVENTS
from tests.conftest import PACKAGES

ROOT = Path(__file__).parents[2]
SERVE = (ROOT / "docs/nbdserve.md").read_text()
CLIENT = (ROOT / "docs/nbdclient.md").read_text()


@pytest.mark.parametrize("name", [option.name for option in TABLE])
def test_every_option_of_nbdserve_is_in_help_and_documentation(name: str) -> None:
    assert re.search(rf"--{name}\b", SERVE), f"--{name} is missing in docs/nbdserve.md"
    if name != "partition":  # gone; only the documentation says where it went
        assert re.search(rf"--{name}\b", TEXT), f"--{name} is missing in --help"


@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_not_there_yet_is_said_to_be(name: str) -> None:
    (line,) = [line for line in TEXT.splitlines() if re.search(rf"--{name}\b", line)] or [""]
    section = TEXT[: TEXT.index(line)].rpartition("\n\n")[2]
    following = TEXT[TEXT.index(line) :].partition("\n  -")[0]
    assert "Not supported yet" in section or "not yet" in following


def test_every_option_of_nbdclient_is_documented() -> None:
    (subcommands,) = [a for a in parser()._actions if isinstance(a, argparse._SubParsersAction)]
    for command, subparser in subcommands.choices.items():
        assert f"## nbdclient {command}" in CLIENT
        for action in subparser._actions:
            for option in action.option_strings:
                if option.startswith("--") and option != "--help":
                    assert option in CLIENT, f"{command} {option} is missing in docs/nbdclient.md"


def test_every_driver_has_its_page() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs/drivers").glob("*.md"))
    for name in ROWS:
        if name != "memory":  # a test aid
            assert re.search(rf"\b{name}\b", pages), f"the driver {name} has no page"


def test_every_option_of_qcow2_is_documented() -> None:
    page = (ROOT / "docs/drivers/qcow2.md").read_text()
    source = (ROOT / "drivers/format/qcow2/options.py").read_text()
    taken = set(re.findall(r"options\.(?:boolean|size|integer|string|reference)\(\"([^\"]+)\"", source))
    assert len(taken) > 10
    for name in taken | set(OVERLAP_CHECKS):
        assert f"`{name}`" in page, f"the option {name} is missing in docs/drivers/qcow2.md"
    for option in CREATE_OPTIONS:
        shown = "encrypt.*" if option.name.startswith("encrypt.") else option.name
        assert f"`{shown}`" in page, f"the option {option.name} is missing in docs/drivers/qcow2.md"


def test_every_trace_event_is_made_somewhere() -> None:
    source = "\n".join(
        path.read_text() for path in (ROOT / "nbdserve").rglob("*.py") if path.name != "trace.py"
    )
    for event in EVENTS:
        assert f'"{event}"' in source, f"nobody traces {event}"


@pytest.mark.parametrize("page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=str)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("command", ["nbdserve", "nbdclient"])
def test_version_needs_nothing_heavy(command: str) -> None:
    """It answers in well under 0.1 s because trio, structlog and cryptography stay where they are."""
    script = (
        f"import sys; sys.argv = ['{command}', '--version']\n"
        f"from {command}.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'trio', 'structlog', 'cryptography', 'OpenSSL', 'rich', 'ssl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{command} ")


def test_every_peer_that_a_test_needs_has_its_package() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("*.py"))
    for marks in re.findall(r"pytest\.mark\.peer\(([^)]*)\)", source):
        for peer in re.findall(r'"([^"]+)"', marks):
            assert peer in PACKAGES, f"tests/conftest.py does not know the package of {peer}"
