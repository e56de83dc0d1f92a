"""Checkpoints of one stage: the state, the position in the data, and checksums of both.

Orbax writes each checkpoint in the background, into a folder of another name that it renames
when complete. A kill at any time leaves the earlier checkpoints as they were. In a bucket, where
nothing can be renamed, a mark that is written last makes it complete.
"""

import json
import sys
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices
from orbax.checkpoint._src.path.atomicity import CommitFileTemporaryPath  # private: no public one

from irg_jax import messages, storage
from irg_jax.train.distributed import gather, thread_barrier
from irg_jax.weights import orbax
from irg_jax.weights.names import CheckpointError

DAMAGED = "damaged"  # folder for checkpoints that cannot be read
COMMITTED = "commit_success.txt"  # Orbax's mark of a complete checkpoint in a bucket


class Checkpoints:
  """The checkpoints of a stage, numbered by its steps.

  A context manager: an OSError or ValueError leaves it as a ValueError that also names the last
  good checkpoint, if there is one.

  Args:
    folder: where they are kept; made if missing. Shared by all processes.
    keep: number of checkpoints kept, the newest ones.
    report: called with a line of text about anything that a user should know.
  """

  def __init__(self, folder, keep: int, report=print):
    self.folder = storage.path(folder).absolute()
    self._report, self._saving = report, None
    orbax.quiet()
    orbax.know_store(self.folder)
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.LatestN(n=keep),
        cleanup_tmp_directories=True,  # of a killed save: a checkpoint is large
        temporary_path_class=None if storage.is_local(self.folder) else CommitFileTemporaryPath,
        async_options=ocp.options.AsyncOptions(barrier_sync_fn=_barrier_unless_failed,
                                               **orbax.FOLDERS_FIRST))
    self._manager = ocp.CheckpointManager(self.folder, options=options,
                                          item_names=("state", "run"))
    self._known = steps_in(self.folder)

  def __enter__(self):
    return self

  def __exit__(self, kind, error, _):
    first = error  # the one that is raised
    for end in (self.wait, self._close):
      try:
        end()
      except CheckpointError as e:
        first = first or e
        if first is not e and end == self.wait:
          self._report(str(e))
    named = isinstance(first, CheckpointError) or not self._steps()
    if isinstance(first, (OSError, ValueError)) and not named:
      raise ValueError(f"{messages.message(first)}; {self.last_good()}") from first
    if first is not error:
      raise first

  def last_good(self) -> str:
    """Names the newest complete checkpoint in words."""
    steps = self._steps()
    return f"the last good checkpoint is {self.folder / str(steps[-1])}" if steps else (
        f"there is no good checkpoint in {self.folder}")

  def _steps(self):
    """`steps_in`; of a bucket, which may be away, those that were complete when last heard of."""
    return steps_in(self.folder) if storage.is_local(self.folder) else self._known

  def save(self, step: int, state, data: dict) -> None:
    """Starts a save; returns once the state is copied and may be donated.

    Args:
      step: updates made. Saving the same step twice does nothing.
      state: pytree of arrays.
      data: data state of this process, JSON values by stream.

    Raises:
      CheckpointError: this save, or the one before it, failed; names the last good one.
    """
    self.wait()
    if step in self._steps():
      return
    data = gather(data)
    run = {"data": data, "sums": _all_checksums(state, data)}
    args = ocp.args.Composite(state=ocp.args.StandardSave(state), run=ocp.args.JsonSave(run))
    self._saving = step
    self._try(self._manager.save, step, args=args, force=True)

  def check(self) -> None:
    """Raises the CheckpointError of a save that has failed in the background; never waits."""
    if self._saving is not None and not self._manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Waits until the save in progress is complete.

    Raises:
      CheckpointError: as `save`.
    """
    self._try(self._manager.wait_until_finished)
    if self._saving is not None:
      self._known = sorted({*self._known, self._saving})
    self._saving = None

  def restore(self, abstract):
    """Restores the newest checkpoint that is undamaged.

    A damaged one is reported and moved to the folder `DAMAGED`, if there is an older one to
    use instead. All processes restore the same one, even if only one of them cannot read it.

    Args:
      abstract: pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.

    Returns:
      (step, state, {stream: JSON value} of all streams), or None if nothing was ever saved.

    Raises:
      CheckpointError: there are checkpoints, but all are damaged.
    """
    self.wait()
    seen = gather({str(jax.process_index()): steps_in(self.folder)})
    steps = sorted(set.intersection(*map(set, seen.values())))
    if not steps and (self.folder / DAMAGED).is_dir():
      raise CheckpointError(f"{self.folder}: only damaged checkpoints are left; remove the folder "
                            "to start from the beginning")
    while steps:
      step = steps.pop()
      try:
        return step, *self._restore(step, abstract)
      except CheckpointError as e:
        message = f"checkpoint {self.folder / str(step)} is damaged ({e})"
        if not steps:
          raise CheckpointError(f"{message}, and there is no other one; restore it from a copy, "
                                "or remove it to start again") from e
        self._set_aside(step)
        self._report(f"{message}; it is now in {self.folder / DAMAGED}, and step {steps[-1]} "
                     "is used")
    return None

  def _restore(self, step, abstract):
    """(state, data) of a step. Either all processes return, or all raise CheckpointError."""
    folder, cause, faults = self.folder / str(step), None, {}
    try:
      # Not through the manager: it waits for all processes, and one that fails would not come.
      state = ocp.StandardCheckpointHandler().restore(
          folder / "state", args=ocp.args.StandardRestore(abstract))
      run = json.loads((folder / "run" / "metadata").read_text(encoding="utf-8"))
      sums, data = run["sums"].items(), run["data"]
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise  # no sign of damaged files
    except Exception as e:  # Orbax and TensorStore have no common error
      cause, faults = e, {str(jax.process_index()): orbax.reason(e)}
    if faults := gather(faults):
      process, reason = min(faults.items())
      by = f"process {process}: " if jax.process_count() > 1 else ""
      raise CheckpointError(by + reason) from cause
    found = _all_checksums(state, data)
    wrong = [name for name, value in sums if found.get(name) != value]
    if wrong:
      raise CheckpointError(f"{len(wrong)} checksums are wrong, such as that of {wrong[0]}")
    return state, {int(stream): value for stream, value in data.items()}

  def _set_aside(self, step):
    if jax.process_index() == 0:
      target = self.folder / DAMAGED / str(step)
      target.parent.mkdir(exist_ok=True)
      copies = sum(p.name.split("-")[0] == str(step) for p in target.parent.iterdir())
      (self.folder / str(step) / COMMITTED).unlink(missing_ok=True)  # first: it moves bit by bit
      (self.folder / str(step)).rename(target.with_name(f"{step}-{copies}") if copies else target)
    self._known = [known for known in self._known if known != step]
    sync_global_devices(f"step {step} set aside")
    self._manager.reload()

  def _close(self):
    self._try(self._manager.close)

  def _try(self, save, *args, **kwargs):
    try:
      save(*args, **kwargs)
    except Exception as e:  # Orbax and TensorStore have no common error
      step, self._saving = self._saving, None
      what = self.folder if step is None else f"checkpoint of step {step}"
      raise CheckpointError(
          f"{what} cannot be saved ({orbax.reason(e)}); {self.last_good()}") from e


def _barrier_unless_failed(*, key, timeout_ms):
  """A barrier of a save in the background, skipped if this process's part of it has failed.

  With Orbax's barrier it would wait for the others, and they for its part: no process would
  report the error.
  """
  if sys.exc_info()[1] is None:
    thread_barrier(key, timeout_ms / 1000)


def steps_in(folder) -> list[int]:
  """Steps of the complete checkpoints in a folder, oldest first; [] if there is no folder."""
  folder = storage.path(folder)
  complete = lambda path: storage.is_local(path) or (path / COMMITTED).is_file()
  return sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit() and complete(p))


def checksums(tree) -> dict[str, int]:
  """A checksum of each leaf by path: any changed bit changes it, another mesh does not."""
  return {jax.tree_util.keystr(path, simple=True, separator="/"): int(x)
          for path, x in jax.tree.leaves_with_path(jax.device_get(_checksum_tree(tree)))}


def _all_checksums(state, data: dict) -> dict[str, int]:
  """`checksums` of a state, and "data": that of JSON values by stream, written or read."""
  text = json.dumps({str(stream): value for stream, value in data.items()}, sort_keys=True)
  return checksums(state) | {"data": zlib.crc32(text.encode())}


@jax.jit
def _checksum_tree(tree):
  return jax.tree.map(_checksum, tree)


def _checksum(x):
  """uint32 sum of bits * (1 + 2 * flat index), modulo 2**32.

  The weights are odd, so that any change of a single number changes the sum.
  """
  bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
  weight, stride = jnp.uint32(1), 2
  for axis in reversed(range(bits.ndim)):
    index = jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    weight, stride = weight + index * np.uint32(stride % 2**32), stride * bits.shape[axis]
  return jnp.sum(bits * weight, dtype=jnp.uint32)
