# SPDX-License-Identifier: Apache-2.0
"""Loop devices: attached by util-linux's losetup, and detached by the system call, which works also where no
process can be started."""
from __future__ import annotations

import contextlib
import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

from zramfs.errors import ZramfsError

from . import programs
from .bounded import Patience
from .paths import AS_PATH
from .programs import run

# The size of a page of the device: a smaller sector makes every small write a read-modify-write.
SECTOR_SIZE = 4096
# losetup picks a free device and then claims it; between the two somebody else may have been faster.
_TRIES = 20
_PAUSE = 0.05
_SILENCE = 3.0  # seconds that a command may wait without a word


def attach(disk: Path) -> str:
    """A new loop device on `disk`, with direct I/O: "/dev/loopN". Raises ZramfsError."""
    command = [
        "losetup", "--find", "--show", "--direct-io=on", f"--sector-size={SECTOR_SIZE}", "--", str(disk),
    ]
    for attempt in range(_TRIES):
        done = run(command)
        if done.returncode == 0:
            device = done.stdout.strip()
            _expect_direct(device, disk)
            return device
        if "busy" not in done.stderr:
            break
        time.sleep(_PAUSE * (attempt + 1))
    raise ZramfsError(errno.EIO, f"no loop device for {disk}: {done.stderr.strip()}{_hint(done.stderr)}")


def sequence(device: str) -> int | None:
    """What no other attachment of a block device has had since boot; None before Linux 5.15."""
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/sys/block/{Path(device).name}/diskseq").read_text(encoding="utf-8"))
    return None


def stands_on(device: str, disk: Path, attached: int | None = None) -> bool:
    """Whether `device` stands on `disk`. attached: its sequence() when it did; by that it is told also
    after `disk` was unmounted under it, when the kernel shows another path."""
    shown = backing_file(device)
    return shown == str(disk) or (shown is not None and attached is not None and sequence(device) == attached)


