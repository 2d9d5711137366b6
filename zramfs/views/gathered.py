# SPDX-License-Identifier: Apache-2.0
"""The `metrics` of several devices as one text, for Prometheus.

Names, helps and types are those that each device's own file says (tree/metric_table.py). Put
together, a family of metrics stands once, with the samples of all devices, as both text formats ask. What
only the one who reads can say is added: how many devices there are, and which of them answered.
"""
from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# 40 ms: only `zramfs metrics` imports this file.
from prometheus_client import exposition
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics

from zramfs.errors import ZramfsError
from zramfs.host import bounded
from zramfs.text.plain import plain

from . import scrape
from .reader import Reader, wait_answers

# By name, help and labels beside `device`.
DEVICES = ("zramfs_devices", "Devices that there are, dead ones included.")
UP = ("zramfs_up", "1 if the device has answered, 0 if it is dead, has failed or hangs.", "kind", "where")


@dataclass(frozen=True)
class Source:
    """A device to be read. directory: of its tree. kind: device, ramdisk or swap. where: what its user calls
    it, and `zramfs stop` takes. dead: why there is nothing to read, None if it is to be read."""

    name: str
    directory: Path
    kind: str
    where: str
    dead: str | None = None


class Gatherer:
    """A collector for prometheus_client, and a registry of that alone. sources: what devices there are, asked
    for each time. warn: takes a sentence about each device that did not answer."""

    def __init__(self, sources: Callable[[], Sequence[Source]], warn: Callable[[str], None]) -> None:
        self._sources = sources
        self._warn = lambda words: warn(plain(words))
        self._readers: dict[Path, Reader] = {}

    def collect(self) -> Iterator[Family]:
        """Every family of every device that answers in time."""
        sources = self._sources()
        found = self._read([source for source in sources if source.dead is None])
        answered: dict[str, Sequence[Family]] = {}
        known: dict[str, Source] = {}
        for source in sources:
            if source.dead is not None:
                self._warn(f"{source.name}: {source.dead}")
            # What a dead device left may have the name of one that lives, in another run directory.
            if source.directory in found and source.name not in answered:
                answered[source.name] = found[source.directory]
                known[source.name] = source
            known.setdefault(source.name, source)
        yield GaugeMetricFamily(*DEVICES, value=len(known))
        up = GaugeMetricFamily(UP[0], UP[1], labels=("device", *UP[2:]))
        for name, source in known.items():
            up.add_metric([_text(word) for word in (name, source.kind, source.where)], int(name in answered))
        yield up
        yield from merged(answered.values())

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()

    def _read(self, sources: Sequence[Source]) -> dict[Path, Sequence[Family]]:
        wanted = {source.directory: source for source in sources}
        for directory in [each for each in self._readers if each not in wanted]:
            self._readers.pop(directory).close()
        for directory in wanted:
            self._readers.setdefault(directory, Reader(directory))
        found: dict[Path, Sequence[Family]] = {}
        answered = wait_answers(list(self._readers.values()), bounded.ANSWER_TIMEOUT)
        for directory, reader in self._readers.items():
            name = wanted[directory].name
            if reader not in answered:
                self._warn(f"{name}: it has not answered for {reader.waited:.0f} s")
                continue
            try:
                found[directory] = _expect_own(scrape.parse_families(reader.take(), str(reader.path)), name)
            except ZramfsError as error:
                self._warn(f"{name}: {error}")
            except OSError as error:
                self._warn(f"{name}: {reader.path}: {error.strerror}")
        return found


def _text(word: str) -> str:
    # A path may hold bytes that are no text.
    return word.encode(errors="replace").decode()


def _expect_own(families: Sequence[Family], name: str) -> Sequence[Family]:
    """Raises ZramfsError(EBADMSG) if a sample says that it is of another device: it could stand twice."""
    for family in families:
        for sample in family.samples:
            if sample.labels.get("device") != _text(name):
                raise ZramfsError(
                    errno.EBADMSG,
                    f"expected samples of the device {name}, got one of {sample.labels.get('device')!r}")
    return families


def merged(found: Iterable[Sequence[Family]]) -> Iterator[Family]:
    """Each family once, with the samples of all that have it. Of two types, as daemons of different versions
    may have, the first stays."""
    families: dict[str, Family] = {}
    for device in found:
        for family in device:
            known = families.setdefault(family.name, family)
            if known is not family and known.type == family.type:
                known.samples.extend(family.samples)
    yield from families.values()


def to_prometheus(gatherer: Gatherer) -> bytes:
    """Version 0.0.4 of Prometheus' text format, which node_exporter's textfile collector reads."""
    return exposition.generate_latest(gatherer)


def to_openmetrics(gatherer: Gatherer) -> bytes:
    return openmetrics.generate_latest(gatherer)
