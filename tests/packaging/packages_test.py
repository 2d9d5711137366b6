# SPDX-License-Identifier: Apache-2.0
"""What scripts/package builds: sdist, wheel and Debian package, each looked at and used elsewhere."""
from __future__ import annotations

import os
import re
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest

import zramfs as package
from tests.support.apart import apart
from tests.support.packages import BARE, ROOT, USE, USED, Packages, build
from tests.support.whole import run

pytestmark = [pytest.mark.requires("dh", "fuse", "root"), pytest.mark.timeout(1600)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    return build(tmp_path_factory.mktemp("dist"))


def sources() -> set[str]:
    """What belongs to the project: known to git, or new and not ignored."""
    words = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    return {name for name in run(*words).stdout.split("\0") if name and (ROOT / name).exists()}


@pytest.mark.requires("git")
def test_the_sdist_holds_the_whole_project_and_nothing_else(built: Packages) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: nothing says which files are the project's")
    with tarfile.open(built.file("*.tar.gz")) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames() if not sdist.getmember(name).isdir()}
        scripts = [
            m
            for m in sdist.getmembers()
            if re.fullmatch(r"[^/]+/(scripts/\w+|debian/rules|\.ci/run)", m.name)
        ]
        assert scripts and all(script.mode & 0o111 for script in scripts)
    made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
    assert names - made == sources()


def test_the_wheel_holds_modules_types_and_what_the_system_reads(built: Packages) -> None:
    expected = set()
    for name in sources():
        path = Path(name)
        if path.parts[0] in ("allocator", "zramfs") and path.suffix in (
            ".py",
            ".pyi",
            ".pxd",
            ".h",
            ".typed",
        ):
            expected.add(name)
        elif name == "zramfs/keeper/keeper.c":
            expected.add("zramfs/keeper/zramfs-keeper")
        elif path.parts[0] in ("allocator", "zramfs") and path.suffix == ".pyx":
            expected.add(name.removesuffix(".pyx") + ".so")
        elif path.parts[0] == "docs" and re.fullmatch(r"\.[1-8]", path.suffix):
            expected.add(f"share/man/man{path.suffix[1:]}/{path.name}")
        elif path.parts[0] == "monitoring":
            expected.add(f"share/zramfs/{path.name}")
        elif path.parts[0] == "completions":
            place = {"": "bash-completion/completions", ".fish": "fish/vendor_completions.d"}[path.suffix]
            expected.add(f"share/{'zsh/site-functions' if path.name[0] == '_' else place}/{path.name}")
    with zipfile.ZipFile(built.file("*.whl")) as wheel:
        names = {re.sub(r"\.cpython-[^/]*\.so$", ".so", name) for name in wheel.namelist()}
        program = wheel.getinfo("zramfs/keeper/zramfs-keeper")
        assert b".symtab" not in wheel.read(program), "it is stripped"
    assert program.external_attr >> 16 & 0o777 == 0o755
    names = {re.sub(r"^[^/]+\.data/data/", "", name) for name in names if ".dist-info/" not in name}
    assert names == expected


