"""Real peers are part of the test suite: tests name the programs they need with
@pytest.mark.peer(...). Where one is missing the test is skipped and a closing line says what to
install; with REQUIRE_PEERS=1 in the environment it fails instead.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys

import pytest

# Where the distribution keeps python3-libnbd; its module loads into any Python of that version.
DISTRIBUTION_MODULES = "/usr/lib/python3/dist-packages"

# Program (or "module:NAME") to Debian/Ubuntu package.
PACKAGES = {
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "qemu-nbd": "qemu-utils",
    "qemu-storage-daemon": "qemu-system-common",
    "nbdkit": "nbdkit",
    "nbdinfo": "libnbd-bin",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbd-client": "nbd-client",
    "nbd-server": "nbd-server",
    "fio": "fio",
    "cryptsetup": "cryptsetup-bin",
    "losetup": "mount",
    "systemd-socket-activate": "systemd",
    "module:nbd": "python3-libnbd",
}


def _present(peer: str) -> bool:
    if peer.startswith("module:"):
        return _find_module(peer.removeprefix("module:"))
    return shutil.which(peer, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is not None


def _find_module(name: str) -> bool:
    if DISTRIBUTION_MODULES not in sys.path:
        sys.path.append(DISTRIBUTION_MODULES)
    try:
        return importlib.util.find_spec(name) is not None and bool(importlib.import_module(name))
    except ImportError:
        return False


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark in item.iter_markers("peer"):
        for peer in mark.args:
            if _present(peer):
                continue
            package = PACKAGES[peer]
            if os.environ.get("REQUIRE_PEERS") == "1":
                pytest.fail(f"{peer} is missing (package {package})")
            pytest.skip(f"needs {peer} (package {package})")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    packages = set()
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if "(package " in reason:
            packages.add(reason.rpartition("(package ")[2].rstrip(")"))
    if packages:
        terminalreporter.write_line(
            "Tests were skipped for want of peers: apt-get install -y " + " ".join(sorted(packages)),
            yellow=True,
        )
