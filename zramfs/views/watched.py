# SPDX-License-Identifier: Apache-2.0
"""Devices as `zramfs top` watches them: their `metrics` are read again and again, also after the
device has ended.

At most one read of a device is under way. If the device hangs, that same read is waited for until it comes
back, because nothing can end it (see bounded.py).
"""
from __future__ import annotations

import errno
import select
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.model.stats import OPERATIONS

from . import scrape
from .scrape import Scrape

WINDOW = 60.0  # seconds of requests that percentiles and the histogram are of
CURVE = 240  # points of a curve: more than a wide terminal has columns
KEPT = 120  # readings; each takes 100 KiB once the size classes are dropped from it
DEAD = "dead"
# A tree that is still mounted, but whose daemon is gone, answers the first two.
_STATES = {errno.ENOTCONN: DEAD, errno.ECONNABORTED: DEAD, errno.ENOENT: "it has ended"}
ERRORS = {
    "failed_reads_total": "failed reads", "failed_writes_total": "failed writes",
    "protocol_errors_total": "protocol errors", "reply_errors_total": "reply errors",
    "corrupt_total": "corrupt places",
}


@dataclass(frozen=True)
class Reading:
    """when: time.monotonic() seconds."""

    when: float
    scrape: Scrape

    @property
    def ratio(self) -> float | None:
        """Data / memory of the pool."""
        used = self.scrape.number("mem_used_bytes")
        return self.scrape.number("orig_data_bytes") / used if used else None

    def buckets(self, operation: str) -> dict[float, float]:
        """How many requests took at most this number of seconds."""
        counts = self.scrape.by("request_duration_seconds_bucket", "le", operation=operation)
        return {float(bound): count for bound, count in counts.items()}


@dataclass(frozen=True)
class Rates:
    """Between two readings, `seconds` apart. A counter that went down was reset meanwhile, and counts
    from 0."""

    before: Reading
    after: Reading

    @property
    def seconds(self) -> float:
        return max(1e-6, self.after.when - self.before.when)

    def grown(self, name: str, **labels: str) -> float:
        new, old = self.after.scrape.number(name, **labels), self.before.scrape.number(name, **labels)
        return new - old if new >= old else new

    def rate(self, name: str, **labels: str) -> float:
        return self.grown(name, **labels) / self.seconds

    def requests(self, operation: str) -> float:
        return self.rate("request_duration_seconds_count", operation=operation)

    def bytes(self, operation: str) -> float:
        return self.rate("request_bytes_total", operation=operation)

    def mean(self, operation: str) -> float | None:
        """Seconds that a request took, None if there was none."""
        count = self.grown("request_duration_seconds_count", operation=operation)
        return self.grown("request_duration_seconds_sum", operation=operation) / count if count else None

    def histogram(self, *operations: str) -> dict[float, float]:
        """Requests of these kinds by the upper bound, in seconds, of the time that they took."""
        found: dict[float, float] = {}
        for operation in operations or OPERATIONS:
            new, old = self.after.buckets(operation), self.before.buckets(operation)
            if any(new[bound] < old.get(bound, 0) for bound in new):
                old = {}
            below = 0.0
            for bound in sorted(new):
                count = new[bound] - old.get(bound, 0)
                found[bound] = found.get(bound, 0) + count - below
                below = count
        return found


def percentile(histogram: Mapping[float, float], share: float) -> float | None:
    """The time that `share` (0 to 1) of the requests took at most, in seconds: as Prometheus'
    histogram_quantile, evenly spread inside a bucket. None if there was no request."""
    total = sum(histogram.values())
    if not total:
        return None
    below = lower = 0.0
    for bound in sorted(histogram):
        count = histogram[bound]
        if below + count >= share * total and count:
            if bound == float("inf"):
                return lower
            return lower + (bound - lower) * max(0.0, share * total - below) / count
        below += count
        lower = bound
    return lower


class Watched:
    """One device. state: "ready", or why there is nothing new of it. place: what `zramfs stop` takes for it,
    which for a RAM disk is not the directory of its tree."""

    def __init__(self, directory: Path, name: str, place: str | None = None) -> None:
        self.directory = directory
        self.name = name
        self.place = place or str(directory)
        self.state = "not read yet"
        self.readings: deque[Reading] = deque(maxlen=KEPT)
        self.ratios: deque[float] = deque(maxlen=CURVE)
        self._call: bounded.Call | None = None
        self._asked = 0.0

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def advice(self) -> str | None:
        """What to do about the state, None if there is nothing to do but to wait."""
        if self.state == DEAD:
            return f"The daemon is dead, and its data is lost. `zramfs stop {self.place}` cleans up."
        return None

    @property
    def last(self) -> Reading | None:
        return self.readings[-1] if self.readings else None

    @property
    def rates(self) -> Rates | None:
        """Since the reading before the last."""
        return Rates(self.readings[-2], self.readings[-1]) if len(self.readings) > 1 else None

    @property
    def window(self) -> Rates | None:
        """Since the oldest reading that is not older than WINDOW."""
        if len(self.readings) < 2:
            return None
        last = self.readings[-1]
        first = next(each for each in self.readings if each.when >= last.when - WINDOW)
        return Rates(first if first is not last else self.readings[-2], last)

    def ask(self) -> bounded.Call:
        """Begins a read, unless one is under way."""
        if self._call is None:
            self._call = bounded.Call((self.directory / "metrics").read_text)
            self._asked = time.monotonic()
        return self._call

    def take(self) -> None:
        """The answer, which is there."""
        assert self._call is not None
        call, self._call = self._call, None
        try:
            text = call.result(time.monotonic() + bounded.ANSWER_TIMEOUT)
            reading = scrape.parse_metrics(text, f"{self.directory}/metrics")
        except ZramfsError as error:
            self.state = str(error)
        except OSError as error:
            self.state = _STATES.get(error.errno or 0) or f"cannot be read: {error.strerror}"
        else:
            self.state = "ready"
            if self.last is not None:
                self.last.scrape.forget("class_")
            self.readings.append(Reading(time.monotonic(), reading))
            self.ratios.append(self.readings[-1].ratio or 0.0)
            self.name = reading.device

    def late(self) -> None:
        """There is no answer yet."""
        waited = time.monotonic() - self._asked
        if waited >= bounded.ANSWER_TIMEOUT:
            self.state = f"no answer for {waited:.0f} s"

    def close(self) -> None:
        if self._call is not None:
            self._call.abandon()
            self._call = None


def poll_devices(devices: Sequence[Watched], patience: float) -> None:
    """Reads all of them at once, and waits at most `patience` seconds for the slow ones."""
    deadline = time.monotonic() + patience
    waiting = {device.ask().fileno(): device for device in devices}
    while waiting:
        readable, _, _ = select.select(list(waiting), [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            break
        for fd in readable:
            waiting.pop(fd).take()
    for device in waiting.values():
        device.late()


def errors(device: Watched) -> dict[str, tuple[float, float]]:
    """By the kind of error: how many there were in all, and how many since the reading before."""
    found = {}
    if device.last is not None:
        for name, words in ERRORS.items():
            if total := device.last.scrape.number(name):
                found[words] = (total, device.rates.grown(name) if device.rates else 0.0)
    return found
