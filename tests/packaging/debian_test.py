# SPDX-License-Identifier: Apache-2.0
"""Files of debian/ that run on a machine with devices: prerm, postinst, and what needrestart reads."""
from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.support.killer import found, state
from tests.support.paths import ROOT
from tests.support.versions import Version
from tests.support.whole import MIB, device, run
from zramfs import __version__

# As needrestart reads a file of conf.d, and looks a service up: 0 is "not selected".
LOOK_UP = r"""
our %nrconf = (override_rc => { qr(^dbus) => 0 });
my $file = shift;
eval do { local(@ARGV, $/) = $file; <> };
die "Error parsing $file: $@" if $@;
for my $service (@ARGV) {
    my ($found) = grep { $service =~ /$_/ } keys %{$nrconf{override_rc}};
    print "$service ", defined $found ? $nrconf{override_rc}->{$found} : "selected", "\n";
}
"""


@pytest.mark.requires("perl")
def test_needrestart_selects_no_device() -> None:
    services = ["zramfs@fast.service", "zramfs-swap@zram0.service", "zramfs@a\\x2db.service",
                "zramfs-exporter.service", "dbus.service", "ssh.service"]
    done = run("perl", "-e", LOOK_UP, ROOT / "debian/needrestart.conf", *services)
    assert (done.stdout.splitlines(), done.stderr) == (
        [f"{name} 0" for name in services[:3]] + ["zramfs-exporter.service selected", "dbus.service 0",
                                                  "ssh.service selected"], "")


def with_programs(tmp_path: Path, **programs: str) -> dict[str, str]:
    """An environment in which each of these runs its lines of shell."""
    place = tmp_path / "bin"
    place.mkdir()
    for name, text in programs.items():
        (place / name).write_text(f"#!/bin/sh\n{text}\n")
        (place / name).chmod(0o755)
    return {**os.environ, "PATH": f"{place}:{os.environ['PATH']}"}


@pytest.mark.requires("fuse", "awk")
@pytest.mark.parametrize(("action", "advice"), [
    ("remove", "without the package 'swapoff', then 'umount' of the directory end one"),
    ("upgrade", "the new version takes over those of root at the end, while they are in use"),
])
def test_prerm_lists_the_devices_that_serve_and_stops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, advice: str
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    environment = with_programs(tmp_path, py3clean="echo py3clean $*")

    def prerm() -> str:
        return run("sh", ROOT / "debian/zramfs.prerm", action, env=environment).stdout

    name = f"of-prerm-{os.getpid()}"  # another run on this machine may have one
    with device(tmp_path / "device", MIB, "--name", name) as made:
        said = prerm()
        assert f"  {name} on {made.directory}\n" in said and advice in said
        assert said.endswith("py3clean -p zramfs\n")
        assert made.read("zram/initstate") == "1\n"
    assert str(tmp_path) not in prerm()


@pytest.mark.requires("fuse", "awk", "root")
def test_postinst_of_another_version_has_it_take_over_what_it_can_and_never_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    other = Version.copy(tmp_path / "other")
    command = shlex.join(other.words())
    environment = with_programs(
        tmp_path, py3compile="exit 0", systemctl="exit 0", zramfs=f'exec {command} "$@"')

    def postinst(*words: str) -> subprocess.CompletedProcess[str]:
        return run("sh", ROOT / "debian/zramfs.postinst", "configure", *words, env=environment)

    with device(tmp_path / "a", MIB) as a, device(tmp_path / "b", MIB) as b:
        before = state(b.directory).pid
        assert postinst("").stdout == "", "an installation"
        assert state(b.directory).pid == before
        found(a.directory).update(layouts={})
        done = postinst(__version__)
        assert f"{a.directory}: not upgraded: " in done.stderr
        assert f"{b.directory}: {__version__} (pid {before}) -> {other.release}" in done.stdout
        assert "what is named above goes on with the code that it was started with" in done.stdout
        assert (state(a.directory).release, state(b.directory).release) == (__version__, other.release)
