"""Figures for Prometheus: requests, queue, batch sizes, seconds by phase, compilations."""

import jax
import prometheus_client as prometheus

_COMPILE = "/jax/core/compile/backend_compile_duration"


class Metrics:
  """Counters of one server, in a registry of their own."""

  def __init__(self):
    self.registry = registry = prometheus.CollectorRegistry()
    self.requests = prometheus.Counter(
        "irg_requests_total", "Requests, by path and status.", ["path", "status"],
        registry=registry)
    self.rows = prometheus.Gauge(
        "irg_rows", "Images and answers that wait or run.", ["state"], registry=registry)
    self.batch_size = prometheus.Histogram(
        "irg_batch_size", "Rows that ran side by side in a turn.", registry=registry,
        buckets=[2**i for i in range(9)])
    self.seconds = prometheus.Histogram(
        "irg_phase_seconds", "Seconds of a batch, by phase.", ["phase"], registry=registry,
        buckets=[4.0**i for i in range(-4, 6)])
    self.compilations = prometheus.Counter(
        "irg_compilations_total", "Programs compiled, or read from the cache of programs.",
        registry=registry)
    jax.monitoring.register_event_duration_secs_listener(self._heard)

  def close(self) -> None:
    """Stops to count compilations."""
    jax.monitoring.unregister_event_duration_listener(self._heard)

  def phases(self, seconds: dict[str, float]) -> None:
    """Adds the seconds of the phases of a turn."""
    for phase, value in seconds.items():
      self.seconds.labels(phase).observe(value)

  def text(self) -> bytes:
    """All figures in Prometheus' text format."""
    return prometheus.generate_latest(self.registry)

  def _heard(self, event, *_, **__):
    if event == _COMPILE:
      self.compilations.inc()
