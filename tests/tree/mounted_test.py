# SPDX-License-Identifier: Apache-2.0
"""The tree as the kernel mounts it, served by the daemon in a child process."""
from __future__ import annotations

import errno
import os
import random
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.child import TIMEOUT
from tests.support.kernel_zram import kernel_zram
from tests.support.served import served_device
from tests.support.whole import run
from zramfs.text.sizes import format_time
from zramfs.tree.attributes import ATTRIBUTES

pytestmark = pytest.mark.requires("fuse")

MIB = 1 << 20
# Of kernels with several algorithms and write-back only; the one at hand may lack them.
OPTIONAL = {
    "recomp_algorithm", "recompress", "backing_dev", "writeback", "writeback_limit", "writeback_limit_enable",
    "writeback_batch_size", "compressed_writeback", "bd_stat",
}
COMMON = [a for a in ATTRIBUTES if a.name not in OPTIONAL]
READABLE = [a.name for a in COMMON if a.show]


@pytest.fixture
def served(tmp_path):
    with served_device(tmp_path / "dev") as child:
        yield child
        assert child.stop() == 0, child.log
        assert "Traceback" not in child.log
        assert child.mounts() == []
        assert "TEARDOWN" in child.said


@pytest.fixture
def kernel():
    """The attributes of a device of our own at the live kernel."""
    with kernel_zram() as zram:
        yield zram.directory


def shell(command: str, directory: Path) -> tuple[int, str]:
    """Status and stdout; the words of an error are compared, its program's name is not."""
    done = run("bash", "-c", command, cwd=directory, check=False)
    return done.returncode, done.stdout + done.stderr.rpartition(": ")[2]


# Each is done in the directory of the attributes of both devices, and must have the same outcome.
def _open(name, flags, *then):
    def run(directory):
        fd = os.open(directory / name, flags)
        try:
            return [step(fd) for step in then]
        finally:
            os.close(fd)
    return run


def _path(call, name, *arguments):
    return lambda directory: call(directory / name, *arguments)


def _read(size, offset=None):
    return lambda fd: os.read(fd, size) if offset is None else os.pread(fd, size, offset)


def _write(data, offset=None):
    return lambda fd: os.write(fd, data) if offset is None else os.pwrite(fd, data, offset)


def _seek(offset, whence=os.SEEK_SET):
    return lambda fd: os.lseek(fd, offset, whence)


