# SPDX-License-Identifier: Apache-2.0
"""Devices as `zramfs top` watches them: their `metrics` are read again and again, also after the
device has ended."""
from __future__ import annotations

import errno
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.model.stats import OPERATIONS

from . import scrape
from .reader import Reader, wait_answers
from .scrape import Scrape

WINDOW = 60.0  # seconds of requests that percentiles and the histogram are of
CURVE = 400  # points of a graph: more than a wide terminal has columns
KEPT = 120  # readings; each takes 100 KiB once the size classes are dropped from it
DEAD, ENDED = "dead", "it has ended"
# A tree that is still mounted, but whose daemon is gone, answers the first two.
_STATES = {errno.ENOTCONN: DEAD, errno.ECONNABORTED: DEAD, errno.ENOENT: ENDED}
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


@dataclass(frozen=True)
class Point:
    """What the graphs show of one look: bytes a second that were read and written, data / memory, and bytes
    of memory. None: not known, as of a device that did not answer."""

    io: float | None = None
    ratio: float | None = None
    memory: float | None = None


@dataclass(frozen=True)
class Place:
    """Where a device is. directory: of its tree. where: what `zramfs stop` takes for it, which for a RAM disk
    is not that directory. mounted: where a file system on it is mounted, or [SWAP]; None for neither."""

    directory: Path
    name: str
    where: str
    mounted: str | None = None


class Watched:
    """One device. state: "ready", or why there is nothing new of it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.state = "not read yet"
        self.readings: deque[Reading] = deque(maxlen=KEPT)
        self.points: deque[Point] = deque(maxlen=CURVE)
        self.reader = Reader(place.directory)

    @property
    def name(self) -> str:
        return self.place.name

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    @property
    def advice(self) -> str | None:
        """What to do about the state, None if there is nothing to do but to wait."""
        if self.state == DEAD:
            return f"The daemon is dead, and its data is lost. `zramfs stop {self.place.where}` cleans up."
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

    def take(self) -> None:
        """The answer, which is there."""
        try:
            reading = scrape.parse_metrics(self.reader.take(), str(self.reader.path))
        except ZramfsError as error:
            self.state = str(error)
        except OSError as error:
            self.state = _STATES.get(error.errno or 0) or f"cannot be read: {error.strerror}"
        else:
            self.state = "ready"
            self.place = replace(self.place, name=reading.device)
            self.note(Reading(time.monotonic(), reading))
            return
        self.points.append(Point())

    def note(self, reading: Reading) -> None:
        """Takes a reading as the last one."""
        if self.last is not None:
            self.last.scrape.forget("class_")
        self.readings.append(reading)
        rates = self.rates
        io = rates.bytes("read") + rates.bytes("write") if rates else None
        self.points.append(Point(io, reading.ratio, reading.scrape.number("mem_used_bytes")))

    def late(self) -> None:
        """There is no answer yet."""
        self.points.append(Point())
        if self.reader.waited >= bounded.ANSWER_TIMEOUT:
            self.state = f"no answer for {self.reader.waited:.0f} s"

    def close(self) -> None:
        self.reader.close()


def poll_devices(devices: Sequence[Watched], patience: float) -> None:
    """Reads all of them at once, and waits at most `patience` seconds for the slow ones."""
    answered = wait_answers([device.reader for device in devices], patience)
    for device in devices:
        if device.reader in answered:
            device.take()
        else:
            device.late()


def errors(device: Watched) -> dict[str, tuple[float, float]]:
    """By the kind of error: how many there were in all, and how many since the reading before."""
    found = {}
    if device.last is not None:
        for name, words in ERRORS.items():
            if total := device.last.scrape.number(name):
                found[words] = (total, device.rates.grown(name) if device.rates else 0.0)
    return found
