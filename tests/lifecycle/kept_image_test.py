# SPDX-License-Identifier: Apache-2.0
"""RAM disks that are kept in an image, and file systems that are saved while they are mounted."""
from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.support.backing_tools import tmpfs
from tests.support.commands import child, failure, nothing_left, state_of
from tests.support.images import content, is_written_in
from tests.support.whole import MIB, run, wait_until, zramfs
from zramfs.device.freeze import ThawedError, frozen, mounted_on
from zramfs.host import freezer, mounts, process
from zramfs.lifecycle import rundir

pytestmark = [pytest.mark.requires("root", "fuse", "loop", "ext4"), pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def point(tmp_path: Path) -> Iterator[Path]:
    """The place of a RAM disk, which is taken down if it is there at the end."""
    point = tmp_path / "disk"
    yield point
    if rundir.find(str(point)):
        zramfs("stop", "--force", point)


def ram_disk(point: Path, image: Path, *more: object) -> str:
    """What it says."""
    return zramfs("ramdisk", point, "--size", "64M", "--keep", image, *more).stderr


def noise(seed: int, n: int) -> bytes:
    return random.Random(seed).randbytes(n)


def log_of(point: Path) -> str:
    return (Path(state_of(point).disk).parent / "log").read_text()


# ---- kept ----------------------------------------------------------------------------------------------

def test_a_ram_disk_is_there_again_after_a_stop(tmp_path: Path, base: Path, point: Path) -> None:
    image = tmp_path / "image"
    assert ram_disk(point, image, "--mode", "0711") == "", "there is no image yet: it begins empty"
    (point / "directory").mkdir()
    (point / "directory/file").write_bytes(noise(1, MIB))
    assert zramfs("stop", point).stderr == f"zramfs: saving {point} to {image}\n"
    nothing_left(point, base)
    assert image.stat().st_mode & 0o777 == 0o600 and os.listdir(tmp_path) == ["image", "run"]
    assert ram_disk(point, image) == ""
    assert (point / "directory/file").read_bytes() == noise(1, MIB)
    assert point.stat().st_mode & 0o777 == 0o711
    (point / "more").write_text("more")
    zramfs("stop", point)
    said = zramfs("ramdisk", point, "--size", "32M", "--keep", image).stderr
    assert said == f"zramfs: note: {image} has 64M, and so has the device, not 32M\n"
    assert (point / "more").read_text() == "more"
    assert "clean" in run("tune2fs", "-l", state_of(point).loop).stdout


@pytest.mark.parametrize("in_use", [False, True])
def test_a_signal_saves_it_too(tmp_path: Path, point: Path, in_use: bool) -> None:
    image = tmp_path / "image"
    ram_disk(point, image)
    (point / "file").write_bytes(noise(1, MIB))
    with child("os.chdir(sys.argv[1])", point if in_use else "/"):
        os.kill(state_of(point).pid, signal.SIGTERM)
        wait_until(lambda: not rundir.find(str(point)), "it has ended", 20)
    ram_disk(point, image)
    assert (point / "file").read_bytes() == noise(1, MIB)


def test_a_daemon_that_is_killed_while_it_saves_has_the_next_one_save(tmp_path: Path, point: Path) -> None:
    image = tmp_path / "image"
    for _ in range(20):
        ram_disk(point, image)
        for number in range(40):
            (point / f"file{number}").write_bytes(noise(number, MIB))
        state = state_of(point)
        os.kill(state.keeper_pid, signal.SIGTERM)
        wait_until(lambda: image.exists() or is_written_in(tmp_path), "it saves", 20)
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.pid, signal.SIGKILL)
        if in_time := not image.exists():
            break
        # The save was faster than this process, which a busy machine had let wait.
        wait_until(lambda: not rundir.find(str(point)), "it has ended", 30)
        image.unlink()
    assert in_time, "killed before the image was whole"
    wait_until(lambda: not rundir.find(str(point)), "the next one has saved it and ended", 30)
    ram_disk(point, image)
    for number in range(40):
        assert (point / f"file{number}").read_bytes() == noise(number, MIB)