W, R, RW = os.O_WRONLY, os.O_RDONLY, os.O_RDWR
LIKE_SYSFS = {
    "write-only for reading": _open("reset", R),
    "write-only for both": _open("compact", RW),
    "read-only for writing": _open("mm_stat", W),
    "read-only for both": _open("mm_stat", RW),
    "both": _open("disksize", RW, _read(10), _write(b"0")),
    "truncate on open": _open("mem_limit", W | os.O_TRUNC, _write(b"1M")),
    "append": _open("mem_limit", W | os.O_APPEND, _write(b"2M"), _write(b"3M\n")),
    "truncate and append": _open("disksize", RW | os.O_TRUNC | os.O_APPEND, _read(10)),
    "create what is there": _open("mem_limit", W | os.O_CREAT | os.O_TRUNC, _write(b"0")),
    "create what is not there": _open("nothing", W | os.O_CREAT),
    "open what is not there": _open("nothing", R),
    "open a directory for writing": _open(".", W),
    "O_EXCL": _open("disksize", RW | os.O_CREAT | os.O_EXCL),
    "read in pieces": _open("mm_stat", R, _read(1), _read(5), _read(100), _read(100)),
    "read at places": _open("mm_stat", R, _read(9, 5), _read(9, 80), _read(9, 4096), _read(9, 0)),
    "seek": _open("mm_stat", R, _seek(3), _read(8), _seek(0), _read(4), _seek(2, os.SEEK_CUR), _read(3),
                  _seek(0, os.SEEK_END), _read(3)),
    "write at a place": _open("mem_limit", W, _write(b"4M", 100), _write(b"5M", 0), _seek(7), _write(b"6M")),
    "an empty write": _open("mem_limit", W, _write(b"")),
    "a long write": _open("mem_limit", W, _write(b"1M" + b" " * 6000)),
    "a failed write": _open("mem_limit", W, _write(b"junk")),
    "a failed empty number": _open("disksize", W, _write(b"\n")),
    "fsync": _open("mm_stat", R, lambda fd: os.fsync(fd)),
    "ftruncate": _open("mem_limit", W, lambda fd: os.ftruncate(fd, 0), lambda fd: os.ftruncate(fd, 9999)),
    "truncate": _path(os.truncate, "disksize", 0),
    "truncate the read-only": _path(os.truncate, "mm_stat", 0),
    "utime": _path(os.utime, "disksize", (1, 2)),
    "times": lambda d: ((d / "disksize").stat().st_atime, (d / "disksize").stat().st_mtime),
    "size": lambda d: {name: (d / name).stat().st_size for name in READABLE},
    "modes": lambda d: {a.name: oct((d / a.name).stat().st_mode) for a in COMMON},
    "owners": lambda d: {((d / a.name).stat().st_uid, (d / a.name).stat().st_gid) for a in COMMON},
    "chmod": _path(os.chmod, "disksize", 0o600),
    "the mode": lambda d: oct((d / "disksize").stat().st_mode),
    "chown": _path(os.chown, "io_stat", 12, 34),
    "the owner": lambda d: ((d / "io_stat").stat().st_uid, (d / "io_stat").stat().st_gid),
    "make a write-only file readable": _path(os.chmod, "reset", 0o600),
    "open a write-only file": _open("reset", R),
    "read a write-only file": _open("reset", R, _read(10)),
    "make a file closed": _path(os.chmod, "disksize", 0),
    "open a closed file": _open("disksize", R),
    "write to a closed file": _open("disksize", W),
    "and back": _path(os.chmod, "disksize", 0o644),
    "mkdir": _path(os.mkdir, "new"),
    "unlink": _path(os.unlink, "mm_stat"),
    "rename": lambda d: os.rename(d / "mm_stat", d / "new"),
    "symlink": lambda d: os.symlink("mm_stat", d / "new"),
    "link": lambda d: os.link(d / "mm_stat", d / "new"),
    "mknod": _path(os.mknod, "new"),
    "mkfifo": _path(os.mkfifo, "new"),
    "rmdir of a file": _path(os.rmdir, "mm_stat"),
    "readlink": _path(os.readlink, "mm_stat"),
    "access": lambda d: [os.access(d / "reset", how) for how in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)],
    "statvfs": lambda d: [getattr(os.statvfs(d), f"f_{name}") for name in
                          ("bsize", "frsize", "blocks", "bfree", "files", "ffree", "namemax")],
    "echo": lambda d: shell("echo 7M > mem_limit && echo 8M >> mem_limit && echo 9M >| mem_limit", d),
    "echo something wrong": lambda d: shell("echo junk > mem_limit", d),
    "echo into the read-only": lambda d: shell("echo 1 > mm_stat", d),
    "cat the write-only": lambda d: shell("cat mem_limit", d),
    "cat": lambda d: shell("cat disksize initstate io_stat mm_stat", d),
    "dd a byte at a time": lambda d: shell("dd if=mm_stat bs=1 status=none", d),
    "dd writes": lambda d: shell("printf 3M | dd of=mem_limit conv=fsync status=none; cat mm_stat", d),
    "dd writes bytes": lambda d: shell("printf 21 | dd of=mem_limit bs=1 status=none; cat mm_stat", d),
    "head": lambda d: shell("head -c 12 mm_stat; head -n 1 disksize; wc -c < mm_stat", d),
    "tee": lambda d: shell("echo 5M | tee mem_limit mem_used_max", d),
    "cp": lambda d: shell("cp mm_stat /dev/stdout; cp disksize disksize", d),
    "read a line": lambda d: shell("read -r line < disksize && echo $line", d),
    "read lines": lambda d: shell("mapfile -t lines < io_stat; echo ${#lines[@]}", d),
    "grep": lambda d: shell("grep -c . mm_stat; grep -H 1 initstate disksize", d),
    "stat": lambda d: shell("stat -c '%a %s %h %F' mm_stat reset", d),
    "find": lambda d: shell("find . -maxdepth 1 -name 'm*_*' -size 8 -type f -printf '%P\\n' | sort", d),
}


