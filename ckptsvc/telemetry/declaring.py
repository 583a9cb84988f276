"""How a metric is declared: once, with all that Prometheus, the reference and the tests need to know of it.

Names follow prometheus.io/docs/practices/naming: the prefix, base units, `_total` for counters; labels whose values are
few and whose sum means something. Never a step, a path or a rank as a label: those belong into logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge, Histogram

Values = type[StrEnum] | str
"""What bounds the values of a label: the enumeration they are from, or a sentence that says what does."""

LATENCIES = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
"""Upper bounds, in seconds, of the buckets of what takes milliseconds to an hour."""

BLOCKED = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
"""The same of what holds a training loop up."""


@dataclass(frozen=True, slots=True)
class Declared:
    """One metric.

    Attributes:
        name: as Prometheus shows it.
        kind: "counter", "gauge" or "histogram".
        about: one sentence for people.
        labels: name -> what bounds its values.
    """

    name: str
    kind: str
    about: str
    labels: Mapping[str, Values]


class Declarations:
    """Makes metrics in a registry of its own and remembers how they were declared.

    A metric whose labels are all enumerations begins at zero, so that a rate over its first event is not lost.

    Attributes:
        registry: what Prometheus is shown.
        all: the metrics, in the order of their declaration.
    """

    def __init__(self) -> None:
        # Imported here: see the package.
        from prometheus_client import CollectorRegistry

        self.registry = CollectorRegistry()
        self.all: list[Declared] = []
        self._made: list[Counter | Gauge | Histogram] = []

    def counter(self, name: str, about: str, **labels: Values) -> Counter:
        """Declare what only grows."""
        from prometheus_client import Counter

        made = Counter(name, about, list(labels), registry=self.registry)
        self._add(made, Declared(name, "counter", about, labels))
        return made

    def gauge(self, name: str, about: str, **labels: Values) -> Gauge:
        """Declare what goes up and down."""
        from prometheus_client import Gauge

        made = Gauge(name, about, list(labels), registry=self.registry)
        self._add(made, Declared(name, "gauge", about, labels))
        return made

    def histogram(self, name: str, about: str, buckets: Sequence[float], **labels: Values) -> Histogram:
        """Declare how values are spread: upper bounds in `buckets`, and their sum and count."""
        from prometheus_client import Histogram

        made = Histogram(name, about, list(labels), buckets=buckets, registry=self.registry)
        self._add(made, Declared(name, "histogram", about, labels))
        return made

    def _add(self, made: Counter | Gauge | Histogram, declared: Declared) -> None:
        self.all.append(declared)
        self._made.append(made)
        if declared.labels and not any(isinstance(values, str) for values in declared.labels.values()):
            for each in _combined(declared.labels):
                made.labels(*each)

    def forget(self, label: str, value: str, bound: str) -> None:
        """Drop every series with this value of a label that is bounded so: what it stands for is gone."""
        for made, declared in zip(self._made, self.all, strict=True):
            if declared.labels.get(label) == bound:
                for each in _combined({**declared.labels, label: (value,)}):
                    with suppress(KeyError):  # prometheus-client 0.20: there is no such series
                        made.remove(*each)


def _combined(labels: Mapping[str, Values | tuple[str, ...]]) -> product[tuple[str, ...]]:
    """Every combination of their values; of a label that is no enumeration there are none."""
    return product(*(() if isinstance(values, str) else [str(value) for value in values] for values in labels.values()))
