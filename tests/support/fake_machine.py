# SPDX-License-Identifier: Apache-2.0
"""A machine made of files, for the tests of the doctor."""
from __future__ import annotations

from pathlib import Path

from zramfs.doctor.checks import Finding, examine
from zramfs.host.machine import Machine

ALL_RIGHTS, NO_RIGHTS = "000001ffffffffff", "0000000000000000"
LIMITS = """Limit  Soft Limit  Hard Limit  Units
Max locked memory  {lock}  8388608  bytes
Max open files  {files}  20000  files"""
FUSERMOUNT = "#!/bin/sh\necho 'fusermount3 version: 3.14.0'\n"


def status(uid: int = 0, rights: str = ALL_RIGHTS, no_new: int = 0) -> str:
    return f"Name:\tzramfs\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\nCapEff:\t{rights}\nNoNewPrivs:\t{no_new}"


class Fake:
    """A machine on which all is well for root, in a directory; tests then take something away."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("/proc/self/status", status())
        self.write("/proc/self/limits", LIMITS.format(lock="unlimited", files=1024))
        self.write("/proc/self/uid_map", "         0          0 4294967295")
        self.write("/proc/sys/kernel/osrelease", "6.12.1-amd64")
        self.write("/proc/sys/vm/overcommit_memory", "0")
        self.write("/proc/sys/fs/fuse/default_request_timeout", "0")
        self.write("/proc/filesystems", "nodev\tsysfs\n\text4\n\txfs\n\tbtrfs")
        self.write("/proc/swaps", "Filename")
        self.write("/proc/mounts", "fusectl /sys/fs/fuse/connections fusectl rw 0 0")
        self.write("/etc/fuse.conf", "# of the machine\nuser_allow_other")
        self.write("/run/systemd/system/x", "")
        self.write("/lib/systemd/system-generators/zramfs-generator", "")
        self.write("/usr/bin/fusermount3", FUSERMOUNT, 0o4755)
        self.write("/usr/bin/apt-get", "", 0o755)
        for name in ("losetup", "mkswap", "swapon", "swapoff", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"):
            self.write(f"/usr/sbin/{name}", "#!/bin/sh\n", 0o755)
        # Devices that anybody may open; the machine's own loop control answers what is asked of it.
        self.link("/dev/fuse", "/dev/null")
        self.link("/dev/loop-control", "/dev/loop-control")
        for place in Path("/dev").glob("loop[0-9]*"):
            self.link(str(place), str(place))

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
        file.chmod(mode)

    def link(self, path: str, target: str) -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
        file.symlink_to(target)

    def remove(self, path: str) -> None:
        (self.root / path.lstrip("/")).unlink()

    def finding(self, name: str) -> Finding:
        [found] = [each for each in examine(self.machine) if each.name == name]
        return found

    @property
    def machine(self) -> Machine:
        return Machine(self.root)
