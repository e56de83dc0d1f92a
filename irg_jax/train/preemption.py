"""SIGTERM, by which clusters announce that they take a machine away."""

import signal

import jax
from jax.experimental import multihost_utils

EXIT_STATUS = 128 + signal.SIGTERM  # what a shell reports, and schedulers start again


class Preemption:
  """Notices SIGTERM while it is entered, and keeps the process alive until it is asked.

  Of several processes all stop at the same step, whichever got the signal: JAX catches it
  and lets them agree.
  """

  def __init__(self):
    self._signalled, self._asked, self._before = False, 0, None

  def __enter__(self):
    if jax.process_count() == 1:
      self._before = signal.signal(signal.SIGTERM, self._notice)
    return self

  def __exit__(self, *_):
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def reached(self) -> bool:
    """Whether to save and stop now; every process asks once a step."""
    self._asked += 1
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self._asked)
    return self._signalled

  def _notice(self, *_):
    self._signalled = True
