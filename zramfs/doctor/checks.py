# SPDX-License-Identifier: Apache-2.0
"""What on this machine stands in the way of devices, and of what is built on them."""
from __future__ import annotations

import fcntl
import importlib.util
import os
import re
import stat
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from zramfs import __version__
from zramfs.configuration import settings
from zramfs.doctor.dead_mounts import dead_mounts
from zramfs.host import loops, memcg, mounts, safety
from zramfs.host.machine import CAPABILITIES, Machine
from zramfs.lifecycle import ramdisk, rundir
from zramfs.model.kernel_pages import other_pages
from zramfs.text.sizes import format_size

State = Literal["ok", "degraded", "missing"]
# state, what was found, what to do ("" if nothing has to be done)
Verdict = tuple[State, str, str]

_LOOP_CTL_GET_FREE = 0x4C82
# A daemon with 64 threads had 2.3 MiB locked a thread with zstd, and 22 descriptors.
_LOCKED = 5 << 20
_OPEN_FILES = 64
_PROGRAM_TIMEOUT = 5.0
_BECOME_ROOT = "become root (sudo), outside a container"


@dataclass(frozen=True)
class Finding:
    """needed_for: what suffers if the state is not "ok". essential: without it there are no devices."""

    name: str
    state: State
    found: str
    needed_for: str
    advice: str
    essential: bool


@dataclass(frozen=True)
class _Check:
    name: str
    needed_for: str
    look: Callable[[Machine], Verdict]
    essential: bool = False


def examine(machine: Machine, trial: Callable[[], Verdict] | None = None) -> list[Finding]:
    """All findings, what devices need first. trial makes a device and takes it down; it is only
    called when nothing else stands in the way."""
    findings = []
    for check in CHECKS:
        findings.append(_finding(check, machine))
        if check.look is _swap and findings[-1].state == "ok":
            findings += [_swap_setting(setting) for setting in safety.SETTINGS]
    if trial is not None:
        if able(findings):
            verdict = trial()
        else:
            verdict = "missing", "not tried, because of what is missing above", "see above"
        last = max(i for i, finding in enumerate(findings) if finding.essential)
        findings.insert(last + 1, Finding("a device", verdict[0], verdict[1], "everything", verdict[2], True))
    return findings


def able(findings: list[Finding]) -> bool:
    """True if devices can be made, by these findings."""
    return not any(finding.essential and finding.state == "missing" for finding in findings)


def _finding(check: _Check, machine: Machine) -> Finding:
    state, found, advice = check.look(machine)
    return Finding(check.name, state, found, check.needed_for, advice, check.essential)


# ---- what every device needs ----------------------------------------------------------------------
def _fuse(machine: Machine) -> Verdict:
    if not machine.has("/dev/fuse"):
        do = "modprobe fuse, as root; in a container: start it with --device /dev/fuse"
        return "missing", "there is no /dev/fuse", do
    if reason := machine.may_open_device("/dev/fuse"):
        mode = stat.S_IMODE(machine.at("/dev/fuse").stat().st_mode)
        if machine.uid != 0:
            do = "as root: chmod 0666 /dev/fuse (udev does that), or become a member of its group"
        else:
            do = "a container must be started with --device /dev/fuse, a service with DeviceAllow=/dev/fuse"
        return "missing", f"/dev/fuse (mode {mode:04o}) cannot be opened: {reason}", do
    return "ok", "/dev/fuse can be opened", ""


def _fusermount(machine: Machine) -> Verdict:
    """Root mounts by itself; then only devices of others suffer."""
    state: State = "degraded" if machine.uid == 0 else "missing"
    program = machine.program("fusermount3")
    if program is None:
        return state, "fusermount3 is not installed", machine.install("fuse3")
    seen = program.stat()
    version = _version(program)
    if version is None:
        return state, f"{program} does not run", machine.install("fuse3", again=True)
    if machine.uid != 0:
        if not seen.st_mode & stat.S_ISUID or seen.st_uid != 0:
            found = f"{program} is not set-user-ID root"
            return "missing", found, f"as root: chown root {program} && chmod 4755 {program}"
        if not machine.gains_rights:
            found = "this process may gain no rights (NoNewPrivs), so fusermount3 stays without those of root"
            return "missing", found, "start it without NoNewPrivileges= or --security-opt no-new-privileges"
        if os.statvfs(program).f_flag & os.ST_NOSUID:
            found = f"{program} is on a file system that is mounted nosuid"
            return "missing", found, f"as root: mount -o remount,suid the file system of {program}"
    return "ok", f"{program}, version {version}", ""


