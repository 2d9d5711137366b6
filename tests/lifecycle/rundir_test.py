# SPDX-License-Identifier: Apache-2.0
"""Run directories: names, states, locks, and who gets a directory when several want it."""
from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import tempfile
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from zramfs.errors import ZramfsError
from zramfs.host import paths, process
from zramfs.lifecycle import claim, rundir
from zramfs.lifecycle.rundir import Rundir, State
from zramfs.model.config import DeviceConfig

# fork: the children run code of this file, and the parent has one thread here.
mp = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMFS_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def a_state(**changes: object) -> State:
    start = process.process_start(os.getpid())
    assert start is not None
    state = State(
        name="n",
        directory="/mnt/n",
        disk="/run/zramfs/n/disk",
        kind="device",
        phase="ready",
        pid=os.getpid(),
        pid_start=start,
        boot_id=process.boot_id(),
        created="2026-01-01T00:00:00+00:00",
        threads=2,
    )
    return state._replace(**changes)


NAMES = {
    "/mnt/z0": "mnt-z0",
    "/mnt/z0/": "mnt-z0",
    "/": "-",
    "/mnt/my disk": "mnt-my\\x20disk",
    "/mnt/a-b/c": "mnt-a\\x2db-c",
    "/mnt/a/b-c": "mnt-a-b\\x2dc",
    "/.hidden": "\\x2ehidden",
    "/mnt/.hidden": "mnt-.hidden",
    "/mnt/ü,%": "mnt-\\xc3\\xbc\\x2c\\x25",
    "/a\\b": "a\\x5cb",
}


@pytest.mark.parametrize("path", NAMES)
def test_escape(path: str) -> None:
    assert paths.escape(Path(path)) == NAMES[path]


@pytest.mark.requires("systemd-escape")
@pytest.mark.parametrize("path", NAMES)
def test_escape_as_systemd(path: str) -> None:
    theirs = subprocess.run(
        ["systemd-escape", "--path", path], capture_output=True, text=True, check=True, timeout=20
    ).stdout.rstrip("\n")
    assert paths.escape(Path(path)) == theirs


def test_long_names_stay_names_and_differ(tmp_path: Path) -> None:
    names = {paths.escape(Path("/" + "x" * 250 + end)) for end in ("/a", "/b", "/a/b")}
    assert len(names) == 3
    for name in names:
        (tmp_path / name).mkdir()  # ENAMETOOLONG if not


def test_resolve_follows_links_like_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "real" / "sub").mkdir(parents=True)
    (tmp_path / "absolute").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "up").symlink_to("../absolute/sub")
    for path in ("absolute/sub", "real/up", "absolute/up", "absolute/sub/.", "real", "absolute//sub"):
        assert paths.resolve(tmp_path / path) == (tmp_path / path).resolve()
    assert paths.resolve(tmp_path / "absolute/missing/x") == tmp_path.resolve() / "real/missing/x"


def test_resolve_ends_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ZramfsError, match="circle") as caught:
        paths.resolve(tmp_path / "a" / "x")
    assert caught.value.errno == errno.ELOOP


