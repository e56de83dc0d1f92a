"""From the data iterator of each process to batches on the mesh, one ahead of the training."""

import concurrent.futures

import jax
import numpy as np

from irg_jax.sharding import partition_spec
from irg_jax.train.step import batch_shardings


class Feed:
  """Global batches with the data state behind each; a context manager.

  While a step runs, a thread reads, packs and places the batch of the next.

  Args:
    batches: this process's `data.pipeline.Batches`.
    rows: rows of the global batch.
    accumulate: batches of an update; more than one makes a leading axis.
    mesh: where to.
  """

  def __init__(self, batches, rows: int, accumulate: int, mesh):
    self._batches, self._rows, self._accumulate, self._mesh = batches, rows, accumulate, mesh
    self._thread = concurrent.futures.ThreadPoolExecutor(1)
    self._next = None

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._thread.shutdown(cancel_futures=True)
    self._batches.close()

  def __next__(self):
    """(Batch of global arrays, data state by stream of this process, as it is after it)."""
    batch, state = (self._next or self._thread.submit(self._make)).result()
    self._next = self._thread.submit(self._make)
    return batch, state

  def _make(self):
    parts = [next(self._batches) for _ in range(self._accumulate)]
    state = self._batches.get_state()
    if len(parts) == 1:
      return place(parts[0], self._rows, self._mesh), state
    return place(jax.tree.map(lambda *x: np.stack(x), *parts), self._rows, self._mesh), state


def global_shapes(batch, rows: int):
  """ShapeDtypeStructs of the global batch that a process's part (any rows) belongs to."""
  axis = batch.text_ids.ndim - 2  # 1 under accumulation
  shape = lambda x: (*x.shape[:axis], rows, *x.shape[axis + 1:])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape(x), x.dtype), batch)


def place(batch, rows: int, mesh):
  """Global arrays of a batch of which each process holds its own rows, as numpy arrays."""
  axis = batch.text_ids.ndim - 2
  number, count = row_block(rows, mesh)
  place_of = {row: i for i, row in enumerate(row_blocks(rows, mesh)[number])}
  shapes = global_shapes(batch, rows)
  assert batch.text_ids.shape[axis] * count == rows

  def one(x, shape, sharding):
    def shard(index):
      mine = [place_of[row] for row in range(rows)[index[axis]]]
      return x[(*index[:axis], mine, *index[axis + 1:])]
    return jax.make_array_from_callback(shape.shape, sharding, shard)

  return jax.tree.map(one, batch, shapes, batch_shardings(shapes, mesh))


def row_block(rows: int, mesh) -> tuple[int, int]:
  """Which part of the global batch this process feeds: (number of the part, parts)."""
  blocks = row_blocks(rows, mesh)
  sharding = _row_sharding(rows, mesh)
  index = next(iter(sharding.addressable_devices_indices_map((rows,)).values()))
  row = range(rows)[index[0]][0]
  return next(i for i, block in enumerate(blocks) if row in block), len(blocks)


def row_blocks(rows: int, mesh) -> list[list[int]]:
  """Rows of the global batch by who feeds them: the devices of a process, or of several
  processes that hold the same rows. Ordered by their first row.

  On a slice of TPUs the rows of a process need not follow each other, since the mesh follows
  the wires: the k-th block of rows then is not rows k n to k n + n.

  Raises:
    ValueError: processes that share some, but not all of their rows; fewer rows than need be.
  """
  by_process = {}
  for device, index in _row_sharding(rows, mesh).devices_indices_map((rows,)).items():
    by_process.setdefault(device.process_index, set()).update(range(rows)[index[0]])
  blocks = sorted(set(map(frozenset, by_process.values())), key=min)
  split = mesh.shape["data"] * mesh.shape["fsdp"]
  if len(by_process) > 1 and rows % split:
    raise ValueError(f"config field 'data.rows' is {rows}, but must be a multiple of the "
                     f"{split} devices along data and fsdp, so that no host feeds another's rows")
  if sum(map(len, blocks)) != rows or len(set(map(len, blocks))) > 1:
    raise ValueError(f"mesh {dict(mesh.shape)}: hosts share some of their rows, but not all; "
                     "make sequence and tensor a multiple or a divisor of a host's devices")
  return [sorted(block) for block in blocks]


def _row_sharding(rows, mesh):
  return jax.sharding.NamedSharding(mesh, partition_spec((rows,), ("batch",), mesh))
