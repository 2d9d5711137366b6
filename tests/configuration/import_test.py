# SPDX-License-Identifier: Apache-2.0
"""zramfs import: what zram-generator and zram-tools have configured, as files of ours that mean the same."""
from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.support.whole import zramfs
from zramfs.configuration import importing
from zramfs.configuration.expression import evaluate_expression
from zramfs.configuration.foreign import ForeignDevice
from zramfs.configuration.importing import TOOLS, Plan, make_plan
from zramfs.configuration.keys import KEYS
from zramfs.configuration.settings import Settings, load_configuration, load_text
from zramfs.errors import ZramfsError
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.lifecycle.swap import Swap
from zramfs.model.config import Algorithm

RAM = (7_825 << 20) + 12_345
MIB = 1 << 20


@pytest.fixture
def top(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    put(tmp_path, "proc/meminfo", f"MemTotal:       {RAM // 1024} kB\n")
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    return tmp_path


def put(top: Path, name: str, text: str) -> Path:
    file = top / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    for path in (file, *file.relative_to(top).parents):
        (top / path).chmod(0o644 if path == file else 0o755)
    return file


def generator(top: Path, text: str, name: str = "etc/systemd/zram-generator.conf") -> Path:
    return put(top, name, text)


def said(top: Path, plan: Plan) -> str:
    all_of_them = [*plan.complaints, *(each for device in plan.devices for each in device.complaints)]
    return "\n".join(map(str, all_of_them)).replace(f"{top}/", "/")


def meaning(top: Path, device: ForeignDevice) -> Settings:
    """What the file that would be written says."""
    made = load_text(importing.target(top, device), device.text(), RAM).devices[device.name]
    assert made.settings is not None, made.complaints
    assert made.entries.keys() == device.lines.keys()
    return made.settings


def one(top: Path, text: str) -> Settings:
    generator(top, text)
    [device] = make_plan(top, TOOLS, RAM).sound
    return meaning(top, device)


def test_every_key_of_zram_generator_arrives(top: Path) -> None:
    got = one(top, "[zram0]\nhost-memory-limit = 9048\nzram-size = min(ram / 10, 2048)\n"
                   "zram-resident-limit = ram / 20\ncompression-algorithm = zstd(level=3) lz4hc(level=9)\n"
                   "writeback-device = /dev/disk/by-partuuid/2d54ffa0-01\nswap-priority = 7\n"
                   "options = discard=pages,pri=3\n")
    assert got.config.size == int(7825 / 10 * MIB)
    assert got.config.mem_limit == int(7825 / 20 * MIB)
    assert got.config.algorithms == (Algorithm("zstd", 3), Algorithm("lz4hc", 9))
    assert got.config.writeback == Path("/dev/disk/by-partuuid/2d54ffa0-01")
    assert (got.on_top, got.skip) == (Swap(7, "pages"), None)
    got = one(top, "[zram0]\nmemory-limit = 100\n")
    assert got.skip == "the machine has 7825 MiB of RAM, more than host-memory-limit = 100"


def test_a_file_system_arrives_with_its_mode(top: Path) -> None:
    got = one(top, '[zram1]\nmount-point = "/run/./compressed"\nfs-type = xfs\n'
                   "options = rw,nosuid,discard,X-mount.mode=1777,X-mount.owner=3,X-mount.mkdir\n")
    assert got.on_top == FileSystem("xfs", Path("/run/compressed"), "rw,nosuid,discard", 0o1777, 3)
    assert got.config.size == int(7825 / 2 * MIB)  # its default


@pytest.mark.parametrize(("line", "taken", "sentence"), [
    ("compression-algorithm = lzo-rle", "lz4", "there is no lzo-rle here, so lz4 is taken"),
    ("compression-algorithm = deflate(level=9)", "zstd", "so zstd is taken, without (level=9)"),
    ("compression-algorithm = lzo lzo-rle lz4", "lz4", "there is no lzo here"),
    ("compression-algorithm = nonsense zstd", "lz4 zstd", "'nonsense' is left out"),
    ("compression-algorithm = none", "lz4", "'none' is left out"),
    ("compression-algorithm = zstd (type=idle)", "zstd", "zram-generator writes it nowhere either"),
    ("compression-algorithm = zstd(level=99)", "zstd", "'level=99' of zstd is left out: "),
    ("compression-algorithm = zstd(winbits=9,level=4)", "zstd(level=4)", "'winbits=9' of zstd is left out"),
    ("compression-algorithm = lz4 zstd lz4hc zstd(level=2) zstd(level=4)", "lz4 zstd lz4hc zstd(level=2)",
     "only the first 4 of 5 algorithms are taken"),
])
def test_an_algorithm_without_a_counterpart_is_replaced_with_a_warning(
    top: Path, line: str, taken: str, sentence: str
) -> None:
    generator(top, f"[zram0]\n{line}\n")
    plan = make_plan(top, TOOLS, RAM)
    assert plan.devices[0].lines["compression-algorithm"] == taken
    assert f"zram-generator.conf:2: warning: compression-algorithm: {sentence}" in said(top, plan) or (
        sentence in said(top, plan))
    meaning(top, plan.devices[0])


@pytest.mark.parametrize(("lines", "sentence"), [
    ("mount-point=/m", "mount-point: there is no ext2, its default, here, so ext4 is taken"),
    ("mount-point=/m\nfs-type=f2fs", "fs-type: there is no f2fs here, so ext4 is taken"),
])
def test_ext2_becomes_ext4_with_a_warning(top: Path, lines: str, sentence: str) -> None:
    assert one(top, f"[zram0]\n{lines}\n").on_top == FileSystem("ext4", Path("/m"))
    assert sentence in said(top, make_plan(top, TOOLS, RAM))


@pytest.mark.parametrize("fraction", ["0.5", ".25", "1e-1", "+0.3333", "2.", "0"])
@pytest.mark.parametrize("most", [None, "none", "0", "1000"])
def test_the_obsolete_fraction_makes_the_same_size(top: Path, fraction: str, most: str | None) -> None:
    limit = math.inf if most in (None, "none") else int(most)
    lines = "" if most is None else f"max-zram-size={most}\n"
    got = one(top, f"[zram0]\nzram-size=1\nzram-fraction={fraction}\n{lines}")
    assert got.config.size == min(int(float(fraction) * 7825), limit) * MIB


def test_without_discard_zram_still_gives_memory_back_and_so_do_we(top: Path) -> None:
    assert one(top, "[zram0]\noptions =\n").on_top == Swap(100, "both")
    assert "options: zram learns of freed pages without discard" in said(top, make_plan(top, TOOLS, RAM))


def test_the_places_are_read_in_their_order(top: Path) -> None:
    """The last main file alone, then all drop-ins by name; a later place replaces those of an earlier one."""
    for place, size in (("usr/lib", 1), ("usr/local/lib", 2), ("etc", 3)):
        generator(top, f"[zram0]\nzram-size={size}\n[zram{size}]\nzram-size=9\n",
                  f"{place}/systemd/zram-generator.conf")
    drop = "systemd/zram-generator.conf.d"
    generator(top, "[zram0]\nswap-priority=1\n", f"etc/{drop}/20-b.conf")
    generator(top, "[zram0]\nswap-priority=2\nzram-size=7\n", f"usr/lib/{drop}/10-a.conf")
    generator(top, "[zram0]\nzram-size=1\n", f"usr/lib/{drop}/30-masked.conf")
    generator(top, "[zram0]\nzram-size=1\n", f"usr/lib/{drop}/40-replaced.conf")
    generator(top, "[zram0]\nhost-memory-limit=8000\n", f"run/{drop}/40-replaced.conf")
    generator(top, "[zram0]\nzram-size=1\n", f"run/{drop}/50-no-suffix")
    (top / f"etc/{drop}/30-masked.conf").symlink_to("/dev/null")
    plan = make_plan(top, TOOLS, RAM)
    assert {device.name: device.lines for device in plan.devices} == {
        "zram0": {"zram-size": "7", "swap-priority": "1", "host-memory-limit": "8000"},
        "zram3": {"zram-size": "9"},
    }
    generator(top, "[zram5]\n", "run/systemd/zram-generator.conf")
    assert [device.name for device in make_plan(top, TOOLS, RAM).devices] == ["zram0", "zram5"]


@pytest.mark.parametrize(("cmdline", "names"), [
    ("quiet systemd.zram", ["zram0"]), ("systemd.zram=0 systemd.zram=1", ["zram0"]),
    ("systemd.zram=1 systemd.zram=off", []), ("systemd.zramx", []),
])
def test_the_kernel_command_line_can_ask_for_a_device(top: Path, cmdline: str, names: list[str]) -> None:
    put(top, "proc/cmdline", cmdline)
    assert [device.name for device in make_plan(top, TOOLS, RAM).sound] == names


def test_the_kernel_command_line_can_forbid_all_and_that_is_said(top: Path) -> None:
    put(top, "proc/cmdline", "systemd.zram=0")
    generator(top, "[zram0]\n")
    assert "systemd.zram: it is 0 here" in said(top, make_plan(top, TOOLS, RAM))


@pytest.mark.parametrize(("text", "sentence"), [
    ("set!x=touch {top}/ran\n[zram0]\nzram-size=x\n", "x comes from a program: write its value instead"),
    ("[zram0]\nzram-size=ram +\n", "zram-size: expected a number, a name or a parenthesis, got the end"),
    ("[zram0]\nzram-size=-ram\n", "expected a size of at least 0 MiB"),
    ("[zram0]\nzram-size=1e30\n", "expected at most "),
    ("[zram0]\nzram-size=\n", "expected a value; zram-generator refuses an empty one"),
    ("[zram0]\nzram-fraction=-1\n", "expected a number such as 0.5"),
    ("[zram0]\nmax-zram-size=1G\n", "expected a whole number of MiB or none"),
    ("[zram0]\nhost-memory-limit=1G\n", "expected a whole number of MiB or none"),
    ("[zram0]\nswap-priority=40000\n", "expected a whole number from -1 to 32767"),
    ("[zram0]\nfs-type=ext4\n", "mounted nowhere has no counterpart"),
    ("[zram0]\nfs-type=swap\nmount-point=/m\n", "swap has no mount-point"),
    ("[zram0]\nmount-point=/usr\n", "would hide what zramfs itself needs"),
    ("[zram0]\nmount-point=/dev/shm\n", "needs mode = 1777"),
    ("[zram0]\nmount-point=../m\n", "expected an absolute path"),
    ("[zram0]\nmount-point=/m\\\\\n", "expected a value without a backslash"),
    ("[zram0]\nmount-point=\"/m\n", "expected one pair of quotes"),
    ("[zram0]\nmount-point=/m\noptions=X-mount.mode=9\n", "expected an octal mode"),
])
def test_what_would_be_another_device_is_left_out(top: Path, text: str, sentence: str) -> None:
    generator(top, text.format(top=top))
    plan = make_plan(top, TOOLS, RAM)
    assert plan.sound == [] and not plan.is_complete
    assert sentence in said(top, plan)
    assert not (top / "ran").exists()


def test_what_is_wrong_is_said_of_the_line_that_it_comes_from(top: Path) -> None:
    generator(top, "[zram0]\n\nmount-point=/m\nzram-size=\\\n1e30\noptions=X-mount.mode=9\n")
    assert re.findall(r"^/etc/systemd/zram-generator.conf:(\d+): (?!warning)([\w-]+): ",
                      said(top, make_plan(top, TOOLS, RAM)), re.M) == [("4", "zram-size"), ("6", "options")]
    plan = zramswap(top, "\nPRIORITY=40000\n")
    assert "/etc/default/zramswap:2: PRIORITY: expected a whole number from -1 to 32767" in said(top, plan)


def test_a_file_that_cannot_be_trusted_keeps_all_from_being_written(top: Path) -> None:
    generator(top, "[zram0]\n")
    generator(top, "[zram0]\nzram-size=1\n", "etc/systemd/zram-generator.conf.d/x.conf").chmod(0o666)
    plan = make_plan(top, TOOLS, RAM)
    assert plan.sound == [] and [device.name for device in plan.devices] == ["zram0"]
    assert "expected a file that only root can change, but its mode is 0666" in said(top, plan)


# ---- zram-tools ------------------------------------------------------------------------------------
def zramswap(top: Path, text: str) -> Plan:
    put(top, "etc/default/zramswap", text)
    return make_plan(top, ["zram-tools"], RAM)


@pytest.mark.parametrize(("text", "size", "algorithm", "priority"), [
    ("", 256, "lz4", 100),
    ("#ALGO=zstd\nALGO=zstd\nPERCENT=50\nSIZE=9\n", 7825 / 2, "zstd", 100),
    ("PERCENT=''\nSIZE=\"512\"  # MiB\nPRIORITY=5", 512, "lz4", 5),
    ("export ALGO='lzo-rle'\nPERCENTAGE=200\nALLOCATION=3\n", 7825 * 2, "lz4", 100),
    ("SIZE=\nCORES=4\nPRIORITY=-1", 256, "lz4", -1),
])
def test_zramswap_arrives(top: Path, text: str, size: float, algorithm: str, priority: int) -> None:
    [device] = zramswap(top, text).sound
    got = meaning(top, device)
    assert (device.name, got.config.size) == ("zramswap", int(size * MIB))
    assert (got.config.algorithms, got.on_top) == ((Algorithm(algorithm),), Swap(priority))


@pytest.mark.parametrize("line", [
    "PERCENT=$(touch {top}/ran; echo 50)", "PERCENT=`touch {top}/ran`", 'ALGO="$HOME"', "PERCENT=050",
    "PERCENT=0", "SIZE=1G", "SIZE=$((1 << 10))", "PRIORITY=99999", "ALGO=lz4;touch {top}/ran", "rm -rf /",
    "if true; then", "SIZE=1 touch {top}/ran", "ALGO=lz4\\", "ALGO='a b'", "PERCENT=50\\\n", 'ALGO="zstd',
])
def test_more_than_plain_assignments_is_refused_and_never_run(top: Path, line: str) -> None:
    plan = zramswap(top, line.format(top=top) + "\n")
    assert plan.sound == []
    assert not (top / "ran").exists()


# ---- hostile files ---------------------------------------------------------------------------------
VALUES = st.one_of(
    st.text(max_size=40), st.sampled_from([
        "ram / 2", "min(ram, 1)", "zstd(level=3)", "/m", "/m\\", '"/m"', "'", "swap", "ext2", "discard",
        "X-mount.mode=1777,x", "a # b", "; c", "[zram1]", "1e999", "(((", "1" * 400, "-1", "none",
    ]))
GENERATOR_LINES = st.lists(st.one_of(
    st.sampled_from(["[zram0]", "[zram18446744073709551616]", "[default]", "\\", "set!ram=echo 1"]),
    st.builds("{}{}{}".format, st.sampled_from([
        "zram-size", "zram-resident-limit", "compression-algorithm", "writeback-device", "options",
        "mount-point", "fs-type", "swap-priority", "host-memory-limit", "zram-fraction", "max-zram-size", "x",
    ]), st.sampled_from(["=", " = ", ":"]), VALUES), VALUES), max_size=12)
SHELL_LINES = st.lists(st.one_of(
    st.builds("{}={}".format, st.sampled_from(["ALGO", "SIZE", "PERCENT", "PRIORITY"]), VALUES), VALUES),
    max_size=8)


@limits(max_examples=120, deadline=None)
@given(lines=GENERATOR_LINES, shell=SHELL_LINES)
def test_whatever_a_file_holds_only_sound_devices_come_out(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], shell: list[str]
) -> None:
    top = tmp_path_factory.getbasetemp() / "hostile"
    for name, words in (("etc/systemd/zram-generator.conf", ["[zram0]", *lines]),
                        ("etc/default/zramswap", shell)):
        put(top, name, "").write_bytes("\n".join(words).encode("utf-8", "surrogatepass"))
    plan = make_plan(top, TOOLS, RAM)
    for device in plan.sound:
        assert set(device.lines) <= set(KEYS)
        assert len(device.text().splitlines()) == 1 + len(device.lines)
        assert meaning(top, device).name == device.name
        if size := device.lines.get("zram-size"):
            assert meaning(top, device).config.size == int(evaluate_expression(size, {"ram": 7825.0}) * MIB)