def outcome(action, directory: Path):
    try:
        return action(directory)
    except OSError as error:
        return errno.errorcode[error.errno]


@pytest.mark.requires("root", "zram")
def test_file_operations_end_as_in_sysfs(served, kernel):
    ours = served.directory / "zram"
    os.utime(kernel / "disksize", (5, 6))
    different = {}
    for name, action in LIKE_SYSFS.items():
        theirs, got = outcome(action, kernel), outcome(action, ours)
        if theirs != got:
            different[name] = (theirs, got)
    assert different == {}


def test_polling_one_descriptor_shows_what_is_new(served):
    served.write("zram/disksize", "16M")
    with open(served.directory / "zram/mm_stat", "rb", buffering=0) as file:
        seen = []
        for number in range(3):
            with open(served.disk, "r+b", buffering=0) as disk:
                disk.seek(number * 4096)
                disk.write(os.urandom(4096))
            file.seek(0)
            seen.append(int(file.read(9)))
            # The rest belongs to the same moment, although the device goes on.
            rest = file.read(4096)
            assert rest.split()[0] == b"%d" % seen[-1]
    assert seen == [4096, 8192, 12288]


def test_listing(served):
    done = run("ls", "-laR", ".", cwd=served.directory)
    assert done.stderr == ""
    assert f"disk -> {served.rundir}/disk" in done.stdout
    assert sorted(os.listdir(served.directory)) == [
        "control", "disk", "memory", "metrics", "metrics.prom", "peek", "zram", "zsmalloc"
    ]
    assert os.listdir(served.directory / "zram") == [*(a.name for a in ATTRIBUTES), "block_state"]
    # find goes by the link count of directories.
    done = run("find", ".", "-type", "f", cwd=served.directory)
    found = {line.removeprefix("./") for line in done.stdout.splitlines()}
    assert found > {f"zram/{a.name}" for a in ATTRIBUTES}
    assert len(found) == sum(len(files) for _, _, files in os.walk(served.directory)) - 1
    for entry in os.scandir(served.directory / "zram"):
        assert entry.inode() == entry.stat().st_ino


def test_a_device_lives_through_disksize_and_reset(served, tmp_path):
    assert served.read("zram/initstate") == "0\n" and served.disk.stat().st_size == 0
    served.write("control", "comp_algorithm=zstd:1\nmem_limit=64M\ndisksize=32M\n")
    assert served.disk.stat().st_size == 32 * MIB
    data = random.Random(3).randbytes(MIB) + b"again and " * 100000
    with open(served.disk, "r+b", buffering=0) as disk:
        disk.write(data)
        with pytest.raises(OSError) as caught:
            served.write("zram/reset", "1\n")
        assert caught.value.errno == errno.EBUSY
    assert served.disk.read_bytes()[:len(data)] == data
    orig, compressed, used = map(int, served.read("zram/mm_stat").split()[:3])
    assert orig == 2052096 and MIB < compressed < used < 1.1 * MIB
    total = served.read("zsmalloc/classes").splitlines()[-1].split()
    assert total[0] == "Total" and int(total[-2]) * 4096 == used
    assert served.read("memory/buddyinfo").startswith("Node 0, zone    arena ")
    state = served.read("control")
    assert "size         32M" in state and "algorithm    zstd, level 1" in state and "(EBUSY)" in state
    # A close is done when close(2) returns, however soon the reset comes.
    for _ in range(20):
        with open(served.disk, "rb", buffering=0) as disk:
            disk.read(4096)
        served.write("zram/reset", "1")
        assert served.disk.stat().st_size == 0
        served.write("zram/disksize", "1M")
        assert served.disk.stat().st_size == MIB
        assert served.disk.read_bytes() == bytes(MIB)


