# SPDX-License-Identifier: Apache-2.0
"""The files `metrics` and `metrics.prom`: every number that the device knows, in the OpenMetrics text format
and in Prometheus' own, older one.

TABLE (metric_table.py) is all there is to say about them. node_exporter's textfile collector reads the older
format, in which the type of a counter stands with the name of its sample (`x_total`). From OpenMetrics it
takes the numbers, and calls each counter untyped. Every sample has the label `device`.

The text is not made by prometheus_client, which brings an HTTP server and more: 2 MiB in each process of each
device, all of it locked where the device is swap. The tests read the text with that library, and have it
write the same.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from zramfs.model.stats import BUCKET_BOUNDS, Latency

from .metric import COUNTER, HISTOGRAM, NS_PER_SECOND, Figures, Metric, Number
from .metric_table import TABLE

if TYPE_CHECKING:
    from zramfs.device.device import Device

_MOST_DIGITS = 6  # before the point, without an exponent
_ESCAPED = str.maketrans({"\\": r"\\", "\n": r"\n", '"': r'\"'})


def openmetrics_text(device: Device) -> bytes:
    """The content of the file `metrics` at this moment: version 1.0.0 of OpenMetrics."""
    return openmetrics_of(figures_of(device))


def openmetrics_of(figures: Figures) -> bytes:
    """As openmetrics_text()."""
    lines = []
    for metric, values in _families(figures):
        name = f"zramfs_{metric.name}"
        lines += [f"# HELP {name} {metric.help.translate(_ESCAPED)}", f"# TYPE {name} {metric.kind}"]
        if metric.unit:
            lines.append(f"# UNIT {name} {metric.unit}")
        lines += _samples(metric, values, figures.device.name)
    return _encoded([*lines, "# EOF"])


def prometheus_text(device: Device) -> bytes:
    """The content of the file `metrics.prom` at this moment: version 0.0.4 of Prometheus' text format."""
    return prometheus_of(figures_of(device))


def prometheus_of(figures: Figures) -> bytes:
    """As prometheus_text()."""
    lines = []
    for metric, values in _families(figures):
        name = f"zramfs_{metric.name}{_ending(metric)}"
        text = metric.help.replace("\\", r"\\").replace("\n", r"\n")
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {metric.kind}"]
        lines += _samples(metric, values, figures.device.name)
    return _encoded(lines)


def figures_of(device: Device) -> Figures:
    return Figures(device.stats(), device.memory(), device.classes())


def _families(figures: Figures) -> Iterator[tuple[Metric, Mapping[tuple[str, ...], Any]]]:
    for metric in TABLE:
        value = metric.value(figures)
        if value is not None:
            yield metric, value if isinstance(value, Mapping) else {(): value}


def _ending(metric: Metric) -> str:
    return "_total" if metric.kind == COUNTER else ""


def _samples(metric: Metric, values: Mapping[tuple[str, ...], Any], device: str) -> Iterator[str]:
    for words, value in values.items():
        labels = dict(zip(("device", *metric.labels), (device, *words), strict=True))
        if metric.kind == HISTOGRAM:
            yield from _histogram(f"zramfs_{metric.name}", labels, value)
        else:
            yield _sample(f"zramfs_{metric.name}{_ending(metric)}", labels, value)


def _histogram(name: str, labels: dict[str, str], latency: Latency) -> Iterator[str]:
    """Upper bounds in seconds, with the number of requests that took at most that."""
    bounds = [*(str(bound / NS_PER_SECOND) for bound in BUCKET_BOUNDS), "+Inf"]
    total = 0
    for bound, count in zip(bounds, latency.counts, strict=True):
        total += count
        yield _sample(f"{name}_bucket", {**labels, "le": bound}, total)
    yield _sample(f"{name}_count", labels, total)
    yield _sample(f"{name}_sum", labels, latency.ns / NS_PER_SECOND)


def _sample(name: str, labels: Mapping[str, str], value: Number) -> str:
    words = ",".join(f'{key}="{text.translate(_ESCAPED)}"' for key, text in sorted(labels.items()))
    return f"{name}{{{words}}} {_number(value)}"


def _number(value: Number) -> str:
    """As Go prints it, whose programs read it: 1.048576e+06. Readers get the very number back."""
    text = repr(float(value))
    whole, _, rest = text.partition(".")
    if value <= 0 or len(whole) <= _MOST_DIGITS or "e" in text:
        return text
    return f"{whole[0]}.{whole[1:]}{rest}".rstrip("0.") + f"e+{len(whole) - 1:02d}"


def _encoded(lines: list[str]) -> bytes:
    """A path may hold bytes that are no text."""
    return "".join(f"{line}\n" for line in lines).encode(errors="replace")