# ---- what is written -------------------------------------------------------------------------------
def test_the_command_writes_files_that_check_config_takes(top: Path) -> None:
    generator(top, "[zram0]\nzram-size = ram / 4\n\n[zram1]\nmount-point = /m\nfs-type=ext4\n")
    put(top, "etc/default/zramswap", "PERCENT=10\n")
    shown = zramfs("import", "--dry-run")
    assert not (top / "etc/zramfs").exists()
    done = zramfs("import")
    files = {file.name: file for file in (top / "etc/zramfs").iterdir()}
    assert sorted(files) == ["zram0.conf", "zram1.conf", "zramswap.conf"]
    assert {file.stat().st_mode & 0o777 for file in files.values()} == {0o644}
    for file in files.values():
        assert f"# {file}\n{file.read_text()}" in shown.stdout
        assert f"wrote {file}" in done.stderr
    assert "zram-size = ram / 4\n" in files["zram0.conf"].read_text()
    checked = zramfs("check-config")
    assert checked.stderr == ""
    assert "zram1  (" in checked.stdout and "a RAM disk: ext4 on /m" in checked.stdout
    again = zramfs("import")
    assert "the files are there already, with the same text" in again.stderr


def test_no_file_is_replaced_without_being_asked(top: Path) -> None:
    generator(top, "[zram0]\nzram-size = 100\n[zram1]\n")
    mine = put(top, "etc/zramfs/zram1.conf", "zram-size = 7\n")
    done = zramfs("import", check=False)
    assert done.returncode == 1
    assert f"{mine} is there already, so nothing was written; --force replaces it" in done.stderr
    assert [file.name for file in (top / "etc/zramfs").iterdir()] == ["zram1.conf"]
    assert mine.read_text() == "zram-size = 7\n"
    zramfs("import", "--force")
    assert "zram-size" not in mine.read_text()


