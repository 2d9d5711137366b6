# SPDX-License-Identifier: Apache-2.0
"""Every verdict of `zramfs doctor`, on a machine made of files."""
from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.apart import apart
from tests.support.fake_machine import LIMITS, NO_RIGHTS, Fake, status
from tests.support.whole import run
from zramfs.doctor import checks
from zramfs.doctor.checks import CHECKS, Finding, able, examine
from zramfs.host import memcg, mounts, process, safety
from zramfs.host.machine import Machine
from zramfs.lifecycle import rundir


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    # An absolute path is looked for below the fake's root too, and found in neither place.
    monkeypatch.setenv("ZRAMFS_RUN_DIR", "/run/zramfs-of-the-doctor")
    monkeypatch.setattr(memcg, "hierarchy", lambda: None)
    monkeypatch.setattr(mounts, "mounts", lambda: [])
    monkeypatch.setattr(safety, "SETTINGS", ())
    fake = Fake(tmp_path / "root")
    return fake


USER = ("/proc/self/status", status(1000, NO_RIGHTS))
SPARE = [f"/usr/sbin/mkfs.{fs}" for fs in ("ext4", "xfs", "btrfs")]
# What is changed (a path and its text, or a path that goes), then what the doctor has to say.
CASES: dict[str, tuple[list[tuple[str, str] | str], str, str, str, str]] = {
    "no fuse": (["/dev/fuse"], "FUSE device", "missing", "there is no /dev/fuse", "modprobe fuse"),
    "fuse is a file": (
        ["/dev/fuse", ("/dev/fuse", "")],
        "FUSE device",
        "missing",
        "not a character device",
        "--device /dev/fuse",
    ),
    "fuse is a file for a user": (
        ["/dev/fuse", ("/dev/fuse", ""), USER],
        "FUSE device",
        "missing",
        "cannot be opened",
        "chmod 0666 /dev/fuse",
    ),
    "no fusermount3": (
        ["/usr/bin/fusermount3"],
        "fusermount3",
        "degraded",
        "not installed",
        "apt-get install fuse3",
    ),
    "broken fusermount3": (
        [("/usr/bin/fusermount3", "#!/bin/sh\nexit 1")],
        "fusermount3",
        "degraded",
        "does not run",
        "--reinstall",
    ),
    "no new rights": (
        [("/proc/self/status", status(1000, NO_RIGHTS, 1))],
        "fusermount3",
        "missing",
        "NoNewPrivs",
        "NoNewPrivileges=",
    ),
    "no new rights for root": ([("/proc/self/status", status(no_new=1))], "fusermount3", "ok", "3.14.0", ""),
    "kernel 5.10": ([("/proc/sys/kernel/osrelease", "5.10.0-9")], "kernel", "missing", "5.10.0-9", "5.14"),
    "kernel 5.14": ([("/proc/sys/kernel/osrelease", "5.14.0")], "kernel", "degraded", "shared mmap", "6.6"),
    "kernel 6.6": (
        [("/proc/sys/kernel/osrelease", "6.6.1")], "kernel", "degraded", "ends with its daemon", "6.9"),
    "kernel 6.9": ([("/proc/sys/kernel/osrelease", "6.9.1")], "kernel", "ok", "Linux 6.9.1", ""),
    "fuse.conf of others": (
        [("/etc/fuse.conf", "#user_allow_other"), USER],
        "fuse.conf",
        "degraded",
        "user_allow_other is not in",
        "echo",
    ),
    "fuse.conf for root": (["/etc/fuse.conf"], "fuse.conf", "ok", "root needs no line", ""),
    "many mounts": (
        [("/etc/fuse.conf", "mount_max = 2"), ("/proc/mounts", "z /a fuse.zramfs rw 0 0"), USER],
        "fuse.conf",
        "degraded",
        "1 FUSE mounts are there, and mount_max in /etc/fuse.conf is 2",
        "stop a device",
    ),
    "no fusectl": ([("/proc/mounts", "")], "fusectl", "degraded", "not mounted", "mount -t fusectl"),
    "request timeout": (
        [("/proc/sys/fs/fuse/default_request_timeout", "60")],
        "request timeout",
        "degraded",
        "fs.fuse.default_request_timeout is not 0",
        "=0",
    ),
    "loops of a user": ([USER], "loop devices", "missing", "need root", "sudo"),
    "no losetup": (["/usr/sbin/losetup"], "loop devices", "missing", "losetup", "apt-get install mount"),
    "no loop control": (
        ["/dev/loop-control"],
        "loop devices",
        "missing",
        "no /dev/loop-control",
        "modprobe loop",
    ),
    "one mkfs": (
        SPARE[1:],
        "file systems",
        "degraded",
        "mkfs of ext4, not of xfs, btrfs",
        "xfsprogs btrfs-progs",
    ),
    "no mkfs": (SPARE, "file systems", "missing", "no mkfs of ext4, xfs, btrfs", "e2fsprogs"),
    "a kernel without xfs": (
        [("/proc/filesystems", "\text4\n\tbtrfs")],
        "file systems",
        "degraded",
        "does not know xfs",
        "a kernel with",
    ),
    "no swap": (["/proc/swaps"], "swap", "missing", "this kernel has no swap", "CONFIG_SWAP"),
    "no swapon": (["/usr/sbin/swapon"], "swap", "missing", "swapon not installed", "apt-get"),
    "swap of a user": ([USER], "swap", "missing", "needs root", "sudo"),
    "a weak root": (
        [("/proc/self/status", status(rights="000001fffeffffff"))],
        "capabilities",
        "degraded",
        "without CAP_SYS_RESOURCE",
        "--cap-add",
    ),
    "little to lock": (
        [("/proc/self/limits", LIMITS.format(lock=65536, files=1024)), USER],
        "locked memory",
        "degraded",
        "only 64K of memory may be locked",
        "ulimit -l",
    ),
    "little to lock for root": (
        [("/proc/self/limits", LIMITS.format(lock=65536, files=1024))],
        "locked memory",
        "ok",
        "no limit",
        "",
    ),
    "few files": (
        [("/proc/self/limits", LIMITS.format(lock="unlimited", files=16))],
        "open files",
        "degraded",
        "only 16 files",
        "ulimit -n",
    ),
    "strict memory": (
        [("/proc/sys/vm/overcommit_memory", "2")],
        "overcommit",
        "degraded",
        "CommitLimit",
        "vm.overcommit_ratio",
    ),
    "SELinux": (
        [("/sys/fs/selinux/enforce", "1")],
        "security module",
        "degraded",
        "SELinux is enforcing",
        "ausearch",
    ),
    "SELinux asleep": ([("/sys/fs/selinux/enforce", "0")], "security module", "ok", "neither", ""),
    "AppArmor": (
        [("/sys/kernel/security/apparmor/profiles", "man (enforce)\nfusermount3 (enforce)")],
        "security module",
        "degraded",
        "AppArmor confines fusermount3",
        "dmesg",
    ),
    "a wrong configuration": (
        [("/etc/zramfs/fast.conf", "zram-size 4096")],
        "configuration",
        "degraded",
        "/etc/zramfs/fast.conf:1: ",
        "zramfs check-config",
    ),
    "a configuration": (
        [("/etc/zramfs/fast.conf", "zram-size = 64")],
        "configuration",
        "ok",
        "configured in /etc/zramfs: fast",
        "",
    ),
    "no generator": (
        ["/lib/systemd/system-generators/zramfs-generator"],
        "boot",
        "degraded",
        "no zramfs-generator",
        "Debian package",
    ),
    "docker": (
        [("/.dockerenv", "")],
        "container",
        "degraded",
        "in a container (docker)",
        "--cap-add SYS_ADMIN",
    ),
    "nspawn": (
        [("/run/systemd/container", "systemd-nspawn")],
        "container",
        "degraded",
        "(systemd-nspawn)",
        "--device",
    ),
    "podman": ([("/run/.containerenv", "")], "container", "degraded", "(podman)", "--device"),
    "user namespace": (
        [("/proc/self/uid_map", "0 1000 1")],
        "container",
        "degraded",
        "a user namespace",
        "outside",
    ),
}