def test_process_start_tells_the_dead(tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        start = process.process_start(child.pid)
        assert start is not None
        assert start == process.process_start(child.pid)
        child.kill()
        until = time.monotonic() + 60
        while process.process_start(child.pid) is not None and time.monotonic() < until:
            time.sleep(0.01)
        # Not waited for yet: a zombie has a pid and a start time, and is dead.
        assert Path(f"/proc/{child.pid}").exists()
        assert process.process_start(child.pid) is None
    assert process.process_start(child.pid) is None


def test_alive_means_this_process_since_this_boot() -> None:
    state = a_state()
    assert state.alive()
    assert not state._replace(pid_start=state.pid_start + 1).alive()
    assert not state._replace(boot_id="00000000-0000-0000-0000-000000000000").alive()


def test_a_device_whose_daemon_dies_meanwhile_is_served_by_its_keeper(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Rundir(base / "n")
    place.path.mkdir(parents=True)
    with subprocess.Popen(["sleep", "60"]) as daemon:
        place.write(a_state(
            pid=daemon.pid, pid_start=process.process_start(daemon.pid), keeper_pid=os.getpid()))

        def holders(path: Path) -> list[int]:
            # It dies behind the look. Until it has been waited for, it is one that has let go of nothing yet.
            daemon.kill()
            os.waitid(os.P_PID, daemon.pid, os.WEXITED | os.WNOWAIT)
            return [daemon.pid, os.getpid()]

        monkeypatch.setattr(rundir.locks, "holders", holders)
        state = place.read()
        assert state is not None and state.alive() and state.pid == os.getpid()


def test_a_daemon_that_dies_between_two_looks_is_looked_for_again(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Rundir(base / "n")
    place.path.mkdir(parents=True)
    place.write(a_state(pid=1 << 22, pid_start=1))
    seen: list[list[int]] = []

    def holders(path: Path) -> list[int]:
        seen.append([1 << 22] if not seen else [os.getpid()])
        return seen[-1]

    monkeypatch.setattr(rundir.locks, "holders", holders)
    # The first look finds that it lives, and nothing after that does.
    monkeypatch.setattr(
        rundir, "process_start", lambda pid: 1 if len(seen) == 1 else process.process_start(pid))
    state = place.read()
    assert state is not None and state.alive() and len(seen) == 2


def test_what_is_said_last_is_not_overwritten_by_what_was_true_before_it(base: Path) -> None:
    place = Rundir(base / "n")
    place.path.mkdir(parents=True)
    place.write(a_state())
    keeper = [1]
    waits = threading.Thread(target=lambda: place.update(lambda: {"keeper_pid": keeper[0]}))

    def renewed() -> dict[str, int]:
        waits.start()
        time.sleep(0.2)  # so that the other one waits for its turn; if not, this proves less
        keeper[0] = 2
        return {"keeper_pid": keeper[0]}

    place.update(renewed)
    waits.join(60)
    state = place.read()
    assert state is not None and state.keeper_pid == 2


def test_state_survives_and_bad_states_are_none(tmp_path: Path) -> None:
    mine = Rundir(tmp_path)
    assert mine.read() is None
    state = a_state(directory="/mnt/\udcff odd", loop="/dev/loop9")
    mine.write(state)
    assert mine.read() == state
    assert mine.update(phase="starting") == state._replace(phase="starting") == mine.read()
    for text in ("", "{", "[]", "7", '{"name": "n"}'):
        (tmp_path / "state.json").write_text(text)
        assert mine.read() is None
    with pytest.raises(ZramfsError, match="is gone"):
        mine.update(phase="ready")


def test_the_state_of_another_version_is_read(tmp_path: Path) -> None:
    """After an upgrade, daemons that were started before go on."""
    mine = Rundir(tmp_path)
    state = a_state()
    mine.write(state)
    file = tmp_path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "mood": "good", "version": 2}))
    assert mine.read() == state._replace(version=2)
    without = json.loads(file.read_text())
    del without["notes"], without["loop"]
    file.write_text(json.dumps(without))
    assert mine.read() == state._replace(version=2)


def _rewrite(path: Path, stop: Event) -> None:
    i = 0
    while not stop.is_set():
        i += 1
        Rundir(path).write(a_state(threads=i, directory="/mnt/" + "x" * (i * 997 % 9000)))


def test_readers_never_see_half_a_state(tmp_path: Path) -> None:
    Rundir(tmp_path).write(a_state())
    stop = mp.Event()
    writer = mp.Process(target=_rewrite, args=(tmp_path, stop))
    writer.start()
    try:
        seen, until = set(), time.monotonic() + 1
        # For a second, and on a busy machine until the writer has had its turns.
        while (now := time.monotonic()) < until or (len(seen) <= 10 and now < until + 60):
            state = Rundir(tmp_path).read()
            assert state is not None
            seen.add(state.threads)
    finally:
        stop.set()
        writer.join(60)
    assert len(seen) > 10


def test_base_is_private(base: Path) -> None:
    rundir.make_base(base)
    assert base.stat().st_mode & 0o7777 == (0o711 if os.getuid() == 0 else 0o700)
    rundir.make_base(base)
    base.chmod(0o777)
    with pytest.raises(ZramfsError, match="its mode is 0777, so others get in"):
        rundir.make_base(base)
    assert rundir.rundirs() == []


