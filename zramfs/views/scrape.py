# SPDX-License-Identifier: Apache-2.0
"""The file `metrics` of a device, read into numbers by name and labels."""
from __future__ import annotations

import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zramfs.errors import ZramfsError

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric as Family

_PREFIX = "zramfs_"


@dataclass(frozen=True)
class Sample:
    """labels: without `device`."""

    labels: Mapping[str, str]
    value: float


class Scrape:
    """One reading. Names have no prefix zramfs_. A metric that the device does not have is None or empty."""

    def __init__(self, device: str, samples: dict[str, list[Sample]]) -> None:
        self.device = device
        self._samples = samples

    def value(self, name: str, **labels: str) -> float | None:
        for sample in self._samples.get(name, ()):
            if all(sample.labels.get(label) == wanted for label, wanted in labels.items()):
                return sample.value
        return None

    def number(self, name: str, **labels: str) -> float:
        """The value, 0 where there is none."""
        return self.value(name, **labels) or 0.0

    def by(self, name: str, label: str, **labels: str) -> dict[str, float]:
        """Of the samples with `labels`: the sums of their values, by the value of the label `label`."""
        found: dict[str, float] = {}
        for sample in self._samples.get(name, ()):
            if all(sample.labels.get(other) == wanted for other, wanted in labels.items()):
                key = sample.labels[label]
                found[key] = found.get(key, 0.0) + sample.value
        return found

    def labels(self, name: str) -> Mapping[str, str]:
        """Of the first sample."""
        return self._samples[name][0].labels if name in self._samples else {}

    def all_samples(self) -> list[tuple[str, list[Sample]]]:
        """By name, in the order of the file."""
        return list(self._samples.items())

    def forget(self, prefix: str) -> None:
        """Drops the samples whose names begin with `prefix`."""
        for name in [name for name in self._samples if name.startswith(prefix)]:
            del self._samples[name]


def parse_families(text: str, where: str) -> list[Family]:
    """The families of metrics in `text`. Raises ZramfsError(EBADMSG) with `where` in its sentence."""
    # Here, because it takes 50 to 100 ms to load, and few commands need it.
    from prometheus_client.openmetrics.parser import text_string_to_metric_families

    try:
        return list(text_string_to_metric_families(text))
    except (ValueError, KeyError) as error:
        raise _unexpected(where, error) from None


def parse_metrics(text: str, where: str) -> Scrape:
    """Raises ZramfsError(EBADMSG) with `where` in its sentence."""
    samples: dict[str, list[Sample]] = {}
    device = ""
    for family in parse_families(text, where):
        for each in family.samples:
            labels = dict(each.labels)
            try:
                device = labels.pop("device")
            except KeyError as error:
                raise _unexpected(where, error) from None
            samples.setdefault(each.name.removeprefix(_PREFIX), []).append(Sample(labels, each.value))
    return Scrape(device, samples)


def _unexpected(where: str, error: Exception) -> ZramfsError:
    return ZramfsError(
        errno.EBADMSG,
        f"{where} does not read as OpenMetrics of zramfs ({error}); is its daemon of another version?")
