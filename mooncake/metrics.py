"""Metrics of one process: a registry, four kinds of instrument, and their Prometheus text.

The instruments are plain Python numbers that a collector reads at scrape time, so that counting costs a fraction of
a microsecond and the hot path takes no lock. In exchange each instrument is written by one thread only. There is no
global registry: two clusters in one process (tests, the simulator) do not meet. Labels must be bounded: never an id
or a text that a client chose.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Readings = dict[tuple[str, ...], float]
"""Numbers by label values."""
Reading = Callable[[], Readings]


class Counter(Collector):
    """A number per combination of label values that only grows."""

    def __init__(self, name: str, text: str, labels: Sequence[str]) -> None:
        self._name, self._text, self._labels = name, text, labels
        self._values: dict[tuple[str, ...], float] = {} if labels else {(): 0.0}

    def add(self, amount: float, *labels: str) -> None:
        self._values[labels] = self._values.get(labels, 0.0) + amount

    def value(self, *labels: str) -> float:
        return self._values.get(labels, 0.0)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in sorted(self._values.items()):
            family.add_metric(labels, value)
        yield family


class Gauge(Collector):
    """A number per combination of label values that is read when it is asked for."""

    def __init__(self, name: str, text: str, labels: Sequence[str], read: Reading) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in sorted(self._read().items()):
            family.add_metric(labels, value)
        yield family


class Total(Collector):
    """As a Counter, of numbers that somebody else counts."""

    def __init__(self, name: str, text: str, labels: Sequence[str], read: Reading) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=self._labels)
        for labels, value in sorted(self._read().items()):
            family.add_metric(labels, value)
        yield family


class Histogram(Collector):
    """Counts per bucket; `bounds` are the buckets' upper ends, in ascending order."""

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self._name, self._text, self._bounds = name, text, tuple(map(float, bounds))
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    @property
    def count(self) -> int:
        return sum(self._counts)

    def collect(self) -> Iterator[Metric]:
        buckets: list[tuple[str, float]] = []
        seen = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            seen += count
            buckets.append(("+Inf" if bound == float("inf") else repr(bound), seen))
        family = HistogramMetricFamily(self._name, self._text)
        family.add_metric((), buckets, self._sum)
        yield family


class Registry:
    """Makes instruments and renders them. A name can be taken once; a second try raises ValueError."""

    def __init__(self) -> None:
        self._collectors = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self._collectors)

    def counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        counter = Counter(name, text, labels)
        self._collectors.register(counter)
        return counter

    def gauge(self, name: str, text: str, labels: Sequence[str], read: Reading) -> Gauge:
        gauge = Gauge(name, text, labels, read)
        self._collectors.register(gauge)
        return gauge

    def total(self, name: str, text: str, labels: Sequence[str], read: Reading) -> Total:
        total = Total(name, text, labels, read)
        self._collectors.register(total)
        return total

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        histogram = Histogram(name, text, bounds)
        self._collectors.register(histogram)
        return histogram

    def render(self) -> bytes:
        return generate_latest(self._collectors)