def _version(program: Path) -> str | None:
    try:
        done = subprocess.run(
            [program, "--version"], capture_output=True, text=True, errors="replace",
            stdin=subprocess.DEVNULL, timeout=_PROGRAM_TIMEOUT, check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", done.stdout)
    return found[0] if found and done.returncode == 0 else None


def _kernel(machine: Machine) -> Verdict:
    release = machine.text("/proc/sys/kernel/osrelease") or "unknown"
    found = f"Linux {release}"
    if wrong := other_pages():
        return "missing", f"{found}: {wrong}", "a kernel with pages of 4 KiB"
    # The latest call that there is no way around: madvise(MADV_POPULATE_WRITE), of `zramfs swap`.
    if machine.kernel < (5, 14):
        return "missing", found, "a kernel of 5.14 or later; 6.9 or later is best"
    if machine.kernel < (6, 6):
        return "degraded", f"{found}: no shared mmap of disk", "a kernel of 6.6 or later"
    if machine.kernel < (6, 9):
        return "degraded", f"{found}: a device ends with its daemon", "a kernel of 6.9 or later"
    return "ok", found, ""


def _run_directory(machine: Machine) -> Verdict:
    base = rundir.bases()[0]
    place = machine.at(base)
    if os.path.exists(place) and (trouble := rundir.trouble(place, private=os.getuid() != 0)):
        return "missing", f"{base}: {trouble}", f"remove {base}, or name another place in ZRAMFS_RUN_DIR"
    there = next(each for each in (place, *place.parents) if os.path.exists(each))
    if not os.access(there, os.W_OK | os.X_OK):
        return "missing", f"{base} cannot be made: no right to write to {there}", "set ZRAMFS_RUN_DIR"
    room = os.statvfs(there)
    # A file system that counts no inodes says 0 of 0.
    if room.f_bavail == 0 or (room.f_files and room.f_favail == 0):
        found = f"the file system of {base} is full"
        return "missing", found, f"make room in {there}, or name another place in ZRAMFS_RUN_DIR"
    return "ok", f"{base} can be used", ""


# ---- what some of them need -----------------------------------------------------------------------
def _fuse_conf(machine: Machine) -> Verdict:
    lines = [line.split("#")[0].strip() for line in (machine.text("/etc/fuse.conf") or "").splitlines()]
    if machine.uid == 0:
        return "ok", "root needs no line in /etc/fuse.conf", ""
    limits = [int(match[1]) for line in lines if (match := re.fullmatch(r"mount_max = (\d+)", line))]
    most = limits[0] if limits else 1000
    # Two mounts a device, and fusermount3 counts those of all users.
    table = (machine.text("/proc/mounts") or "").splitlines()
    mounts = sum(line.split()[2].startswith("fuse") for line in table)
    if mounts + 2 > most:
        found = f"{mounts} FUSE mounts are there, and mount_max in /etc/fuse.conf is {most}"
        return "degraded", found, "raise mount_max in /etc/fuse.conf, or stop a device"
    if "user_allow_other" not in lines:
        found = "user_allow_other is not in /etc/fuse.conf"
        return "degraded", found, "as root: echo user_allow_other >> /etc/fuse.conf"
    return "ok", "user_allow_other is in /etc/fuse.conf", ""


def _connections(machine: Machine) -> Verdict:
    if "/sys/fs/fuse/connections fusectl " in (machine.text("/proc/mounts") or ""):
        return "ok", "/sys/fs/fuse/connections is mounted", ""
    found = "/sys/fs/fuse/connections is not mounted"
    return "degraded", found, "as root: mount -t fusectl fusectl /sys/fs/fuse/connections"


def _request_timeout(machine: Machine) -> Verdict:
    names = ("default_request_timeout", "max_request_timeout")
    on = [name for name in names if machine.number(f"/proc/sys/fs/fuse/{name}")]
    if not on:
        return "ok", "requests have no time limit", ""
    found = f"the kernel aborts connections that are slow: fs.fuse.{on[0]} is not 0"
    return "degraded", found, "; ".join(f"sysctl fs.fuse.{name}=0" for name in on)


def _loops(machine: Machine) -> Verdict:
    if machine.uid != 0 or not machine.capable("CAP_SYS_ADMIN"):
        return "missing", "loop devices need root and CAP_SYS_ADMIN", _BECOME_ROOT
    if machine.program("losetup") is None:
        return "missing", "losetup is not installed", machine.install("mount")
    if not machine.has("/dev/loop-control"):
        do = "modprobe loop; in a container: --device /dev/loop-control and /dev/loopN"
        return "missing", "there is no /dev/loop-control", do
    try:
        control = os.open(machine.at("/dev/loop-control"), os.O_RDWR | os.O_CLOEXEC)
        try:
            number = fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
        finally:
            os.close(control)
    except OSError as error:
        found = f"/dev/loop-control gives no device: {error.strerror}"
        return "missing", found, "detach one (losetup -l), or raise the module's max_loop"
    if not machine.has(f"/dev/loop{number}"):
        found = f"/dev/loop{number}, the next free device, has no node"
        return "degraded", found, f"mknod /dev/loop{number} b 7 {number} (udev or devtmpfs does that)"
    return "ok", f"/dev/loop{number} is free", ""


def _file_systems(machine: Machine) -> Verdict:
    have = [fs for fs in ramdisk.MKFS if machine.program(f"mkfs.{fs}")]
    lack = [fs for fs in ramdisk.MKFS if fs not in have]
    do = machine.install(*(ramdisk.PACKAGE[fs] for fs in lack))
    if not have:
        return "missing", f"no mkfs of {', '.join(lack)}", do
    modules = machine.at(f"/lib/modules/{machine.text('/proc/sys/kernel/osrelease')}")
    unknown = [fs for fs in have if fs not in machine.file_systems() and not modules.is_dir()]
    if unknown:
        found = f"this kernel does not know {', '.join(unknown)}, and has no modules"
        return ("missing" if unknown == have else "degraded"), found, "a kernel with them"
    if lack:
        return "degraded", f"mkfs of {', '.join(have)}, not of {', '.join(lack)}", do
    return "ok", f"mkfs of {', '.join(have)}", ""


def _swap(machine: Machine) -> Verdict:
    if machine.text("/proc/swaps") is None:
        return "missing", "this kernel has no swap", "a kernel with CONFIG_SWAP"
    lack = [name for name in ("mkswap", "swapon", "swapoff") if machine.program(name) is None]
    if lack:
        return "missing", f"{', '.join(lack)} not installed", machine.install("util-linux", "mount")
    if machine.uid != 0 or not machine.capable("CAP_SYS_ADMIN") or machine.in_user_namespace():
        return "missing", "swapon needs root and CAP_SYS_ADMIN", _BECOME_ROOT
    return "ok", "mkswap, swapon and swapoff can be used", ""


def _swap_setting(setting: safety.Setting) -> Finding:
    """What `zramfs swap` would find, and refuse to go on without."""
    refusal = setting.probe()
    state: State = "ok" if refusal is None else "missing" if setting.needed else "degraded"
    found = "can be set" if refusal is None else refusal
    do = "" if refusal is None else "change that, or go on without: zramfs swap --force"
    if refusal is not None and not setting.needed:
        do = "change that; zramfs swap goes on without"
    return Finding(f"swap: {setting.name}", state, found, f"swap; without it {setting.lost}", do, False)


def _disk_swap(machine: Machine) -> Verdict:
    """Where the memory of a device that is not locked could be written to in clear."""
    clear = []
    for line in (machine.text("/proc/swaps") or "").splitlines()[1:]:
        path = mounts.unescape(line.split()[0])
        block = f"/sys/block/{path.removeprefix('/dev/')}"
        backing = machine.text(f"{block}/loop/backing_file") or ""
        in_memory = path.startswith("/dev/zram") or any(
            mount.fstype == "fuse.zramfs-disk" and str(mount.mountpoint) == backing
            for mount in mounts.mounts())
        # dm-crypt, whatever set it up.
        if not in_memory and not (machine.text(f"{block}/dm/uuid") or "").startswith("CRYPT-"):
            clear.append(path)
    if not clear:
        return "ok", "no swap on a disk that is not encrypted", ""
    found = f"what devices hold can be swapped out to {', '.join(clear)}, and read there later"
    return "degraded", found, "make devices with secrets with --lock, or encrypt the swap"


def _capabilities(machine: Machine) -> Verdict:
    if machine.uid != 0:
        return "ok", "an ordinary user has none, and needs none for devices", ""
    lack = [name for name in CAPABILITIES if not machine.capable(name)]
    if lack:
        do = "give them to the container (--cap-add) or the service (CapabilityBoundingSet=)"
        return "degraded", f"root here is without {', '.join(lack)}", do
    return "ok", f"{', '.join(CAPABILITIES)} are there", ""


def _locked_memory(machine: Machine) -> Verdict:
    limit = machine.limit("Max locked memory")
    if limit is None or machine.capable("CAP_IPC_LOCK"):
        return "ok", "no limit on locked memory", ""
    found = f"{format_size(limit)} of memory may be locked (RLIMIT_MEMLOCK)"
    if limit < _LOCKED:
        do = f"ulimit -l {_LOCKED >> 10}, LimitMEMLOCK= in a unit, memlock in /etc/security/limits.conf"
        return "degraded", f"only {found}", do
    return "ok", found, ""


def _open_files(machine: Machine) -> Verdict:
    limit = machine.limit("Max open files")
    if limit is not None and limit < _OPEN_FILES:
        found = f"only {limit} files may be open (RLIMIT_NOFILE)"
        return "degraded", found, f"ulimit -n {_OPEN_FILES} or more"
    return "ok", f"{limit or 'any number of'} files may be open", ""


def _memory_group(_machine: Machine) -> Verdict:
    hierarchy = memcg.hierarchy()
    if hierarchy is None or (group := hierarchy.limited()) is None:
        return "ok", "no memory cgroup limits this process", ""
    found = f"devices made from here share a limit of {format_size(hierarchy.limit(group) or 0)} ({group})"
    if hierarchy.may_leave():
        return "ok", f"{found}, which they leave", ""
    return "degraded", found, "make them outside that cgroup: as a service, or with systemd-run"


def _overcommit(machine: Machine) -> Verdict:
    if machine.number("/proc/sys/vm/overcommit_memory") != 2:
        return "ok", "memory is overcommitted (vm.overcommit_memory is not 2)", ""
    found = "vm.overcommit_memory is 2: pages are refused at CommitLimit, even where memory is free"
    return "degraded", found, "sysctl vm.overcommit_memory=0, or raise vm.overcommit_ratio"


def _leftovers(_machine: Machine) -> Verdict:
    found, do, known = [], [], set()
    for each in rundir.rundirs():
        state = each.read()
        known |= {Path(place) for place in (state.places() | {state.disk} if state else [each.disk])}
        if state is None or not state.alive():
            place = (state.mountpoint or state.directory) if state else each.name
            stale = loops.find(each.disk)
            found.append(f"{place} ({', '.join(stale)} on it)" if stale else place)
            do.append(f"zramfs stop {place}")
    for mount in dead_mounts():
        if mount not in known:
            found.append(str(mount))
            do.append(f"fusermount3 -u {mount}")
    if not found:
        return "ok", "no device of a daemon that has died", ""
    return "degraded", f"daemons have died, and left {', '.join(found)}", "; ".join(do)


def _versions(_machine: Machine) -> Verdict:
    old = [(state.where, release) for each in rundir.rundirs()
           if (state := each.read()) and state.alive() and (release := state.other_release())]
    if not old:
        return "ok", f"no device is served by another version than {__version__}", ""
    found = ", ".join(f"{where} by {release}" for where, release in old)
    do = f"zramfs upgrade {' '.join(where for where, _ in old)}, which may be in use meanwhile"
    return "degraded", f"{__version__} is installed, and serves not all: {found}", do


def _security(machine: Machine) -> Verdict:
    if machine.text("/sys/fs/selinux/enforce") == "1":
        do = "if something is refused: ausearch -m avc -ts recent, then audit2allow"
        return "degraded", "SELinux is enforcing, and has no rules for zramfs", do
    profiles = (machine.text("/sys/kernel/security/apparmor/profiles") or "").splitlines()
    if any(re.fullmatch(r"\S*fusermount3 \(enforce\)", line) for line in profiles):
        do = "use a directory in your home, /mnt, /media, /tmp or /run/user; dmesg says what was refused"
        return "degraded", "AppArmor confines fusermount3 to some mount points", do
    return "ok", "neither SELinux nor AppArmor confines fusermount3", ""


def _container(machine: Machine) -> Verdict:
    if machine.in_user_namespace():
        do = "make it outside; devices themselves work in here"
        return "degraded", "this is a user namespace: no loop devices, no swap", do
    kind = machine.text("/run/systemd/container")
    if kind is None and machine.has("/.dockerenv"):
        kind = "docker"
    if kind is None and machine.has("/run/.containerenv"):
        kind = "podman"
    if kind is None:
        return "ok", "not in a container that shows itself", ""
    do = "--device /dev/fuse --cap-add SYS_ADMIN; for RAM disks and swap the loop devices too"
    return "degraded", f"in a container ({kind}): devices end with it", do


def _configuration(machine: Machine) -> Verdict:
    configuration = settings.load_configuration(machine.root)
    complaints = [*configuration.complaints]
    for device in configuration.devices.values():
        complaints += device.complaints
    wrong = [complaint for complaint in complaints if complaint.is_error]
    if wrong:
        return "degraded", f"in /etc/zramfs something is wrong: {wrong[0]}", "zramfs check-config says it all"
    if not configuration.devices:
        return "ok", "no device is configured in /etc/zramfs", ""
    return "ok", f"configured in /etc/zramfs: {', '.join(configuration.devices)}", ""


def _systemd(machine: Machine) -> Verdict:
    if not machine.has("/run/systemd/system"):
        do = "let what starts the machine call zramfs up, and zramfs down at its end"
        return "degraded", "systemd does not run here", do
    places = [f"{top}/systemd/system-generators/zramfs-generator" for top in ("/etc", "/lib", "/usr/lib")]
    if not any(machine.has(place) for place in places):
        do = "install the Debian package, or the files in systemd/ as they say (docs/packaging.md)"
        return "degraded", "systemd has no zramfs-generator", do
    return "ok", "systemd has the zramfs-generator", ""


def _report(machine: Machine) -> Verdict:
    return _package(machine, "matplotlib", "report")


def _train(machine: Machine) -> Verdict:
    return _package(machine, "zstandard", "train")


def _package(machine: Machine, name: str, extra: str) -> Verdict:
    if importlib.util.find_spec(name) is None:
        do = (f"{machine.install(f'python3-{name}')}, or pip install 'zramfs[{extra}]' where pip installed "
              "zramfs")
        return "degraded", f"the Python package {name} is not installed", do
    return "ok", f"{name} is installed", ""


CHECKS = (
    _Check("FUSE device", "every device", _fuse, essential=True),
    _Check("fusermount3", "every device of an ordinary user", _fusermount, essential=True),
    _Check("kernel", "devices, shared mmap of disk, and devices that outlive their daemon", _kernel,
           essential=True),
    _Check("run directory", "every device", _run_directory, essential=True),
    _Check("fuse.conf", "--allow-other of ordinary users", _fuse_conf),
    _Check("fusectl", "abort, the way out when a device hangs", _connections),
    _Check("request timeout", "devices under load", _request_timeout),
    _Check("loop devices", "RAM disks, swap", _loops),
    _Check("file systems", "RAM disks", _file_systems),
    _Check("swap", "swap", _swap),
    _Check("swap on disks", "secrets on plain devices and RAM disks", _disk_swap),
    _Check("capabilities", "RAM disks, swap", _capabilities),
    _Check("locked memory", "swap; devices when memory is short", _locked_memory),
    _Check("open files", "every device", _open_files),
    _Check("memory cgroup", "devices larger than its limit, swap", _memory_group),
    _Check("overcommit", "devices that fill up", _overcommit),
    _Check("leftovers", "the directories they had", _leftovers),
    _Check("versions", "what a later version has mended", _versions),
    _Check("security module", "devices in some places", _security),
    _Check("container", "RAM disks, swap", _container),
    _Check("configuration", "devices at boot", _configuration),
    _Check("boot", "devices at boot", _systemd),
    _Check("pictures", "zramfs report", _report),
    _Check("dictionaries", "zramfs train", _train),
)
