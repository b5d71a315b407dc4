"""Counters of a service in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest


class Metrics:
    """One registry a service, so that several may live in one process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("instructsam_requests", "Questions by HTTP status", ["status"], registry=self.registry)
        self.seconds = Histogram(
            "instructsam_request_seconds",
            "Seconds from a question to its answer",
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "instructsam_batch_size", "Questions in a batch", buckets=(1, 2, 4, 8, 16, 32, 64), registry=self.registry
        )
        self.batch_seconds = Counter(
            "instructsam_batch_seconds", "Seconds that the model worked", registry=self.registry
        )
        self.waiting = Gauge("instructsam_waiting", "Questions that wait or are being answered", registry=self.registry)
        self.cached = Gauge("instructsam_cached_pictures", "Pictures whose features are kept", registry=self.registry)
        self.hits = Counter("instructsam_cache_hits", "Pictures whose features were there", registry=self.registry)

    def batch(self, size: int, seconds: float) -> None:
        """Note a batch."""
        self.batch_size.observe(size)
        self.batch_seconds.inc(seconds)

    def page(self) -> bytes:
        """All of it as text."""
        return generate_latest(self.registry)
