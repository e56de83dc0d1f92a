"""Input feed: packed batches of each process to global arrays on the mesh, one batch ahead."""

import concurrent.futures
import contextlib
import math

import jax
import numpy as np

from irg_jax.sharding import RULES, partition_spec
from irg_jax.train.step import batch_shardings


@contextlib.contextmanager
def feed(batches, rows: int, accumulate: int, mesh):
  """Yields an endless iterator of (global batch, this process's data state after it).

  A thread reads, packs and places the next batch while the device runs the current step.

  Args:
    batches: this process's `data.pipeline.Batches`; closed at the end.
    rows: rows of the global batch.
    accumulate: batches of one update; more than one are stacked along a leading axis A.
    mesh: devices to place the batch on.
  """
  def make():
    parts = [next(batches) for _ in range(accumulate)]
    state = batches.get_state()
    batch = parts[0] if len(parts) == 1 else jax.tree.map(lambda *x: np.stack(x), *parts)
    return place(batch, rows, mesh), state

  def ahead():
    coming = thread.submit(make)
    while True:
      now, coming = coming.result(), thread.submit(make)
      yield now

  thread = concurrent.futures.ThreadPoolExecutor(1)
  try:
    yield ahead()
  finally:
    thread.shutdown(cancel_futures=True)
    batches.close()


def place(batch, rows: int, mesh):
  """Global arrays from the numpy arrays of each process, which hold that process's rows."""
  axis = batch.text_ids.ndim - 2  # of the rows: 1 under accumulation
  shape = lambda x: (*x.shape[:axis], rows, *x.shape[axis + 1:])
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x), x.dtype), batch)
  return jax.make_array_from_process_local_data(
      batch_shardings(shapes, mesh), batch, jax.tree.map(shape, batch))


def row_block(rows: int, mesh) -> tuple[int, int]:
  """(number of this process's block of rows, number of blocks), see `row_blocks`."""
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
  split = math.prod(mesh.shape[axis] for axis in RULES["global_batch"])
  if len(by_process) > 1 and rows % split:
    raise ValueError(f"config field 'data.rows' is {rows}, but must be a multiple of the "
                     f"{split} devices along {', '.join(RULES['global_batch'])}, so that no host "
                     "feeds another's rows")
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
  return jax.sharding.NamedSharding(mesh, partition_spec((rows,), ("global_batch",), mesh))
