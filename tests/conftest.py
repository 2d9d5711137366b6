# SPDX-License-Identifier: Apache-2.0
"""What every test shares: a place of its own, the machine's capabilities, nothing left behind."""
from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import pytest_timeout

from tests.support import capabilities, leftovers, scale, shares, zygote
from tests.support.guardian import Guardian

# A busy machine is no failure, and neither is one that is slow to draw examples.
hypothesis.settings.register_profile(
    "zramfs", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("zramfs")
# The directories of tests/ in the order in which they run: the lowest layer first, so that the first failure
# is the nearest to its cause.
LAYERS = (
    "allocator", "text", "codecs", "store", "lane", "host", "keeper", "image", "device", "tree", "daemon",
    "lifecycle",
    "configuration", "views", "doctor", "cli", "docs", "packaging", "machine", "benchmarks", "soak",
)
# scripts/test runs processes side by side, which share the files (tests/support/shares.py). The first takes
# the tests of these that require swap or memcg, so that they never meet. They use swap, and the machine has
# one set of swap areas and one vm.min_free_kbytes. Or they fill a memory group, which swap of others would
# make larger. The other tests of these files, 116 beside 72, are for any share.
SWAP = {
    "benchmarks/cases_test.py", "cli/status_test.py", "configuration/apply_test.py", "daemon/kills_test.py",
    "daemon/shortage_test.py", "lifecycle/lost_test.py",
    "lifecycle/stop_test.py", "lifecycle/swap_test.py", "machine/data_path_test.py",
    "machine/filesystems_test.py", "machine/ltp_test.py", "machine/scripts_test.py",
    "machine/swap_kills_test.py", "machine/swap_load_test.py", "machine/systemd_test.py",
}
EXCLUSIVE = {"swap", "memcg"}
# And the second takes these: files, or tests by the beginning of their names. The first five drop the caches
# of the machine, upon which the kernel compacts its own zram devices. The others compare ours with those.
CACHES = (
    "lifecycle/ramdisk_test.py::test_a_file_system_from_one_command",
    "lifecycle/upgrade_test.py::test_a_ram_disk_keeps_its_files",
    "machine/governor_test.py", "machine/sharing_test.py",
    "machine/writeback_test.py::test_a_file_system_whose_pages",
    "machine/differences_test.py", "machine/differential_test.py", "machine/differential_random_test.py",
    "benchmarks/fragmentation_test.py", "benchmarks/run_test.py",
)
# It alone takes minutes, and would be the last to end if it came when its layer does.
LONGEST = "packaging/packages_test.py"
# In these (files, or tests by the beginning of their names) each command is the program itself: they are
# about the program, its memory, its processes or its speed. Elsewhere zramfs() forks a process that has
# loaded all of it (tests/support/zygote.py).
FRESH = (
    "cli/create_stop_test.py", "cli/help_test.py", "cli/loaded_test.py", "cli/questions_test.py",
    "cli/surroundings_test.py", "cli/users_test.py", "lane/mounted_life_test.py", "tree/contents_test.py",
    "tree/mounted_test.py", "machine/data_path_test.py", "machine/ltp_test.py",
    "machine/memory_groups_test.py",
    "machine/scripts_test.py", "machine/secrets_test.py", "machine/swap_kills_test.py",
    "machine/swap_load_test.py", "machine/systemd_test.py", "machine/tools_test.py",
    "daemon/daemon_test.py", "daemon/own_mount_test.py", "daemon/service_test.py", "daemon/shortage_test.py",
    "daemon/kills_test.py::test_the_memory_of",
    "doctor/", "packaging/", "benchmarks/", "soak/",
)
# Half of what select(2) can wait for.
MOST_DESCRIPTORS = 512
TRACEBACK = "Traceback (most recent call last)"
GUARDIAN = pytest.StashKey[Guardian]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--soak", type=float, default=0.0, metavar="MINUTES",
        help="run the tests of tests/soak for about this many minutes together instead of one",
    )
    parser.addoption(
        "--full", action="store_true",
        help="all rounds, kills, bytes and examples, as in CI, not a part of them (tests/support/scale.py)",
    )
    parser.addoption(
        "--share", type=int, metavar="N",
        help="run the files that no other share has taken, and those that only this one may run: one of the "
        "processes of scripts/test",
    )
    parser.addoption("--claims", type=Path, metavar="DIR", help="where shares note the files that they take")
    parser.addoption(
        "--clean-room", action="store_true",
        help="also install the packages on a new Debian (tests/packaging/clean_room_test.py)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.option.full:
        os.environ[scale.ENVIRONMENT] = "1"
    for line in (
        "requires(*words): skip unless the machine has these; see capabilities.py",
        "soak: runs longer with --soak, and has its time limit stretched with it",
        "clean_room: runs with --clean-room only",
    ):
        config.addinivalue_line("markers", line)
    if not config.option.collectonly:
        leftovers.sweep(leftovers.of_dead_runs)
        leftovers.sweep_directories()
        config.stash[GUARDIAN] = Guardian()  # before the name is in the environment: it is no leftover
    # In the background a shell has us ignore Ctrl-C, and nohup a hang-up, which every program that we start
    # would inherit.
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
    # Ours must behave as on a machine where nobody has set this: what is written late fails late.
    os.environ.pop("PYTHONUNBUFFERED", None)
    # A program that compiles its modules at each start takes half as long again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    owner = leftovers.owner_name()
    # Everything temporary gets the run's name into its path: mount points, sockets, run directories.
    home = Path(tempfile.gettempdir()) / owner
    if config.option.basetemp is None:
        config.option.basetemp = str(home / "pytest")
    home.mkdir(mode=0o755, exist_ok=True)
    os.environ["TMPDIR"] = tempfile.tempdir = str(home)
    os.environ[leftovers.ENVIRONMENT] = owner
    # kill -USR1 PID shows where a hanging run stands; a copy of stderr, since capturing replaces it.
    faulthandler.register(signal.SIGUSR1, file=os.fdopen(os.dup(2), "w"), all_threads=True)


def _name(nodeid: str) -> str:
    """FILE::TEST, below tests/."""
    return nodeid.partition("/")[2]


def _file(nodeid: str) -> str:
    return _name(nodeid).partition("::")[0]


def _layer(nodeid: str) -> int:
    file = _file(nodeid)
    directory = file.partition("/")[0]
    if directory not in LAYERS:
        raise pytest.UsageError(f"tests/{directory} has no place in LAYERS of tests/conftest.py; add it")
    return LAYERS.index(directory)


def _only_share(item: pytest.Item) -> int:
    """The one share that may run it; 0 for any."""
    wanted = {word for mark in item.iter_markers("requires") for word in mark.args}
    if _file(item.nodeid) in SWAP and wanted & EXCLUSIVE:
        return 1
    return 2 if _name(item.nodeid).startswith(CACHES) else 0


def pytest_runtestloop(session: pytest.Session) -> bool | None:
    option = session.config.option
    if not option.share or option.collectonly or session.testsfailed:
        return None  # pytest's own
    shares.run(session, option.claims, _only_share)
    return True


def pytest_timeout_set_timer(item: pytest.Item, settings: pytest_timeout.Settings) -> None:
    if guardian := item.config.stash.get(GUARDIAN, None):
        guardian.limit(settings.timeout or 0)


def pytest_timeout_cancel_timer(item: pytest.Item) -> None:
    if guardian := item.config.stash.get(GUARDIAN, None):
        guardian.limit(0)


def pytest_unconfigure(config: pytest.Config) -> None:
    zygote.end()
    if guardian := config.stash.get(GUARDIAN, None):
        guardian.end()


def pytest_report_header() -> list[str]:
    words = [*capabilities.PROBES, "fio", "qemu-img"]
    lacking = {word: reason for word in words if (reason := capabilities.missing(word))}
    lines = ["machine has: " + " ".join(word for word in words if word not in lacking)]
    lines += [f"machine lacks: {word}: {reason}" for word, reason in lacking.items()]
    return lines


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _layer(item.nodeid))
    for item in items:
        uses_swap = any("swap" in mark.args for mark in item.iter_markers("requires"))
        if uses_swap and _file(item.nodeid) not in SWAP:
            raise pytest.UsageError(f"{item.nodeid} uses swap: add its file to SWAP in tests/conftest.py")
    share = config.getoption("share")
    left_out = {
        item for item in items
        if (item.get_closest_marker("clean_room") and not config.getoption("clean_room"))
        or (share and _only_share(item) not in (0, share))
    }
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
    if share:  # what the others can't take from it, or what is longest, comes first
        first = LONGEST if share > 2 else ""
        items.sort(key=lambda item: not _only_share(item) and _file(item.nodeid) != first)
    factor = max(1.0, config.getoption("soak"))
    limit = float(config.getini("timeout"))
    for item in items:
        if item.get_closest_marker("soak"):
            own = item.get_closest_marker("timeout")
            item.add_marker(pytest.mark.timeout((own.args[0] if own else limit) * factor), append=False)