def test_a_stop_that_cannot_save_changes_nothing(tmp_path: Path, point: Path) -> None:
    with tmpfs(tmp_path / "small", 2 * MIB) as small:
        image = small / "image"
        ram_disk(point, image)
        zramfs("save", point, image)
        old = image.read_bytes()
        (point / "file").write_bytes(noise(1, 4 * MIB))
        said = failure("stop", point)
        assert f"zramfs: saving {point} to {image}\n" in said
        assert "No space left on device" in said and "--force, which loses what was written" in said
        assert (point / "file").read_bytes() == noise(1, 4 * MIB)
        assert image.read_bytes() == old and os.listdir(small) == ["image"]
        os.kill(pid := state_of(point).pid, signal.SIGTERM)
        wait_until(lambda: "but the device goes on" in log_of(point), "a signal is refused too", 20)
        wait_until(lambda: mounts.mount_at(point), "it is mounted again")
        assert (point / "file").read_bytes() == noise(1, 4 * MIB) and state_of(point).pid == pid
        (point / "file").unlink()
        run("fstrim", point)
        (point / "small").write_text("small")
        zramfs("stop", point)
        ram_disk(point, image)
        assert (point / "small").read_text() == "small"
        (point / "file").write_bytes(noise(1, 4 * MIB))
        assert "it ends all the same" in zramfs("stop", "--force", point).stderr
        ram_disk(point, image)
        assert sorted(os.listdir(point)) == ["lost+found", "small"]
        zramfs("stop", point)


