"""Input feed: packed batches of each process to global arrays on the mesh, one batch ahead."""

import concurrent.futures
import contextlib

import jax
import numpy as np

from irg_jax.sharding import partition_spec
from irg_jax.train.step import batch_shardings


class Feed(contextlib.ExitStack):
  """Iterates over (global batch, data state after it). A context manager.

  A thread reads, packs and places the next batch while the device runs the current step.

  Args:
    batches: this process's `data.pipeline.Batches`.
    rows: rows of the global batch.
    accumulate: batches of one update; more than one are stacked along a leading axis A.
    mesh: devices to place the batch on.
  """

  def __init__(self, batches, rows: int, accumulate: int, mesh):
    super().__init__()
    self._batches, self._rows, self._accumulate, self._mesh = batches, rows, accumulate, mesh
    self._thread, self._next = concurrent.futures.ThreadPoolExecutor(1), None
    self.callback(batches.close)
    self.callback(self._thread.shutdown, cancel_futures=True)  # runs first

  def __next__(self):
    """(Batch of global arrays, this process's data state by stream after that batch)."""
    batch, state = (self._next or self._thread.submit(self._make)).result()
    self._next = self._thread.submit(self._make)
    return batch, state

  def _make(self):
    parts = [next(self._batches) for _ in range(self._accumulate)]
    state = self._batches.get_state()
    batch = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)
    return place(batch, self._rows, self._mesh), state


def place(batch, rows: int, mesh):
  """Global arrays from the numpy arrays of each process, which hold that process's rows."""
  axis = batch.text_ids.ndim - 2  # of the rows: 1 under accumulation
  local = {row: i for i, row in enumerate(_rows_by_process(rows, mesh)[jax.process_index()])}
  assert batch.text_ids.shape[axis] == len(local)
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
      (*x.shape[:axis], rows, *x.shape[axis + 1:]), x.dtype), batch)

  def globalize(x, shape, sharding):
    def shard(index):
      mine = [local[row] for row in range(rows)[index[axis]]]
      return x[(*index[:axis], mine, *index[axis + 1:])]
    return jax.make_array_from_callback(shape.shape, sharding, shard)

  return jax.tree.map(globalize, batch, shapes, batch_shardings(shapes, mesh))


def row_block(rows: int, mesh) -> tuple[int, int]:
  """The part of the global batch that this process feeds: (its number, number of parts)."""
  blocks = row_blocks(rows, mesh)
  return blocks.index(_rows_by_process(rows, mesh)[jax.process_index()]), len(blocks)


def row_blocks(rows: int, mesh) -> list[list[int]]:
  """Rows of the global batch, grouped by the processes that feed them.

  A group belongs to one process, or to several that hold the same rows; groups are ordered by
  their first row. The mesh of a TPU slice follows its wires, so the rows of a process need not
  be consecutive.

  Raises:
    ValueError: processes that share some, but not all of their rows; too few rows.
  """
  by_process = _rows_by_process(rows, mesh)
  blocks = sorted(set(map(tuple, by_process.values())))
  split = mesh.shape["data"] * mesh.shape["fsdp"]
  if len(by_process) > 1 and rows % split:
    raise ValueError(f"config field 'data.rows' is {rows}, but must be a multiple of the "
                     f"{split} devices along data and fsdp, so that no host feeds another's rows")
  if sum(map(len, blocks)) != rows or len(set(map(len, blocks))) > 1:
    raise ValueError(f"mesh {dict(mesh.shape)}: hosts share some of their rows, but not all; "
                     "make sequence and tensor a multiple or a divisor of a host's devices")
  return [list(block) for block in blocks]


def _rows_by_process(rows, mesh) -> dict[int, list[int]]:
  by_process = {}
  for device, index in _row_sharding(rows, mesh).devices_indices_map((rows,)).items():
    by_process.setdefault(device.process_index, set()).update(range(rows)[index[0]])
  return {process: sorted(held) for process, held in by_process.items()}


def _row_sharding(rows, mesh):
  return jax.sharding.NamedSharding(mesh, partition_spec((rows,), ("batch",), mesh))