def test_base_is_no_link_of_somebody_else(base: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    base.symlink_to(tmp_path / "elsewhere")
    # ZRAMFS_RUN_DIR itself may be a link; what must not be one is the directory we make.
    with pytest.raises(ZramfsError, match="it is not a directory"):
        rundir.make_base(base)


@pytest.mark.requires("root")
def test_base_belongs_to_us(base: Path) -> None:
    base.mkdir(mode=0o700)
    os.chown(base, 65534, 65534)
    with pytest.raises(ZramfsError, match="it belongs to uid 65534, not to uid 0") as caught:
        rundir.make_base(base)
    assert caught.value.errno == errno.EPERM
    assert rundir.rundirs() == []


@pytest.mark.requires("root")
def test_others_take_only_their_own_runtime_directory() -> None:
    # Not tmp_path, which pytest makes private to root.
    mine, his = (Path(tempfile.mkdtemp()) for _ in range(2))
    os.chown(his, 65534, 65534)
    environment = {key: value for key, value in os.environ.items() if key != "ZRAMFS_RUN_DIR"}

    def bases_with(directory: Path) -> list[str]:
        def as_nobody() -> None:
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            os.environ.clear()
            os.environ.update(environment, XDG_RUNTIME_DIR=str(directory))
            queue.put([str(each) for each in rundir.bases()])

        queue = mp.SimpleQueue()
        child = mp.Process(target=as_nobody)
        child.start()
        child.join(60)
        return queue.get()

    assert bases_with(his) == [f"{his}/zramfs", "/tmp/zramfs-65534"]
    assert bases_with(mine) == ["/tmp/zramfs-65534"]


def _hold(base: Path, held: Event, release: Event) -> None:
    with rundir.locked(base):
        held.set()
        release.wait(60)


def test_lock_excludes_other_processes(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rundir, "_LOCK_TIMEOUT", 0.2)
    held, release = mp.Event(), mp.Event()
    holder = mp.Process(target=_hold, args=(base, held, release))
    holder.start()
    try:
        assert held.wait(60)
        with (
            pytest.raises(ZramfsError, match="another zramfs command has held the lock"),
            rundir.locked(base),
        ):
            pass
    finally:
        release.set()
        holder.join(60)
    with rundir.locked(base):
        pass


def test_a_directory_whose_last_holder_ends_is_not_served(tmp_path: Path) -> None:
    """As of a keeper, which ends a moment after its daemon."""
    held, release = mp.Event(), mp.Event()
    holder = mp.Process(target=_hold, args=(tmp_path, held, release))
    tmp_path.chmod(0o700)
    holder.start()
    assert held.wait(60)
    assert Rundir(tmp_path).is_served() and Rundir(tmp_path).is_served(0.1)
    ending = threading.Timer(0.1, release.set)
    ending.start()
    try:
        assert not Rundir(tmp_path).is_served(60)
    finally:
        ending.join()
        holder.join(60)


def _claim(directory: Path, go: Event, results: object, stay: Event) -> None:
    go.wait(60)
    try:
        new, _ = claim.claim_place(directory, "device", DeviceConfig(), say=lambda _: None)
    except ZramfsError as error:
        results.put((error.errno, error.sentence))
    else:
        results.put((0, str(new.path)))
    stay.wait(60)


def test_of_many_creates_at_once_one_wins(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "device"
    go, stay, results = mp.Event(), mp.Event(), mp.SimpleQueue()
    children = [mp.Process(target=_claim, args=(directory, go, results, stay)) for _ in range(8)]
    for child in children:
        child.start()
    try:
        go.set()
        answers = [results.get() for _ in children]
    finally:
        stay.set()
        for child in children:
            child.join(60)
    winners = [text for code, text in answers if code == 0]
    assert winners == [str(base / paths.escape(directory))]
    losers = [text for code, text in answers if code == errno.EBUSY]
    assert len(losers) == len(children) - 1
    assert all(f"is just being started on {directory} (daemon pid" in text for text in losers)


def _claim_and_die(directory: Path) -> None:
    claim.claim_place(directory, "device", DeviceConfig(), say=lambda _: None)
    os._exit(0)


def test_what_a_dead_process_left_is_cleaned_up_aloud(base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "device"
    child = mp.Process(target=_claim_and_die, args=(directory,))
    child.start()
    child.join(60)
    assert (base / paths.escape(directory) / "state.json").exists()
    said: list[str] = []
    new, _ = claim.claim_place(directory, "device", DeviceConfig(), say=said.append)
    assert len(said) == 1
    assert f"cleaned up {directory}: its daemon (pid {child.pid}, since " in said[0]
    state = new.read()
    assert state is not None
    assert state.pid == os.getpid()
    assert state.made == [str(directory)]
    # And a start that was killed between the directory and its state.
    (new.path / "state.json").unlink()
    said.clear()
    claim.claim_place(directory, "device", DeviceConfig(), say=said.append)
    assert said == [f"cleaned up {new.path}, left by a start that never finished"]


def test_claim_refuses_what_is_no_directory(tmp_path: Path, base: Path) -> None:
    (tmp_path / "file").touch()
    for path, code, sentence in (
        (tmp_path / "file", errno.ENOTDIR, "is not a directory"),
        (
            tmp_path / "no/such",
            errno.ENOENT,
            "does not exist and could not be created: No such file or directory",
        ),
        (Path("/"), errno.EINVAL, "got /, which would hide what zramfs itself needs"),
        (Path("/proc"), errno.EINVAL, "got /proc, which would hide"),
        (base.parent, errno.EINVAL, "which would hide"),
    ):
        with pytest.raises(ZramfsError, match=sentence) as caught:
            claim.claim_place(path, "device", DeviceConfig(), say=lambda _: None)
        assert caught.value.errno == code
    assert rundir.rundirs() == []


def test_find_by_directory_mount_point_and_name(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def device(name: str, **changes: object) -> Rundir:
        made = Rundir(base / name)
        made.path.mkdir()
        made.write(a_state(name=name, **changes))
        return made

    rundir.make_base(base)
    plain = device("a", directory=str(tmp_path / "x"))
    disk = device("b", directory=str(base / "b/tree"), mountpoint=str(tmp_path / "y"))
    (tmp_path / "link").symlink_to(tmp_path / "y")
    assert rundir.find(str(tmp_path / "x")) == rundir.find("a") == plain
    assert rundir.find(str(tmp_path / "y")) == rundir.find("b") == rundir.find(str(tmp_path / "link")) == disk
    assert rundir.find("c") is None
    monkeypatch.chdir(tmp_path)
    assert rundir.find("x") == plain
    odd = device("x", directory="/somewhere")
    with pytest.raises(ZramfsError, match="x means two devices, a .* and x "):
        rundir.find("x")
    shutil.rmtree(odd.path)
