# SPDX-License-Identifier: Apache-2.0
"""Files of debian/ that run on a machine with devices: prerm, and what needrestart reads."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.whole import MIB, device, run

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


@pytest.mark.requires("fuse", "awk")
@pytest.mark.parametrize(("action", "advice"), [
    ("remove", "without the package 'swapoff', then 'umount' of the directory end one"),
    ("upgrade", "one that is stopped and made again runs the new code"),
])
def test_prerm_lists_the_devices_that_serve_and_stops_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, action: str, advice: str
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    program = tmp_path / "bin/py3clean"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho py3clean $*\n")
    program.chmod(0o755)
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}

    def prerm() -> str:
        return run("sh", ROOT / "debian/zramfs.prerm", action, env=environment).stdout

    name = f"of-prerm-{os.getpid()}"  # another run on this machine may have one
    with device(tmp_path / "device", MIB, "--name", name) as made:
        said = prerm()
        assert f"  {name} on {made.directory}\n" in said and advice in said
        assert said.endswith("py3clean -p zramfs\n")
        assert made.read("zram/initstate") == "1\n"
    assert name not in prerm()