@pytest.mark.requires("root")  # files of root's, with the set-user-ID bit
@pytest.mark.parametrize("case", CASES)
def test_a_verdict(fake: Fake, case: str) -> None:
    changes, name, state, found, advice = CASES[case]
    before = fake.finding(name)
    for change in changes:
        if isinstance(change, str):
            fake.remove(change)
        else:
            mode = (
                (fake.root / change[0].lstrip("/")).stat().st_mode if change[0].startswith("/usr") else 0o644
            )
            fake.write(*change, mode & 0o7777)
    after = fake.finding(name)
    assert (after.state, bool(after.advice)) == (state, state != "ok"), after
    assert found in after.found and advice in after.advice, after
    assert state == "ok" or before.state == "ok", before


@pytest.mark.requires("root", "loop")
def test_nothing_is_wrong_with_a_good_machine(fake: Fake) -> None:
    findings = examine(fake.machine, lambda: ("ok", "it went", ""))
    assert {each.name: each.state for each in findings} == {
        **{check.name: "ok" for check in CHECKS},
        "a device": "ok",
    }
    assert able(findings)
    assert not any(each.advice for each in findings)


@pytest.mark.requires("root")
def test_a_user_needs_the_set_user_id_bit(fake: Fake) -> None:
    fake.write(*USER)
    assert fake.finding("fusermount3").state == "ok"
    program = fake.root / "usr/bin/fusermount3"
    program.chmod(0o755)
    assert fake.finding("fusermount3").state == "missing"
    program.chmod(0o4755)
    os.chown(program, 1000, 1000)
    program.chmod(0o4755)
    after = fake.finding("fusermount3")
    assert after.state == "missing" and "not set-user-ID root" in after.found
    program.unlink()
    assert fake.finding("fusermount3").state == "missing"


