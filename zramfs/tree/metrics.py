# SPDX-License-Identifier: Apache-2.0
"""The files `metrics` and `metrics.prom`: every number that the device knows, in the OpenMetrics text format
and in Prometheus' own, older one.

TABLE (metric_table.py) is all there is to say about them. node_exporter's textfile collector reads the older
format, in which the type of a counter stands with the name of its sample (`x_total`). From OpenMetrics it
takes the numbers, and calls each counter untyped. Every sample has the label `device`.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

# 40 ms and 1.4 MiB that a device whose metrics nobody reads would not need; but one that is read after an
# upgrade has taken the library away must have it.
from prometheus_client import exposition
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.openmetrics import exposition as openmetrics

from zramfs.model.stats import BUCKET_BOUNDS, Latency

from .metric import COUNTER, GAUGE, HISTOGRAM, NS_PER_SECOND, Figures, Metric
from .metric_table import TABLE

if TYPE_CHECKING:
    from zramfs.device.device import Device


def openmetrics_text(device: Device) -> bytes:
    """The content of the file `metrics` at this moment."""
    return openmetrics.generate_latest(_collector(device))


def prometheus_text(device: Device) -> bytes:
    """The content of the file `metrics.prom` at this moment: version 0.0.4 of Prometheus' text format."""
    return exposition.generate_latest(_collector(device))


def _collector(device: Device) -> Collector:
    return Collector(Figures(device.stats(), device.memory(), device.classes()))


class Collector:
    """A prometheus_client collector, and a registry of that alone."""

    def __init__(self, figures: Figures) -> None:
        self._figures = figures

    def collect(self) -> Iterator[Family]:
        name = self._figures.device.name
        for metric in TABLE:
            value = metric.value(self._figures)
            if value is not None:
                yield _family(metric, value if isinstance(value, Mapping) else {(): value}, name)


def _family(metric: Metric, values: Mapping[tuple[str, ...], Any], device: str) -> Family:
    kinds = {COUNTER: CounterMetricFamily, GAUGE: GaugeMetricFamily, HISTOGRAM: HistogramMetricFamily}
    family = kinds[metric.kind](
        f"zramfs_{metric.name}", metric.help, labels=("device", *metric.labels), unit=metric.unit
    )
    for labels, value in values.items():
        # A path may hold bytes that are no text.
        words = [word.encode(errors="replace").decode() for word in (device, *labels)]
        if metric.kind == HISTOGRAM:
            family.add_metric(words, _buckets(value), sum_value=value.ns / NS_PER_SECOND)
        else:
            family.add_metric(words, value)
    return family


def _buckets(latency: Latency) -> list[tuple[str, int]]:
    """Upper bounds in seconds, with the number of requests that took at most that."""
    bounds = [*(str(bound / NS_PER_SECOND) for bound in BUCKET_BOUNDS), "+Inf"]
    total, buckets = 0, []
    for bound, count in zip(bounds, latency.counts, strict=True):
        total += count
        buckets.append((bound, total))
    return buckets