def test_a_masked_name_counts_as_a_file_of_that_name(top: Path) -> None:
    generator(top, "[zram0]\n")
    put(top, "etc/zramfs/x.conf", "")
    (top / "etc/zramfs/zram0.conf").symlink_to("/dev/null")
    with pytest.raises(ZramfsError, match="is there already"):
        importing.write_files(make_plan(top, TOOLS, RAM), top, replace=False)
    assert os.readlink(top / "etc/zramfs/zram0.conf") == "/dev/null"


def test_a_write_that_fails_leaves_no_file_of_the_others(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator(top, "[zram0]\n[zram1]\n")
    real = os.link

    def link(source: Path, target: Path, **more: object) -> None:
        if target.name == "zram1.conf":
            raise FileExistsError(17, "somebody was faster")
        real(source, target, **more)

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(FileExistsError):
        importing.write_files(make_plan(top, TOOLS, RAM), top, replace=False)
    assert list((top / "etc/zramfs").iterdir()) == []


def test_a_directory_that_others_can_change_gets_no_file(top: Path) -> None:
    generator(top, "[zram0]\n")
    put(top, "etc/zramfs/x.conf", "").parent.chmod(0o777)
    with pytest.raises(ZramfsError, match="expected a directory that only root can change"):
        importing.write_files(make_plan(top, TOOLS, RAM), top, replace=False)


def test_a_device_that_something_else_configures_too_is_left_out(top: Path) -> None:
    generator(top, "[zram0]\n[zram1]\nmount-point=/m\n")
    put(top, "etc/zramfs/conf.d/mine.conf", "[zram0]\nswap-priority = 3\n[other]\nmount-point = /m\n")
    plan = make_plan(top, TOOLS, RAM)
    assert plan.sound == []
    assert "/etc/zramfs/conf.d/mine.conf says something about zram0, too" in said(top, plan)
    assert "expected a directory of its own, but /m is that of other" in said(top, plan)
    assert list(load_configuration(top, RAM).devices) == ["other", "zram0"]


def test_nothing_to_import_is_said(top: Path) -> None:
    done = zramfs("import", check=False)
    assert done.returncode == 1 and "nothing to import: zram-generator.conf is in none" in done.stderr


def test_from_takes_one_tool_alone(top: Path) -> None:
    generator(top, "[zram0]\n")
    put(top, "etc/default/zramswap", "")
    assert re.findall(r"^# .*/(\w+)\.conf$", zramfs("import", "-n", "--from", "zram-tools").stdout, re.M) == [
        "zramswap"]


def test_the_old_service_is_warned_of_while_it_is_active(top: Path) -> None:
    generator(top, "[zram0]\n")
    put(top, "etc/default/zramswap", "")
    plan = make_plan(top, TOOLS, RAM)
    assert list(importing.old_services(top, plan)) == []
    put(top, "proc/swaps", "Filename\tType\n/dev/sda2 partition 1 0 -2\n/dev/zram0\tpartition 1 0 100\n")
    put(top, "proc/mounts", "/dev/zram1 /var/my\\040cache ext2 rw 0 0\n/dev/zramx /x ext2 rw 0 0\n")
    put(top, "usr/lib/systemd/system-generators/zram-generator", "")
    put(top, "etc/systemd/system/multi-user.target.wants/zramswap.service", "")
    found = list(importing.old_services(top, plan))
    assert [re.findall("`([^`]*)`", each)[0].split(" ")[0] for each in found] == [
        "swapoff", "umount", "mkdir", "systemctl"]
    assert "`umount /var/my cache`" in found[1]
    (top / "etc/systemd/system-generators").mkdir()
    (top / "etc/systemd/system-generators/zram-generator").symlink_to("/dev/null")
    assert len(list(importing.old_services(top, plan))) == 3
    assert "warning: the kernel's zram is in use, swap on /dev/zram0: `swapoff /dev/zram0`" in zramfs(
        "import", "-n").stderr