@pytest.mark.requires("root", "unshare")
def test_a_user_needs_a_file_system_that_is_not_nosuid(fake: Fake) -> None:
    fake.write(*USER)
    code = (
        "import sys; from pathlib import Path\n"
        "from zramfs.doctor.checks import examine; from zramfs.host.machine import Machine\n"
        "print(*(f.found for f in examine(Machine(Path(sys.argv[1]))) if f.name == 'fusermount3'))"
    )
    place = fake.root / "usr/bin"
    script = f'mount --bind {place} {place} && mount -o remount,bind,nosuid {place} && exec "$@"'
    done = run(*apart("sh", "-c", script, "sh", sys.executable, "-c", code, fake.root))
    assert "is on a file system that is mounted nosuid" in done.stdout


@pytest.mark.requires("root", "loop")
def test_a_loop_device_without_a_node(fake: Fake) -> None:
    for node in (fake.root / "dev").glob("loop[0-9]*"):
        node.unlink()
    after = fake.finding("loop devices")
    assert after.state == "degraded"
    assert "has no node" in after.found and after.advice.startswith("mknod /dev/loop")


@pytest.mark.requires("root")
def test_run_directories_that_cannot_be_used(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = fake.root / "run/zramfs-of-the-doctor"
    base.mkdir()
    assert fake.finding("run directory").state == "ok"
    base.chmod(0o777)
    assert "its mode is 0777, so others get in" in fake.finding("run directory").found
    base.rmdir()
    base.touch()
    assert "it is not a directory" in fake.finding("run directory").found
    base.unlink()
    # A full /run, which has no room for one directory more.
    run("mount", "-t", "tmpfs", "-o", "nr_inodes=1", "zramfs_test", fake.root / "run")
    try:
        after = fake.finding("run directory")
    finally:
        run("umount", fake.root / "run")
    assert after.state == "missing" and after.essential
    assert "is full" in after.found and "make room" in after.advice


@pytest.mark.parametrize(("version", "file"), [(1, "memory.limit_in_bytes"), (2, "memory.max")])
def test_a_memory_cgroup_with_a_limit(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, version: int, file: str
) -> None:
    monkeypatch.setattr(memcg, "hierarchy", lambda: memcg.Hierarchy(fake.root / "cg", version, "/a/b"))
    fake.write(f"/cg/a/b/{file}", "9223372036854771712" if version == 1 else "max")
    assert fake.finding("memory cgroup").state == "ok"
    fake.write(f"/cg/a/{file}", str(100 << 20))
    after = fake.finding("memory cgroup")
    assert after.state == "degraded" and "systemd-run" in after.advice
    assert f"share a limit of 100M ({fake.root}/cg/a)" in after.found
    monkeypatch.setattr(memcg, "hierarchy", lambda: None)
    assert fake.finding("memory cgroup").state == "ok"


@pytest.mark.requires("root", "loop")
def test_what_swap_would_refuse_to_go_on_without(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def setting(name: str, needed: bool, refusal: str | None) -> safety.Setting:
        return safety.Setting(
            name, needed, f"{name} is lost", lambda: refusal, lambda: pytest.fail("applied"))

    listed = (setting("a", True, None), setting("b", True, "no right"), setting("c", False, "no right"))
    monkeypatch.setattr(safety, "SETTINGS", listed)
    found = {name: fake.finding(f"swap: {name}") for name in "abc"}
    assert [each.state for each in found.values()] == ["ok", "missing", "degraded"]
    assert found["b"].found == "no right" and found["b"].needed_for == "swap; without it b is lost"
    assert "zramfs swap --force" in found["b"].advice
    assert "zramfs swap goes on without" in found["c"].advice
    # Where there is no swap at all, that alone is said.
    fake.remove("/proc/swaps")
    assert not [each for each in examine(fake.machine) if each.name.startswith("swap: ")]


def test_daemons_that_have_died(fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "runs"))
    (tmp_path / "runs").mkdir(mode=0o700)
    for name in ("mnt-a", "mnt-b"):
        (tmp_path / "runs" / name).mkdir()
    state = rundir.State(
        name="mnt-a",
        directory="/mnt/a",
        disk="/nowhere",
        kind="device",
        phase="ready",
        pid=2**22 - 1,
        pid_start=1,
        boot_id=process.boot_id(),
        created="",
        threads=1,
    )
    rundir.Rundir(tmp_path / "runs/mnt-a").write(state)
    after = fake.finding("leftovers")
    assert after.state == "degraded"
    assert after.advice == "zramfs stop /mnt/a; zramfs stop mnt-b"


def test_a_machine_without_systemd(fake: Fake) -> None:
    shutil.rmtree(fake.root / "run/systemd")
    after = fake.finding("boot")
    assert after.state == "degraded" and "zramfs up" in after.advice


@pytest.mark.parametrize(("name", "package"), [("pictures", "matplotlib"), ("dictionaries", "zstandard")])
def test_what_needs_a_package(fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    real = importlib.util.find_spec
    assert fake.finding(name).state == "ok"
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda wanted: None if wanted == package else real(wanted)
    )
    finding = fake.finding(name)
    assert finding.state == "degraded" and f"apt-get install python3-{package}, or pip" in finding.advice


@pytest.mark.parametrize(("manager", "advice"), [
    ("apt-get", ["apt-get install fuse3", "apt-get install mount", "apt-get install util-linux mount",
                 "apt-get install xfsprogs btrfs-progs"]),
    ("dnf", ["dnf install fuse3", "dnf install util-linux", "dnf install util-linux",
             "dnf install xfsprogs btrfs-progs"]),
    ("pacman", ["pacman -S fuse3", "pacman -S util-linux", "pacman -S util-linux",
                "pacman -S xfsprogs btrfs-progs"]),
    ("apk", ["apk add fuse3", "apk add util-linux", "apk add util-linux", "apk add xfsprogs btrfs-progs"]),
    (None, ["install fuse3 (Debian's names)", "install mount (Debian's names)",
            "install util-linux and mount (Debian's names)",
            "install xfsprogs and btrfs-progs (Debian's names)"]),
])
def test_advice_is_in_the_words_of_the_machines_package_manager(
    fake: Fake, manager: str | None, advice: list[str]
) -> None:
    fake.remove("/usr/bin/apt-get")
    if manager:
        fake.write(f"/usr/bin/{manager}", "", 0o755)
    for path in ("/usr/bin/fusermount3", "/usr/sbin/losetup", "/usr/sbin/swapon", *SPARE[1:]):
        fake.remove(path)
    names = ("fusermount3", "loop devices", "swap", "file systems")
    assert [fake.finding(name).advice for name in names] == advice


@pytest.mark.requires("root")
def test_no_device_is_tried_where_something_is_missing(fake: Fake) -> None:
    fake.remove("/dev/fuse")
    findings = examine(fake.machine, lambda: pytest.fail("it was tried"))
    [trial] = [each for each in findings if each.name == "a device"]
    assert (trial.state, able(findings)) == ("missing", False)
    assert trial.found == "not tried, because of what is missing above"


def test_only_what_every_device_needs_decides() -> None:
    good = Finding("a", "ok", "", "", "", True)
    assert able([good, dataclasses.replace(good, state="degraded")])
    assert able([good, dataclasses.replace(good, state="missing", essential=False)])
    assert not able([good, dataclasses.replace(good, state="missing")])


def test_a_machine_that_shows_nothing_is_judged_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    findings = examine(Machine(tmp_path))
    assert len(findings) == len(checks.CHECKS)
    assert not able(findings)