def test_a_failed_write_to_disk_is_counted_and_logged_once(served):
    served.write("control", "mem_limit=1M\ndisksize=16M")
    with open(served.disk, "r+b", buffering=0) as disk, pytest.raises(OSError) as caught:
        for _ in range(4):
            disk.write(os.urandom(MIB))
    assert caught.value.errno == errno.ENOSPC
    failed = int(served.read("zram/io_stat").split()[1])
    assert failed >= 1
    until = time.monotonic() + TIMEOUT
    while "failed_writes went from 0" not in served.log:
        assert time.monotonic() < until, served.log
        time.sleep(0.1)
    assert served.log.count("failed_writes went") == 1


def test_metrics_of_real_requests(served):
    served.write("zram/disksize", "64M")
    with open(served.disk, "r+b", buffering=0) as disk:
        for size in (1, 512, 4096, 65536, MIB):
            disk.write(os.urandom(size))
        disk.seek(0)
        while disk.read(100_000):
            pass
        os.fsync(disk)
    # In small pieces, which are of one moment all the same.
    with open(served.directory / "metrics", "rb", buffering=0) as file:
        text = b"".join(iter(lambda: file.read(1000), b"")).decode()
    numbers = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "device"}
            numbers[sample.name.removeprefix("zramfs_"), *labels.values()] = sample.value
    r, _, rs, r_ms, w, _, ws, w_ms, *_ = map(int, served.read("zram/stat").split())
    for operation, requests, ms in (("read", r, r_ms), ("write", w, w_ms)):
        assert numbers["request_duration_seconds_count", operation] == requests > 0
        assert int(numbers["request_duration_seconds_sum", operation] * 1000) == ms
    assert numbers["request_bytes_total", "read"] == rs * 512 == 64 * MIB
    assert numbers["request_bytes_total", "write"] // 512 == ws
    stat = [int(word) for word in served.read("zram/mm_stat").split()]
    assert [numbers[f"{name}_bytes",] for name in ("orig_data", "compr_data", "mem_used")] == stat[:3]
    longest = numbers["longest_request_seconds",]
    assert 0 < longest <= max(numbers["request_duration_seconds_sum", name] for name in ("read", "write"))
    assert f"the longest took {format_time(longest)}" in served.read("control")


def test_many_at_once(served):
    """Readers of everything, a writer of commands, and users of disk, for two seconds."""
    served.write("zram/disksize", "64M")
    loops = [
        "while :; do cat zram/*stat control metrics zsmalloc/classes memory/* > /dev/null || exit 1; done",
        "while :; do ls -lR . > /dev/null || exit 1; done",
        "while :; do echo 1 > zram/compact || exit 1; done",
        "while :; do printf 'mem_limit=1G\\ncompact\\nmem_limit=0\\n' > control || exit 1; done",
        "while :; do echo junk 2> /dev/null > zram/mem_limit && exit 1; done",
        "while :; do head -c 3000000 /dev/urandom | dd of=disk conv=notrunc bs=60K seek=$((RANDOM % 500)) "
        "status=none || exit 1; fallocate -p -o $((RANDOM * 999)) -l 999999 disk || exit 1; done",
    ]
    workers = [
        subprocess.Popen(
            ["timeout", "2", "bash", "-c", loop], cwd=served.directory, stderr=subprocess.DEVNULL
        )
        for loop in loops
    ]
    assert [worker.wait(TIMEOUT) for worker in workers] == [124] * len(loops)
    assert served.read("zram/initstate") == "1\n"
