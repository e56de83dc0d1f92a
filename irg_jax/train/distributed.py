"""Multi-host exchange, fail-together error handling and preemption by SIGTERM."""

import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import traceback

import jax
import numpy as np
from jax._src.distributed import global_state  # private: there is no public one
from jax.experimental import multihost_utils

from irg_jax import messages

FAILED = 2  # exit status after an error, of this process or of another one
PREEMPTED = 128 + signal.SIGTERM  # what a shell reports, and schedulers restart
_FAULTS = "irg/faults/"  # keys at the coordinator, one for each process that failed
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 30.0  # in which every process should have polled


def note(text: str) -> None:
  """Prints a line in the first process."""
  if jax.process_index() == 0:
    print(text, file=sys.stderr)


def thread_barrier(name: str, seconds: float) -> None:
  """A barrier for threads: goes through the coordinator, not the devices. Use a name once.

  Raises:
    JaxRuntimeError: not all processes came within `seconds`.
  """
  if global_state.client is not None:
    global_state.client.wait_at_barrier(name, int(seconds * 1000))


def gather(data: dict) -> dict:
  """Returns the union of all processes' dicts of JSON values, in every process."""
  mine = np.frombuffer(json.dumps(data).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(mine.size))
  padded = np.pad(mine, (0, int(sizes.max()) - mine.size))
  union = {}
  for row, size in zip(multihost_utils.process_allgather(padded), sizes):
    union |= json.loads(row[:size].tobytes())
  return union


@contextlib.contextmanager
def fail_together(program: str):
  """An error in one process ends all of them, each with the error's message after `program`.

  Otherwise the other processes would wait for the failed one inside a collective, where no
  exception reaches them. Each process therefore polls the coordinator for faults in a thread.
  Enter it after `jax.distributed.initialize`. With a single process it does nothing.
  """
  client, process = global_state.client, global_state.process_id
  if client is None:
    yield
    return
  finished, leaving = threading.Event(), threading.Lock()
  show = lambda text: print(f"{program}: error: {text}", file=sys.stderr, flush=True)

  def leave():
    """Ends this process once all have polled; does not wait for its own hanging threads."""
    with leaving:
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # some processes are gone already
        thread_barrier("irg/leaving", _GRACE_SECONDS)
      if process == 0:
        time.sleep(_POLL_SECONDS)  # the coordinator lives here: let its answers arrive
      sys.stdout.flush()
      os._exit(FAILED)

  def poll():
    while not finished.wait(_POLL_SECONDS):
      try:
        faults = client.key_value_dir_get(_FAULTS)
      except jax.errors.JaxRuntimeError:  # the coordinator is gone: JAX ends this process
        return
      if faults:
        show(faults[0][1])
        leave()

  thread = threading.Thread(target=poll, daemon=True)
  thread.start()
  try:
    yield
  except BaseException as e:
    finished.set()
    message = _message(e)
    show(message)
    client.key_value_set(f"{_FAULTS}{process}", f"process {process} has stopped: {message}")
    leave()
  finished.set()
  thread.join()


def _message(error) -> str:
  """The message for users; prints the traceback of errors that are not meant for them."""
  if isinstance(error, KeyboardInterrupt):
    return "interrupted"
  if isinstance(error, (ValueError, OSError)) and os.environ.get("IRG_DEBUG") != "1":
    return messages.message(error)
  traceback.print_exception(error)
  return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def preemption():
  """Catches SIGTERM, so that the run can save before it ends.

  Yields a function that says whether to save and stop now. Every process calls it once a step.
  With several processes JAX catches the signal, and they agree on the step to stop after,
  whichever of them got it.
  """
  if jax.process_count() > 1:
    calls = itertools.count(1)
    yield lambda: multihost_utils.reached_preemption_sync_point(next(calls))
    return
  signalled = threading.Event()
  previous = signal.signal(signal.SIGTERM, lambda *_: signalled.set())
  try:
    yield signalled.is_set
  finally:
    signal.signal(signal.SIGTERM, previous)