def test_the_wheel_works_in_a_virtual_environment_elsewhere(built: Packages, tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    run("/usr/bin/python3", "-m", "venv", venv, env=BARE)
    pip = [venv / "bin/pip", "--disable-pip-version-check", "install", "--quiet", "--no-index"]
    run(*pip, "--find-links", built.directory / "wheels", built.file("*.whl"), env=BARE, timeout=600)
    script = f'{USE} use "$1" "$2"'
    words = ["sh", "-c", script, "sh", venv / "bin/zramfs", tmp_path / "z"]
    used = run(*words, env=environment(tmp_path), cwd="/")
    assert used.stdout.splitlines() == USED
    assert "zramfs" in run("man", "-w", "-M", venv / "share/man", "zramfs").stdout


def environment(run_directories: Path) -> dict[str, str]:
    """BARE, with the name that says whose leftovers these would be."""
    ours = {name: value for name, value in os.environ.items() if name.startswith("ZRAMFS_TEST_")}
    return {**BARE, **ours, "ZRAMFS_RUN_DIR": str(run_directories / "run")}


def test_the_build_says_what_it_lacks(tmp_path: Path) -> None:
    """On a machine without the libraries' headers pkg-config finds nothing."""
    done = subprocess.run(
        [ROOT / ".venv/bin/python", "setup.py", "egg_info", "--egg-base", tmp_path],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env={**os.environ, "PKG_CONFIG_LIBDIR": str(tmp_path)},
        timeout=200,
    )
    assert done.returncode != 0
    assert "zramfs needs liblz4 >= 1.9.0" in done.stderr
    assert "apt-get install gcc pkg-config python3-dev liblz4-dev libzstd-dev" in done.stderr


def test_the_debian_package_brings_the_pages_the_completions_and_the_units(built: Packages) -> None:
    deb = built.file("zramfs_*.deb")
    lines = run("dpkg-deb", "--contents", deb).stdout.splitlines()
    assert all(line.split()[1] == "root/root" for line in lines)
    [program] = [line for line in lines if line.endswith("/zramfs-keeper")]
    assert program.startswith("-rwxr-xr-x ")
    names = {line.split()[5].removeprefix(".") for line in lines if not line.endswith("/")}
    expected = {
        "/usr/bin/zramfs",
        "/usr/share/bash-completion/completions/zramfs",
        "/usr/share/zsh/vendor-completions/_zramfs",
        "/usr/share/fish/vendor_completions.d/zramfs.fish",
        "/usr/share/doc/zramfs/copyright",
        "/usr/share/doc/zramfs/README.md.gz",
        "/etc/needrestart/conf.d/zramfs.conf",
    }
    for page in ROOT.glob("docs/*.[1-8]"):
        expected.add(f"/usr/share/man/man{page.suffix[1:]}/{page.name}.gz")
    for unit in [*ROOT.glob("systemd/*.service"), *ROOT.glob("systemd/*.timer")]:
        expected.add(f"/lib/systemd/system/{unit.name}")
    for file in ROOT.glob("monitoring/*"):
        expected.add(f"/usr/share/zramfs/{file.name}")
    assert expected <= names
    assert any(line.endswith(" ./etc/zramfs/") for line in lines)
    strays = [
        name for name in names if re.search(r"__pycache__|\.pyc$|\.pyx$|\.c$|/tests?/|direct_url", name)
    ]
    assert not strays
    fields = run("dpkg-deb", "--field", deb).stdout
    assert f"Version: {package.__version__}-" in fields
    for library in ("libfuse3-3 ", "liblz4-1 ", "libzstd1 ", "fuse3 ", "python3 (<< "):
        assert library in fields, library


def test_nothing_in_the_debian_package_points_to_the_machine_that_built_it(
    built: Packages, tmp_path: Path
) -> None:
    run("dpkg-deb", "--extract", built.file("zramfs_*.deb"), tmp_path)
    for library in tmp_path.rglob("*.so"):
        assert "PATH" not in run("readelf", "--dynamic", library).stdout, library
    places = (str(ROOT).encode(), str(built.directory.parent).encode())
    for file in tmp_path.rglob("*"):
        if file.is_file() and not file.is_symlink():
            assert not any(place in file.read_bytes() for place in places), file


# This machine with the package installed on it, which only the processes in here see: an overlay on
# its root, without what the machine itself may have of zramfs. $1 is an empty directory, $2 the package,
# $3 what to run there.
ELSEWHERE = """
set -e
mount -t tmpfs tmpfs "$1"
mkdir "$1/upper" "$1/work" "$1/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$1/upper,workdir=$1/work" "$1/root"
for place in proc sys dev; do mount --rbind /$place "$1/root/$place"; done
for place in run mnt usr/local; do mount -t tmpfs tmpfs "$1/root/$place"; done
rm -rf "$1/root/etc/zramfs"
cp "$2" "$1/root/run/package.deb"
exec chroot "$1/root" sh -c "$3"
"""
INSTALL = f"""
set -e
! dpkg --status zramfs >/run/log 2>&1 || dpkg --purge zramfs >/run/log 2>&1 || {{ cat /run/log; exit 1; }}
dpkg --install /run/package.deb >/run/log 2>&1 || {{ cat /run/log; exit 1; }}
{USE}
use zramfs /mnt/z
man -w zramfs
dpkg --verify zramfs
zramfs create /mnt/stays --size 4M
pid=$(zramfs status /mnt/stays --noheadings --output PID)
exec 3</run/zramfs/mnt-stays/log
dpkg --purge zramfs >/run/log 2>&1 || {{ cat /run/log; exit 1; }}
grep -q '^  mnt-stays on /mnt/stays$' /run/log
! ls -d /usr/lib/zramfs /etc/zramfs /usr/bin/zramfs /etc/needrestart/conf.d/zramfs.conf 2>/dev/null
! grep -q 'not empty' /run/log
# The device goes on without its program, and ends in order.
for file in /mnt/stays/* /mnt/stays/*/*; do
    [ -d $file ] || cat $file 2>&1 >/dev/null | grep -v 'Permission denied' || true
done
echo compact >/mnt/stays/control
kill -TERM $pid
for try in $(seq 1200); do [ -e /run/zramfs/mnt-stays ] || break; sleep 0.05; done
! ls /run/zramfs/mnt-stays /mnt/stays 2>/dev/null
grep -A 9 Traceback <&3 || true
"""


@pytest.mark.requires("unshare", "overlay", "man")
def test_the_debian_package_installs_works_and_goes_from_under_a_device(
    built: Packages, tmp_path: Path,
) -> None:
    words = apart("sh", "-c", ELSEWHERE, "sh", tmp_path, built.file("zramfs_*.deb"), INSTALL)
    kept = {name: value for name, value in environment(tmp_path).items() if name != "ZRAMFS_RUN_DIR"}
    done = run(*words, env=kept, timeout=600, cwd="/")
    assert done.stdout.splitlines() == [*USED, "/usr/share/man/man1/zramfs.1.gz"]
