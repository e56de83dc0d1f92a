"""What the processes of a run owe each other: to meet, to tell, and to end together."""

import json
import os
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax._src import distributed  # there is no public way to the coordinator
from jax.experimental import multihost_utils

STATUS = 2  # of a process that ends because of an error, its own or another's
_FAULTS = "irg/faults/"
_EVERY = 1.0  # seconds between two looks for the faults of others
_GRACE = 30.0  # seconds in which every process should have looked


def meet(name: str) -> None:
  """Waits until all processes are here."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


def wait_for_all(name: str, seconds: float) -> None:
  """Like `meet`, for threads: no device takes part. A name is used once.

  Raises:
    JaxRuntimeError: not all came within `seconds`.
  """
  if distributed.global_state.client is not None:
    distributed.global_state.client.wait_at_barrier(name, int(seconds * 1000))


def gather(data: dict) -> dict:
  """The union of the processes' dicts (JSON), in every process."""
  if jax.process_count() == 1:
    return data
  mine = np.frombuffer(json.dumps(data).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(mine.size))
  padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
  union = {}
  for row, size in zip(multihost_utils.process_allgather(padded), sizes):
    union |= json.loads(row[:size].tobytes())
  return union


class SharedFaults:
  """An error that one process leaves this context with ends all of them, and each says why.

  Left alone, the others would wait for it inside a collective, where no exception reaches
  them. So a thread of each looks now and then whether the coordinator knows of a fault.
  A context manager, to be entered after `jax.distributed.initialize`; with one process, it
  does nothing.

  Args:
    name: of the program, put before every message.
  """

  def __init__(self, name: str):
    self._name, self._client = name, distributed.global_state.client
    self._over, self._leaving = threading.Event(), threading.Lock()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self):
    if self._client is not None:
      self._thread.start()
    return self

  def __exit__(self, kind, error, _):
    if self._client is None:
      return
    self._over.set()
    if kind is None:
      self._thread.join()
      return
    message = str(error)
    if isinstance(error, KeyboardInterrupt):
      message = "interrupted"
    elif not isinstance(error, (ValueError, OSError)) or os.environ.get("IRG_DEBUG") == "1":
      message = f"{kind.__name__}: {error}"
      traceback.print_exception(error)
    self._say(message)
    process = distributed.global_state.process_id
    self._client.key_value_set(f"{_FAULTS}{process}", f"process {process} has stopped: {message}")
    self._leave()

  def _watch(self):
    while not self._over.wait(_EVERY):
      try:
        faults = self._client.key_value_dir_get(_FAULTS)
      except jax.errors.JaxRuntimeError:  # no coordinator any more: JAX ends this process
        return
      if faults:
        self._say(faults[0][1])
        self._leave()

  def _say(self, message):
    print(f"{self._name}: error: {message}", file=sys.stderr, flush=True)

  def _leave(self):
    """Ends this process when all have heard; what hangs in it is not waited for."""
    with self._leaving:
      try:
        wait_for_all("irg/leaving", _GRACE)
      except jax.errors.JaxRuntimeError:
        pass  # some are gone already
      if distributed.global_state.process_id == 0:
        time.sleep(_EVERY)  # it is the coordinator: let its answers arrive
      sys.stdout.flush()
      os._exit(STATUS)
