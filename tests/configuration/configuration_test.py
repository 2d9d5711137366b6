# SPDX-License-Identifier: Apache-2.0
"""Configuration files: whole directories against what is said about them and the units made of them,
and whatever a file may hold."""
from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st

from tests.support.paths import ROOT
from tests.support.whole import zramfs
from zramfs.configuration import files, settings
from zramfs.configuration.expression import FUNCTIONS
from zramfs.configuration.files import MAX_FILE, MAX_FILES
from zramfs.configuration.generator import write_units
from zramfs.configuration.keys import KEYS
from zramfs.configuration.settings import Settings, load_configuration
from zramfs.lifecycle.ramdisk import FileSystem
from zramfs.lifecycle.swap import Swap
from zramfs.model.config import Algorithm, DeviceConfig
from zramfs.model.density import AUTO, OFF, Density
from zramfs.model.policy import Recompress, Units

CASES = ROOT / "tests/configuration/cases"
RAM = 8 << 30


@pytest.fixture(params=sorted(each.name for each in CASES.iterdir()))
def case(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy that only its owner can write to, whatever the umask of the checkout was."""
    top = tmp_path / request.param
    shutil.copytree(CASES / request.param, top, symlinks=True)
    for path in [top, *top.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)
    if request.param == "04-dropins":
        # An sdist can't hold a link that leads out of it.
        (top / "etc/zramfs/masked.conf").symlink_to("/dev/null")
    monkeypatch.setenv("ZRAMFS_ROOT", str(top))
    return top


def test_check_config_says_what_is_expected(case: Path) -> None:
    done = zramfs("check-config", check=False)
    said = f"{done.stdout}--- exit status {done.returncode}\n{done.stderr}".replace(f"{case}/", "/")
    assert said == (case / "check-config.expected").read_text()


def test_the_generator_makes_the_units_that_are_expected(case: Path, tmp_path: Path) -> None:
    target = tmp_path / "units"
    target.mkdir()
    done = zramfs("systemd-generator", target, target, target)
    assert done.stdout == ""
    assert tree(target).replace(f"{case}/", "/") == (case / "units.expected").read_text()


def tree(directory: Path) -> str:
    lines = []
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        if path.is_symlink():
            lines.append(f"{name} -> {os.readlink(path)}\n")
        elif path.is_file():
            lines.append(f"{name}:\n" + "".join(f"    {line}\n" for line in path.read_text().splitlines()))
    return "".join(lines)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    (tmp_path / "etc/zramfs/conf.d").mkdir(parents=True)
    return tmp_path


def one(top: Path, text: str | bytes, name: str = "z") -> Path:
    file = top / f"etc/zramfs/{name}.conf"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def test_every_value_arrives(top: Path) -> None:
    one(top, "mount-point=/m\nfs-type=btrfs\nzram-size=100\nzram-resident-limit=10\noptions=noatime\n"
             "compression-algorithm=lz4hc(level=5) zstd(level=9,dict=/d)\npolicy=recompress idle=10min\n"
             "writeback-device=/dev/x\nthreads=7\nproactiveness=30\nwipe=yes\n"
             "mode=0750\nowner=1\ngroup=2\n")
    got = load_configuration(top, RAM).devices["z"].settings
    algorithms = (Algorithm("lz4hc", 5), Algorithm("zstd", 9, Path("/d")))
    assert got == Settings(
        "z", DeviceConfig(size=100 << 20, mem_limit=10 << 20, algorithms=algorithms,
                          policies=(Recompress(600),), writeback=Path("/dev/x"), threads=7,
                          proactiveness=30, wipe=True, density=AUTO),
        FileSystem("btrfs", Path("/m"), "noatime", mode=0o750, owner=1, group=2), Path("/m"))
    one(top, "directory=/d\nallow-other=on\nmode=0640\n")
    got = load_configuration(top, RAM).devices["z"].settings
    assert got == Settings("z", DeviceConfig(size=4 << 30, allow_other=True, mode=0o640), None, Path("/d"))
    one(top, "swap-priority=-1\nreserve=32\nmin-free=ram/64\noptions=discard=once\n")
    got = load_configuration(top, RAM).devices["z"].settings
    config = DeviceConfig(size=4 << 30, reserve=32 << 20, density=AUTO)
    assert got == Settings("z", config, Swap(-1, "once", 128 << 20))


@pytest.mark.parametrize(("kind", "default"), [("directory=/d", OFF), ("mount-point=/m", AUTO), ("", AUTO)])
def test_density_has_the_default_of_the_kind_and_a_value_is_taken(
    kind: str, default: Density, top: Path
) -> None:
    lines = {"": default, "density=": default, "density = off": OFF, "density=max": Density("max"),
             "density = auto:20%": Density("auto", 20), "density=auto:7": Density("auto", 7)}
    for line, wanted in lines.items():
        one(top, f"{kind}\n{line}\n")
        assert load_configuration(top, RAM).devices["z"].settings.config.density == wanted
    file = one(top, f"{kind}\ndensity=auto share=10%\n")
    found = load_configuration(top, RAM).devices["z"]
    assert found.settings is None
    assert [str(each) for each in found.complaints] == [
        f"{file}:2: density: expected off, max, auto, or auto with the share of a core that it may take, "
        "auto:1% to auto:100%; got 'auto share=10%'"]


def test_a_policy_of_units_needs_no_second_algorithm_and_no_wipe(top: Path) -> None:
    file = one(top, "directory=/d\npolicy = units idle=30min level=9\n")
    got = load_configuration(top, RAM).devices["z"].settings
    assert got == Settings("z", DeviceConfig(size=4 << 30, policies=(Units(1800, 9),)), None, Path("/d"))
    one(top, "directory=/d\npolicy = units idle=30min\nwipe=yes\n")
    found = load_configuration(top, RAM).devices["z"]
    assert found.settings is None
    assert [str(each) for each in found.complaints] == [
        f"{file}:2: policy: units keep what is discarded, which wipe=yes promises not to"]


@pytest.mark.parametrize(("text", "settings_of"), [
    ("a = b", [("a", "b", 1)]),
    ("\n  a=b=c  \r\n", [("a", "b=c", 2)]),
    ("# a = b\n; c = d\n", []),
    ("a =\n", [("a", "", 1)]),
    ("a = b \\\n# between\n   c\nd = e", [("a", "b c", 1), ("d", "e", 4)]),
    ("a = b \\", [("a", "b", 1)]),
    ("\\\n\\\n", []),
    ("a b = c # no comment", [("a b", "c # no comment", 1)]),
    ("\ufeffa = b", [("a", "b", 1)]),
])
def test_lines(text: str, settings_of: list[tuple[str, str, int]], top: Path) -> None:
    file, complaints = one(top, text), []
    read = files.read_text(file, complaints)
    got = [each for _, _, each in files.parse_entries(file, read, complaints)]
    assert [(each.key, each.value, each.line) for each in got] == settings_of
    assert complaints == []


def errors(top: Path) -> str:
    return "\n".join(map(str, load_configuration(top, RAM).errors)).replace(str(top), "")


def test_files_that_others_could_have_written_are_left_out(top: Path) -> None:
    file = one(top, "zram-size = 1")
    file.chmod(0o664)
    assert errors(top) == ("/etc/zramfs/z.conf: expected a file that only root can change, but its mode is "
                           "0664, so others can write to it; it is left out")
    file.chmod(0o644)
    assert errors(top) == ""
    (top / "etc/zramfs").chmod(0o777)
    assert errors(top) == ("/etc/zramfs: expected a directory that only root can change, but its mode is "
                           "0777, so others can write to it")
    assert load_configuration(top, RAM).devices == {}


@pytest.mark.requires("root")
def test_files_of_somebody_else_are_left_out(top: Path) -> None:
    os.chown(one(top, "zram-size = 1"), 12345, 0)
    assert "but it belongs to uid 12345; it is left out" in errors(top)
    os.chown(top / "etc/zramfs/z.conf", 0, 0)
    os.chown(top / "etc/zramfs/conf.d", 12345, 0)
    assert errors(top) == ("/etc/zramfs/conf.d: expected a directory that only root can change, "
                           "but it belongs to uid 12345")


def test_what_is_no_file_is_left_out(top: Path) -> None:
    os.mkfifo(top / "etc/zramfs/pipe.conf")
    (top / "etc/zramfs/directory.conf").mkdir()
    os.symlink("loop.conf", top / "etc/zramfs/loop.conf")
    os.symlink("/dev/zero", top / "etc/zramfs/zero.conf")
    (top / "etc/zramfs/a.conf.d").write_text("")
    said = errors(top).splitlines()
    regular = "expected a regular file, or a link to /dev/null"
    assert sorted(said) == [
        "/etc/zramfs/a.conf.d: expected a directory",
        f"/etc/zramfs/directory.conf: {regular}",
        "/etc/zramfs/loop.conf: cannot be read: Too many levels of symbolic links",
        f"/etc/zramfs/pipe.conf: {regular}",
        f"/etc/zramfs/zero.conf: {regular}",
    ]


def test_what_is_too_large_is_left_out(top: Path) -> None:
    one(top, b"#" * (MAX_FILE - 1) + b"\n")
    assert errors(top) == ""
    one(top, b"#" * MAX_FILE + b"\n")
    assert errors(top) == f"/etc/zramfs/z.conf: expected a file of at most {MAX_FILE} bytes"
    for number in range(MAX_FILES + 1):
        (top / f"etc/zramfs/conf.d/{number}.conf").touch()
    assert f"conf.d: expected at most {MAX_FILES} files, found {MAX_FILES + 1}" in errors(top)


def test_there_may_be_no_directory_at_all(tmp_path: Path) -> None:
    assert load_configuration(tmp_path, RAM) == settings.Configuration({}, [])


def test_a_file_alone(top: Path) -> None:
    """check-config FILE: what a file is about shows in its place."""
    for place, expected in (("x.conf", "x"), ("conf.d/x.conf", "named"), ("y.conf.d/x.conf", "y")):
        file = top / "etc/zramfs" / place
        file.parent.mkdir(exist_ok=True)
        file.write_text("[named]\nzram-size = 1" if expected == "named" else "zram-size = 1")
        assert list(settings.load_file(file, RAM).devices) == [expected]
    [missing] = settings.load_file(top / "missing.conf", RAM).errors
    assert str(missing) == f"{top}/missing.conf: cannot be read: No such file or directory"


def test_meminfo_is_that_of_the_root(top: Path) -> None:
    (top / "proc").mkdir()
    (top / "proc/meminfo").write_text("MemFree: 1 kB\nMemTotal:    2097152 kB\n")
    one(top, "zram-size = ram")
    assert load_configuration(top).devices["z"].settings.config.size == 2 << 30


PAGE = ROOT / "docs/configuration.md"
MANUAL = ROOT / "docs/zramfs.conf.5"
EXAMPLE = ROOT / "docs/zramfs.conf.example"


def test_the_page_and_the_manual_list_every_key() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| ([^|]*) \|$", PAGE.read_text(), re.MULTILINE)
    assert [name for name, _ in rows] == list(KEYS)
    names = {"all": {"swap", "ramdisk", "device"}, "not swap": {"ramdisk", "device"}, "swap": {"swap"},
             "RAM disks": {"ramdisk"}, "plain devices": {"device"}, "RAM disks, swap": {"ramdisk", "swap"}}
    for name, kinds in rows:
        # These three decide what a device is.
        if name not in ("mount-point", "directory", "fs-type"):
            assert names[kinds] == set(KEYS[name].kinds), name
    manual = MANUAL.read_text().split(".SH KEYS")[1].split(".SH")[0]
    heads = re.findall(r"^\.TP\n\.BR? (.*)$", manual, re.MULTILINE)
    assert [word for head in heads for word in re.findall(r"[a-z-]+", head.replace("\\", ""))] == list(KEYS)


def test_the_page_and_the_manual_list_every_function() -> None:
    for text in (PAGE.read_text(), MANUAL.read_text()):
        [listed] = re.findall(r"functions\s+`?(min max [a-z\s]+atanh)", text)
        assert sorted(listed.split()) == sorted(FUNCTIONS)


def test_the_examples_are_right(top: Path) -> None:
    shutil.copy(EXAMPLE, top / "etc/zramfs/conf.d/example.conf")
    configuration = load_configuration(top, RAM)
    assert configuration.complaints == []
    assert {name: (device.settings.kind, device.settings.skip, device.complaints)
            for name, device in configuration.devices.items()} == {
        "swap0": ("swap", None, []), "swap1": ("swap", None, []), "build": ("ramdisk", None, []),
        "vm-disk": ("device", None, [])}
    for block in re.findall(r"^```\n# /etc/zramfs/fast.conf.*?\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        one(top, block, "fast")
        device = load_configuration(top, RAM).devices["fast"]
        assert (device.settings.kind, device.complaints) == ("ramdisk", [])
    assert re.findall(r"^(zram-size = .*)$", PAGE.read_text(), re.M)[1:]
    for line in re.findall(r"^(zram-size = .*)$", PAGE.read_text(), re.M):
        one(top, line, "fast")
        assert load_configuration(top, RAM).devices["fast"].complaints == []


_line = st.one_of(
    st.text(max_size=40),
    st.builds("{}={}".format, st.sampled_from([*KEYS, "x"]), st.text(max_size=30)),
    st.builds("{}={}".format, st.sampled_from(list(KEYS)), st.sampled_from(
        ["1", "ram", "/", "/a", "swap", "ext4", "zstd", "zstd(level=1)", "no", "none", "0", "", "-1", "1e300",
         "/../a", "discard"])),
    st.builds("[{}]".format, st.text(max_size=8)),
)
_files = st.lists(_line, max_size=12).map(lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass"))


@limits(deadline=None)  # a busy machine is no failure
@given(st.one_of(st.binary(max_size=300), _files))
def test_any_file_gives_settings_or_complaints(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """No exception; and whatever is accepted is safe to pass on: one line, absolute, in range."""
    top = tmp_path_factory.getbasetemp() / "any"
    (top / "etc/zramfs/conf.d").mkdir(parents=True, exist_ok=True)
    units = top / "units"
    shutil.rmtree(units, ignore_errors=True)
    units.mkdir()
    one(top, data, "any")
    one(top, data, "conf.d/any")
    configuration = load_configuration(top, RAM)
    for complaint in configuration.errors:
        assert "\n" not in str(complaint)
    for device in configuration.devices.values():
        assert (device.settings is None) == any(each.is_error for each in device.complaints)
        if got := device.settings:
            assert 0 <= got.config.size <= 1 << 48 and 0 <= got.config.mem_limit <= 1 << 48
            path = got.place
            assert path is None or (path.is_absolute() and str(path) != "/" and ".." not in path.parts)
            assert str(got.on_top).isprintable() and str(got.place).isprintable()
    write_units(configuration, units, lambda line: None)
    for file in units.rglob("*.conf"):
        text = file.read_text()
        assert text.splitlines() == text.split("\n")[:-1]
        assert {line.partition("=")[0] for line in text.split("\n")[2:-1]} <= {
            "SourcePath", "RequiresMountsFor", "Before", "After", "BindsTo"}