def pytest_runtest_setup(item: pytest.Item) -> None:
    zygote.fresh = _name(item.nodeid).startswith(FRESH)
    for mark in item.iter_markers("requires"):
        capabilities.require(*mark.args)


@pytest.fixture
def home() -> Iterator[Path]:
    """A directory of this user, readable for all: not tmp_path, which pytest makes private to root."""
    directory = Path(tempfile.mkdtemp())
    directory.chmod(0o755)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _logs() -> dict[Path, str]:
    """What the daemons of this run have logged so far."""
    places = [leftovers.RUN_DIRECTORIES.glob(f"*{leftovers.owner_name()}*/log")]
    if own := os.environ.get("ZRAMFS_RUN_DIR"):
        places.append(Path(own).glob("*/log"))
    found = {}
    for log in itertools.chain(*places):
        with contextlib.suppress(FileNotFoundError):
            found[log] = log.read_text(errors="replace")
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """A daemon never meets an exception that it does not expect, whatever the test looks at."""
    before = _logs()
    result = yield
    for log, text in _logs().items():
        new = text.removeprefix(before.get(log, ""))
        if TRACEBACK in new:
            pytest.fail(f"the daemon logged an unexpected exception in {log}:\n{new[-4000:]}", pytrace=False)
    return result


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """After the last test of a file nothing of this run may stand on the machine any more."""
    result = yield
    if nextitem is None or nextitem.path != item.path:
        if len(os.listdir("/proc/self/fd")) > MOST_DESCRIPTORS:
            gc.collect()  # an arena or a device in a circle of references keeps its own until then
        mine = leftovers.owner_name()
        found = leftovers.sweep(lambda owner: owner == mine, patience=30.0)
        if found:
            pytest.fail(f"{item.path.name} left behind: " + "; ".join(map(str, found)), pytrace=False)
    return result


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(exitstatus: int) -> None:
    """A failed run keeps its files for a look; the next run removes them."""
    home = Path(tempfile.gettempdir())
    mine = leftovers.owner_name()
    # Never reach into something that is still mounted below.
    if exitstatus == 0 and home.name == mine and not leftovers.find(lambda owner: owner == mine):
        shutil.rmtree(home, ignore_errors=True)