def is_claimed(device: str) -> bool:
    """Whether a file system, swap or another device has the block device for itself."""
    try:
        os.close(os.open(device, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def wait_unclaimed(device: str, timeout: float) -> bool:
    """False if it is still claimed after `timeout` seconds."""
    end = time.monotonic() + timeout
    while is_claimed(device):
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True


def detach(
    device: str, disk: Path, timeout: float = 10.0, attached: int | None = None,
    say: Callable[[str], None] | None = None,
) -> None:
    """Detaches `device` if `disk` is still what it stands on (attached: see stands_on), and waits until
    it really has let go. Without effect when `disk` was unmounted under it and it has been told before:
    then it goes with its last user, who can no longer be found.

    The release of a device in use succeeds and acts at the last close; so success is what sysfs says.
    say: gets a sentence when the wait becomes longer than _SILENCE.
    Raises ZramfsError: EBUSY when it is in use after `timeout` seconds.
    """
    if not stands_on(device, disk, attached) or (backing_file(device) != str(disk) and _told(device)):
        return
    from . import system_calls  # most commands only look

    try:
        system_calls.release_loop(device)
    except OSError as error:
        if stands_on(device, disk, attached):
            raise ZramfsError(
                error.errno or errno.EIO, f"could not detach {device} from {disk}: {error.strerror}"
            ) from None
    begin = time.monotonic()
    end, silent = begin + timeout, begin + _SILENCE
    while stands_on(device, disk, attached):
        if say and time.monotonic() > silent:
            say(f"waiting up to {timeout:g} s until {device} lets go of {disk}")
            say = None
        if time.monotonic() > end:
            raise ZramfsError(
                errno.EBUSY,
                f"{device} is still in use {timeout:g} s after it was detached; it lets go of {disk} "
                "when its last user closes it",
            )
        time.sleep(_PAUSE)


def size(device: str) -> int:
    """Bytes. Raises OSError."""
    return int(Path(f"/sys/block/{Path(device).name}/size").read_text(encoding="utf-8")) * 512


def follow_size(device: str, disk: Path, wanted: int, timeout: float = 5.0) -> None:
    """Has a loop device, which may be in use, take the size of `disk`, and returns when it has `wanted`
    bytes. Raises ZramfsError(EIO), or what the kernel said."""
    from . import system_calls

    end = time.monotonic() + timeout
    while True:
        # The kernel reads the size that it last heard of, and asks the server for it only here. It drops an
        # answer that a write has overtaken, so that one look may not be enough.
        os.stat(disk)
        try:
            system_calls.set_loop_capacity(device)
        except OSError as error:
            raise ZramfsError(
                error.errno or errno.EIO, f"{device} does not take the size of {disk}: {error.strerror}"
            ) from None
        if (now := size(device)) == wanted:
            return
        if time.monotonic() > end:
            raise ZramfsError(
                errno.EIO, f"expected {device} to have {wanted} bytes as {disk} has, and it still has {now}")
        time.sleep(_PAUSE)


def find(disk: Path, dev: str | None = None) -> list[str]:
    """Loop devices that stand on `disk`, by name, as "/dev/loopN".

    By the path in sysfs, which costs the file's server nothing and works when that is dead. With
    dev, "major:minor" of the file system that `disk` is the only file of, those are found too that
    know `disk` by another path (a bind mount, a container); that makes the kernel ask the server.
    """
    found = {name for name in _loops() if backing_file(name) == str(disk)}
    if dev is not None:
        found |= {name for name, number in _backing_devices().items() if number == dev}
    return sorted(found, key=lambda name: (len(name), name))


def backing_file(device: str) -> str | None:
    """The file a loop device stands on, or None."""
    path = f"/sys/block/{Path(device).name}/loop/backing_file"
    with contextlib.suppress(OSError):
        return Path(path).read_text(**AS_PATH).removesuffix("\n")
    return None


def _told(device: str) -> bool:
    """Whether a device goes with its last user, which a release asks for where it is in use."""
    with contextlib.suppress(OSError):
        return Path(f"/sys/block/{Path(device).name}/loop/autoclear").read_text(encoding="utf-8") == "1\n"
    return False


def _loops() -> list[str]:
    """Those that stand on something."""
    return [f"/dev/{name}" for name in os.listdir("/sys/block")
            if name.startswith("loop") and os.path.exists(f"/sys/block/{name}/loop")]


def _backing_devices(timeout: float = 2.0) -> dict[str, str]:
    """Loop device to "major:minor" of its file's file system; empty when some server does not answer."""
    program = programs.find("losetup") if _loops() else None
    if program is None:
        return {}
    import subprocess  # here, as in programs

    losetup = subprocess.Popen(
        [program, "--list", "--json", "--output", "NAME,BACK-MAJ:MIN"], stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=programs.environment())
    assert losetup.stdout is not None
    patience, output = Patience(timeout), b""
    with losetup.stdout as said:
        while patience.wait([said.fileno()]):
            if chunk := os.read(said.fileno(), 65536):
                output += chunk
                continue
            losetup.wait()
            break
        else:
            losetup.kill()
            # Inside a request that the server has read but not answered, it does not die either.
            with contextlib.suppress(subprocess.TimeoutExpired):
                losetup.wait(0.1)
            return {}
    listed = json.loads(output)["loopdevices"] if output.strip() else []
    return {row["name"]: (row["back-maj:min"] or "").strip() for row in listed}


def _expect_direct(device: str, disk: Path) -> None:
    """losetup only warns when direct I/O is refused: then every page would sit in RAM twice."""
    if Path(f"/sys/block/{Path(device).name}/loop/dio").read_text(encoding="utf-8").strip() != "1":
        detach(device, disk)
        raise ZramfsError(
            errno.EINVAL, f"{device} refused direct I/O on {disk}; the kernel log (dmesg) may say why"
        )


def _hint(stderr: str) -> str:
    if not os.path.exists("/dev/loop-control"):
        return "; /dev/loop-control is missing: load the loop module (modprobe loop)"
    if "No such file" in stderr:
        return "; no node /dev/loopN for a new device: without udev or devtmpfs, mknod it (major 7)"
    if "ermission denied" in stderr or "not permitted" in stderr:
        return "; loop devices need root"
    return ""
