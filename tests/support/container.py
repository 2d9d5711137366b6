# SPDX-License-Identifier: Apache-2.0
"""A systemd of the test's own, in namespaces, on a copy-on-write view of this machine's files.

It has zramfs's units and generator as a package would install them. Of this machine's units it has only the
targets, the journal and the way to power off: no other service, generator or setting of the machine takes
part, and neither does its /etc/zramfs or its udev. What it does to files stays in a tmpfs, except in the
test's own directory. Its network and cgroups are its own, and of /proc/sys it can change vm only, which swap
needs. Units with DefaultDependencies would need the whole of a boot (tmpfiles, sysctl, ...): give it none.
"""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.support import leftovers
from tests.support.apart import LET_GO
from tests.support.commands import installed_program
from tests.support.paths import ROOT
from tests.support.whole import tool_environment, wait_until

SOURCES = ROOT / "systemd"

# Runs inside the namespaces, as process 1. $1 is the directory of the test, $2 the checkout, which may lie in
# /tmp or on a file system of its own, $3 the name of this run.
_START = r"""
set -e
mount --make-rprivate /
owner=$3
LET_GO
mkdir "$1/machine"
mount -t tmpfs -o mode=755 tmpfs "$1/machine"
cd "$1/machine"
mkdir upper work root
mount -t overlay -o lowerdir=/,upperdir=upper,workdir=work overlay root
mount -t proc proc root/proc
mount -t sysfs sysfs root/sys
mount --rbind /dev root/dev
mkdir units
cp -P root/lib/systemd/system/*.target root/lib/systemd/system/systemd-journald* \
    root/lib/systemd/system/systemd-poweroff.service units
for directory in run mnt tmp var/tmp etc/systemd lib/systemd/system lib/systemd/system-generators; do
    mount -t tmpfs -o mode=755 tmpfs "root/$directory"
done
cp -P units/* root/lib/systemd/system
rm -rf root/etc/zramfs root/usr/local/lib/systemd root/lib/systemd/*.conf.d
mkdir -p "root$2"
mount --bind "$2" "root$2"
mount -o remount,bind,ro "root$2"
mkdir -p "root$1"
mount --bind "$1" "root$1"

mount -t tmpfs -o mode=755 tmpfs root/sys/fs/cgroup
while IFS=: read -r number controllers path; do
    case $number:$controllers in
        0:*) place=unified options="-t cgroup2 cgroup2" ;;
        *:name=*) place=${controllers#name=} options="-t cgroup -o none,$controllers cgroup" ;;
        *:*cpuset*) continue ;;
        *) place=$controllers options="-t cgroup -o $controllers cgroup" ;;
    esac
    mkdir "root/sys/fs/cgroup/$place"
    mount $options "root/sys/fs/cgroup/$place"
done </proc/self/cgroup
if [ "$(ls root/sys/fs/cgroup)" = unified ]; then
    umount root/sys/fs/cgroup/unified root/sys/fs/cgroup
    mount -t cgroup2 cgroup2 root/sys/fs/cgroup
fi

mkdir root/run/vm
mount --bind root/proc/sys/vm root/run/vm
mount --bind root/proc/sys root/proc/sys
mount -o remount,bind,ro root/proc/sys
mount --move root/run/vm root/proc/sys/vm

: >root/etc/fstab
mkdir -p root/run/systemd/system
cp -r "$1/units/." root/run/systemd/system
cp "$1/zramfs-generator" root/lib/systemd/system-generators/
cp -r "$1/zramfs" root/etc/zramfs
cd root
mkdir run/old
pivot_root . run/old
umount -l /run/old
umask 022
export container=zramfs-test
exec /lib/systemd/systemd --system --unit=test.target --log-target=null --show-status=no
"""

_NAMESPACES = "--pid --mount --uts --ipc --net --cgroup"

_TARGET = """
[Unit]
DefaultDependencies=no
Requires=systemd-journald.service
Wants=local-fs.target swap.target
After=local-fs.target swap.target
"""


class Container:
    def __init__(self, process: subprocess.Popen) -> None:
        self.process = process
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: process.poll() is not None or children.read_text().strip(), "systemd runs")
        assert process.poll() is None, "the container ended at once: see the file console"
        self.pid = int(children.read_text().split()[0])

    def run(self, *words: str, check: bool = True) -> str:
        """Inside, with what it says."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", "-u", "-i", "-n", "-C", "--", *words], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=99, env=tool_environment(), check=False,
        )
        assert not check or done.returncode == 0, done.stdout
        return done.stdout

    def state(self, unit: str) -> str:
        return self.run("systemctl", "show", "--property=ActiveState", "--value", unit, check=False).strip()

    def power_off(self) -> None:
        """As the machine's button: systemd stops everything in order."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGRTMIN + 4)
            self.process.wait(100)


@contextlib.contextmanager
def booted(place: Path, configuration: dict[str, str], units: dict[str, str]) -> Iterator[Container]:
    """Boots with these files in /etc/zramfs and these further units; powers off at the end."""
    program = installed_program(place)
    for directory, files in (("zramfs", configuration), ("units", {**units, "test.target": _TARGET})):
        for name, text in files.items():
            file = place / directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    # Where the sweeper of the tests finds what a killed run leaves.
    run = f"[Service]\nEnvironment=ZRAMFS_RUN_DIR={place}/run\n"
    for unit in SOURCES.glob("*.service"):
        (place / "units" / f"{unit.name}.d").mkdir(exist_ok=True)
        (place / "units" / f"{unit.name}.d" / "run.conf").write_text(run)
        (place / "units" / unit.name).write_text(unit.read_text().replace("/usr/bin/zramfs", str(program)))
    for timer in SOURCES.glob("*.timer"):
        (place / "units" / timer.name).write_text(timer.read_text())
    generator = place / "zramfs-generator"
    generator.write_text((SOURCES / generator.name).read_text().replace("/usr/bin/zramfs", str(program)))
    generator.chmod(0o755)
    (place / "start").write_text(_START.replace("LET_GO\n", LET_GO))
    with _cgroups(place.name) as groups:
        join = "".join(f"echo $$ >{group}/cgroup.procs; " for group in groups)
        with open(place / "console", "w") as console:
            process = subprocess.Popen(
                ["sh", "-c", f'{join}exec unshare {_NAMESPACES} --fork --kill-child sh "$@"',
                 "sh", str(place / "start"), str(place), str(ROOT), leftovers.owner_name()],
                stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
                env={"PATH": os.environ["PATH"]},
            )
        container = None
        try:
            container = Container(process)
            wait_until(lambda: container.state("test.target") == "active", "the container is up", 60)
            yield container
        finally:
            try:
                if container is not None:
                    container.power_off()
            finally:
                process.kill()
                process.wait()


@contextlib.contextmanager
def _cgroups(name: str) -> Iterator[list[Path]]:
    """A new group in each hierarchy."""
    groups = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields = line.split(" - ")
        # A new group of cpuset (v1) takes nobody in until it has CPUs; systemd does not need it.
        if fields[1].split()[0] in ("cgroup", "cgroup2") and "cpuset" not in fields[1].split(" ", 2)[2]:
            groups.append(Path(fields[0].split()[4]) / f"zramfs-{name}")
    made = []
    try:
        for group in groups:
            with contextlib.suppress(FileExistsError):
                group.mkdir()
                made.append(group)
        yield made
    finally:
        for group in made:
            for path in sorted(group.rglob("*"), reverse=True):
                if path.is_dir():
                    path.rmdir()
            group.rmdir()