def test_a_damaged_image_is_not_replaced(tmp_path: Path, base: Path, point: Path) -> None:
    image = tmp_path / "image"
    ram_disk(point, image)
    (point / "file").write_bytes(noise(1, MIB))
    zramfs("stop", point)
    damaged = bytearray(image.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    image.write_bytes(damaged)
    said = failure("ramdisk", point, "--size", "64M", "--keep", image)
    assert f"{image} is damaged" in said and "move it away" in said and "pages are lost: page" in said
    nothing_left(point, base)
    assert image.read_bytes() == damaged
    plain = tmp_path / "plain"
    said = zramfs("create", plain, "--restore", image).stderr
    try:
        assert said.startswith("zramfs: warning: restored ") and " are lost; part " in said
    finally:
        zramfs("stop", plain)


def test_what_is_no_image_is_not_replaced(tmp_path: Path, base: Path, point: Path) -> None:
    (tmp_path / "letter").write_text("Dear all")
    said = failure("ramdisk", point, "--size", "64M", "--keep", tmp_path / "letter")
    assert "does not begin as an image" in said and (tmp_path / "letter").read_text() == "Dear all"
    assert "No such file" in failure("ramdisk", point, "--size", "64M", "--keep", tmp_path / "no/image")
    assert "expected --keep FILE too" in failure(
        "ramdisk", point, "--size", "64M", "--keep-every", "5min", code=2)
    assert not base.exists() or not os.listdir(base)


def test_a_kept_ram_disk_can_be_let_go(tmp_path: Path, point: Path) -> None:
    ram_disk(point, tmp_path / "image")
    zramfs("control", point, "keep=off")
    zramfs("stop", point)
    assert not (tmp_path / "image").exists()


def test_a_configured_ram_disk_and_one_of_fstab_are_kept(
    tmp_path: Path, point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    (tmp_path / "etc/zramfs").mkdir(parents=True)
    (tmp_path / "etc/zramfs/logs.conf").write_text(
        f"zram-size = 64\nmount-point = {point}\nkeep = {image}\nkeep-every = 1h\n")
    monkeypatch.setenv("ZRAMFS_ROOT", str(tmp_path))
    zramfs("up", "logs")
    (point / "file").write_text("configured")
    zramfs("down", "logs")
    zramfs("logs", point, "-o", f"rw,size=64M,fs=ext4,keep={image},keep_every=1h")
    assert (point / "file").read_text() == "configured"


# ---- saved while it is mounted ----------------------------------------------------------------------------

def test_a_mounted_file_system_is_whole_in_its_image(tmp_path: Path, point: Path) -> None:
    """Files are written one after the other, each synced: those in the image are the first ones, whole."""
    zramfs("ramdisk", point, "--size", "128M")
    shutil.copytree("/usr/include/linux", point / "tree")
    written, over = [0], threading.Event()

    def write() -> None:
        while not over.is_set() and written[0] < 600:
            with open(point / f"file{written[0]}", "wb") as file:
                file.write(noise(written[0], 50_000))
                file.flush()
                os.fsync(file.fileno())
            written[0] += 1

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    wait_until(lambda: written[0] > 20, "it writes")
    zramfs("save", point, tmp_path / "image")
    before = written[0]
    wait_until(lambda: written[0] > before or written[0] == 600, "it is not frozen any more")
    over.set()
    thread.join()
    zramfs("stop", point)
    (tmp_path / "raw").write_bytes(content(tmp_path / "image"))
    (tmp_path / "mounted").mkdir()
    assert run("e2fsck", "-fn", tmp_path / "raw").returncode == 0
    run("mount", "-o", "loop,ro", tmp_path / "raw", tmp_path / "mounted")
    try:
        assert run("diff", "-r", "/usr/include/linux", tmp_path / "mounted/tree").stdout == ""
        files = sorted(int(path.name[4:]) for path in (tmp_path / "mounted").glob("file*"))
        assert len(files) > 20 and files == list(range(len(files)))
        assert all((tmp_path / f"mounted/file{n}").read_bytes() == noise(n, 50_000) for n in files[:-1])
    finally:
        run("umount", tmp_path / "mounted")


def test_a_file_on_the_device_itself_is_refused(tmp_path: Path, point: Path) -> None:
    ram_disk(point, tmp_path / "image")
    assert "lies on the device itself" in failure("save", point, point / "image")
    assert sorted(os.listdir(point)) == ["lost+found"]


def is_frozen(point: Path) -> bool:
    """By a write that does not end; it ends when the file system is thawed."""
    with subprocess.Popen([sys.executable, "-c", "import sys; open(sys.argv[1], 'w').write('x')",
                           point / "probe"]) as probe:
        try:
            probe.wait(30)  # a start of Python takes seconds on a busy machine
        except subprocess.TimeoutExpired:
            return True
        finally:
            probe.kill()
            if probe.returncode is None:
                threading.Thread(target=probe.wait, daemon=True).start()
                run("fsfreeze", "--unfreeze", point)
        return False


@pytest.mark.parametrize("how", ["stdin ends", "it is killed", "nothing happens"])
def test_a_file_system_is_thawed_whatever_becomes_of_its_freezer(
    tmp_path: Path, point: Path, how: str
) -> None:
    ram_disk(point, tmp_path / "image")
    place, = mounted_on(Path(state_of(point).disk))
    assert place.mountpoint == point

    async def freeze() -> None:
        began = time.monotonic()  # before, or a pause of this process would be missing in what it waits
        async with frozen([place]):
            if how == "it is killed":
                for pid in set(process.runs_of(freezer.__name__)) & set(process.children_of(os.getpid())):
                    os.kill(pid, signal.SIGKILL)
            elif how == "nothing happens":
                await trio.to_thread.run_sync((point / "file").write_text, "waits for the end of the freeze")
                assert 1.5 < time.monotonic() - began < 60

    # What happens may come too late here as well, where this process has had to wait.
    late = pytest.raises(ThawedError, match="was frozen for 3 s and thawed before all was done")
    with late if how == "nothing happens" else contextlib.suppress(ThawedError):
        trio.run(freeze)
    assert not is_frozen(point)


def test_a_freeze_of_somebody_else_stays(tmp_path: Path, point: Path) -> None:
    ram_disk(point, tmp_path / "image")
    (point / "file").write_text("there")
    run("fsfreeze", "--freeze", point)
    try:
        zramfs("save", point, tmp_path / "other")
    finally:
        assert run("fsfreeze", "--unfreeze", point).returncode == 0, "it was frozen still"
    assert len(content(tmp_path / "other")) == 64 * MIB
