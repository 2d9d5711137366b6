# SPDX-License-Identifier: Apache-2.0
"""Memory cgroups and a /proc made of files."""
from __future__ import annotations

from pathlib import Path

MIB = 1 << 20


class FakeGroup:
    """The files of one memory cgroup. Sizes in MiB, None = no limit."""

    def __init__(self, path: Path, version: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.path = path
        self.version = version
        (path / "cgroup.procs").write_text("")

    def set(self, limit: int | None = None, used: int = 0, *, clean: int = 0, dirty: int = 0,
            high: int | None = None, above: int | None = None) -> FakeGroup:
        """clean, dirty: file pages, which are part of used. high: of version 2. above: the smallest limit
        above, as version 1 tells it."""
        files = (clean + dirty) * MIB
        if self.version == 1:
            none = 9223372036854771712
            self._write("memory.limit_in_bytes", none if limit is None else limit * MIB)
            self._write("memory.usage_in_bytes", used * MIB)
            self._write("memory.stat", (
                f"cache 1\ninactive_file 7\nactive_file 7\nhierarchical_memory_limit "
                f"{none if above is None else above * MIB}\ntotal_dirty {dirty * MIB}\ntotal_writeback 0\n"
                f"total_inactive_file {files}\ntotal_active_file 0"))
        else:
            self._write("memory.max", "max" if limit is None else limit * MIB)
            self._write("memory.high", "max" if high is None else high * MIB)
            self._write("memory.current", used * MIB)
            self._write("memory.stat", (
                f"anon 0\nfile {files}\nfile_dirty {dirty * MIB}\nfile_writeback 0\ninactive_file 0\n"
                f"active_file {files}"))
        return self

    def _write(self, name: str, value: object) -> None:
        (self.path / name).write_text(f"{value}\n")


def meminfo(path: Path, available: int) -> Path:
    """A file like /proc/meminfo of a machine with 8 GiB; available in MiB."""
    path.write_text(f"MemTotal:        8388608 kB\nMemFree:             100 kB\n"
                    f"MemAvailable:    {available * 1024} kB\nBuffers:               4 kB\n")
    return path
