# SPDX-License-Identifier: Apache-2.0
"""The packages on a Debian that has never seen zramfs.

Only with --clean-room: it takes some minutes, and fetches about 250 MiB from Debian and PyPI.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.packages import BARE, USE, USED, build
from tests.support.whole import run

pytestmark = [
    pytest.mark.clean_room,
    pytest.mark.requires("root", "fuse", "dh", "debootstrap", "unshare"),
    pytest.mark.timeout(1500),
]

MIRROR = "http://deb.debian.org/debian"
# Mounts that only the processes in here see. $1 is the room, $2 what to run there.
ENTER = """
set -e
for place in proc sys dev; do mount --rbind /$place "$1/$place"; done
mount -t tmpfs tmpfs "$1/run"
exec chroot "$1" sh -ec "$2"
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    built = build(tmp_path_factory.mktemp("dist"))
    room = tmp_path_factory.mktemp("room")
    run("debootstrap", "--variant=minbase", release() or "stable", room, MIRROR, timeout=600)
    shutil.copy("/etc/resolv.conf", room / "etc/resolv.conf")
    shutil.copytree("/etc/apt/apt.conf.d", room / "etc/apt/apt.conf.d", dirs_exist_ok=True)
    for built_file in (built.file("zramfs_*.deb"), built.file("*.tar.gz")):
        shutil.copy(built_file, room / "tmp")
    # The certificates of this machine, which may be behind a proxy of its own.
    if bundle := os.environ.get("PIP_CERT"):
        shutil.copy(bundle, room / "tmp/certificates")
    yield room
    shutil.rmtree(room)


def release() -> str:
    """The release of this machine, whose Python the package is for."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return next((line.partition("=")[2] for line in lines if line.startswith("VERSION_CODENAME=")), "")


def inside(room: Path, script: str) -> list[str]:
    environment = {
        **BARE, "DEBIAN_FRONTEND": "noninteractive", "APT": "apt-get -qq -y --no-install-recommends",
        **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
        **{name: value for name, value in os.environ.items() if name.startswith("ZRAMFS_TEST_")},
    }
    if (room / "tmp/certificates").exists():
        environment |= {"PIP_CERT": "/tmp/certificates", "SSL_CERT_FILE": "/tmp/certificates"}
    words = apart("sh", "-c", ENTER, "sh", room, script)
    return run(*words, env=environment, timeout=700, cwd="/").stdout.splitlines()


def test_apt_installs_the_package_with_what_it_needs(room: Path) -> None:
    said = inside(
        room,
        f"{USE} $APT update >/dev/null 2>&1; $APT install /tmp/zramfs_*.deb >/dev/null 2>&1\n"
        "use zramfs /mnt/z; zramfs doctor | tail -n 1\n"
        "$APT purge zramfs >/dev/null 2>&1; [ ! -e /usr/lib/zramfs ]",
    )
    assert said == [*USED, "Devices can be made here."]


def test_pip_says_what_the_build_lacks_and_then_installs(room: Path) -> None:
    packages = "gcc pkg-config python3-dev libzstd-dev"
    said = inside(
        room,
        f"{USE} $APT install python3-venv fuse3 {packages} >/dev/null 2>&1\n"
        "python3 -m venv /tmp/venv; ! /tmp/venv/bin/pip install -q /tmp/zramfs-*.tar.gz 2>&1\n"
        "$APT install liblz4-dev libfuse3-dev >/dev/null 2>&1\n"
        "/tmp/venv/bin/pip install -q /tmp/zramfs-*.tar.gz >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }\n"
        "echo installed; use /tmp/venv/bin/zramfs /mnt/z",
    )
    at = said.index("installed")
    assert any("zramfs needs liblz4 >= 1.9.0 and its pkg-config file" in line for line in said[:at])
    assert said[at + 1 :] == USED
