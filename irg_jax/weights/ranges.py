"""Parameters from safetensors in a bucket: each byte that a process needs is read once.

A range of a file is whole rows of a tensor, while a shard may be some of its columns. A process
cuts the rows that it reads into all its shards. Where processes need different columns, each one
reads a part of the rows instead, and the devices exchange them, so that no two read the same.
"""

import collections
import concurrent.futures
import math
import re

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

CHUNK = 4 * 2**20  # bytes of a range
AHEAD = 8  # ranges under way
ALIGNMENT = 64  # bytes; JAX takes over a host buffer at a multiple of it without a copy


def load_row(row, layers, sharding, dtype) -> jax.Array:
  """Reads the parameter of a `names.Row`; `layers` are its tensors, sharding None: one device."""
  whole = tuple((0, n) for n in row.shape)
  if sharding is None:
    return jax.device_put(read_shards(row, layers, {whole}, dtype)[whole])
  placed = _by_rows(row, sharding) if _splits_columns(row, sharding) else sharding
  mine = placed.addressable_devices_indices_map(row.shape).values()
  found = read_shards(row, layers, {_bounds(index, row.shape) for index in mine}, dtype)
  array = jax.make_array_from_callback(
      row.shape, placed, lambda index: found[_bounds(index, row.shape)], dtype=dtype)
  if placed is not sharding:
    array = jax.jit(lambda x: x, out_shardings=sharding, donate_argnums=0)(array)
  return array.block_until_ready()


def read_shards(row, layers, shards, dtype) -> dict:
  """{bounds: array in our layout}; `shards` are bounds, (start, stop) of each axis."""
  arrays = {bounds: aligned([stop - start for start, stop in bounds], dtype) for bounds in shards}
  jobs = (job for number, tensor in enumerate(layers)
          for job in _jobs(row, number, tensor, arrays))
  for (tensor, start, stop, parts), found in _ahead(lambda job: job[0].rows(*job[1:3]), jobs):
    for (first, last), rest, out in parts:
      low, high = max(start, first), min(stop, last)
      if low < high:
        tensor.put(found[low - start:high - start], low, rest, out[low - first:high - first])
  return arrays


def aligned(shape, dtype) -> np.ndarray:
  """An array, not filled, that JAX takes over without a copy."""
  size = math.prod(shape) * dtype.itemsize
  buffer = np.empty(size + ALIGNMENT, np.uint8)
  start = -buffer.ctypes.data % ALIGNMENT
  return buffer[start:start + size].view(dtype).reshape(shape)


def check_places(header: dict, size: int) -> None:
  """ValueError unless the tensors of a header fill `size` bytes without gaps."""
  entries = [entry for name, entry in header.items() if name != "__metadata__"]
  end = 0
  try:
    for entry in sorted(entries, key=lambda x: x["data_offsets"]):
      bits = 8 if entry["dtype"] == "BOOL" else int(re.search(r"\d+", entry["dtype"])[0])
      start, stop = entry["data_offsets"]
      if start != end or (stop - start) * 8 != bits * math.prod(entry["shape"]):
        raise ValueError("its tensors overlap, or have gaps or another size")
      end = stop
  except (KeyError, TypeError) as e:
    raise ValueError(f"an entry of its header lacks {e}") from e
  if end != size:
    raise ValueError(f"its tensors have {end} bytes, but the file holds {size}")


def _jobs(row, number, tensor, arrays):
  """Yields (tensor, first row, last row + 1, parts of arrays that it fills), CHUNK bytes each."""
  parts = []
  for bounds, array in arrays.items():
    if row.layers:
      (start, stop), *bounds = bounds
      if not start <= number < stop:
        continue
      array = array[number - start]
    first, *rest = row.to_published_index(bounds)
    parts.append((first, [slice(*b) for b in rest], row.to_published(array)))
  step = max(1, CHUNK // tensor.row_bytes)
  for start, stop in _union(first for first, *_ in parts):
    for low in range(start, stop, step):
      yield tensor, low, min(low + step, stop), parts


def _union(intervals) -> list:
  """Intervals that do not touch: [(0, 2), (1, 3), (5, 6)] -> [[0, 3], [5, 6]]."""
  joined = []
  for start, stop in sorted(intervals):
    if joined and start <= joined[-1][1]:
      joined[-1][1] = max(stop, joined[-1][1])
    else:
      joined.append([start, stop])
  return joined


def _ahead(read, jobs):
  """Yields (job, its result) in order, while the next `AHEAD` are under way."""
  waiting = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(AHEAD) as pool:
    try:
      for job in jobs:
        waiting.append((job, pool.submit(read, job)))
        if len(waiting) > AHEAD:
          job, result = waiting.popleft()
          yield job, result.result()
      while waiting:
        job, result = waiting.popleft()
        yield job, result.result()
    finally:
      pool.shutdown(wait=True, cancel_futures=True)


def _bounds(index, shape) -> tuple:
  return tuple(s.indices(n)[:2] for s, n in zip(index, shape))


def _splits_columns(row, sharding) -> bool:
  """Whether a process would read columns that only another one needs."""
  by_process = collections.defaultdict(set)
  for device, index in sharding.devices_indices_map(row.shape).items():
    bounds = _bounds(index, row.shape)
    by_process[device.process_index].add(row.to_published_index(bounds[bool(row.layers):])[1:])
  columns = math.prod(row.published_shape[1:])
  size = lambda shard: math.prod(stop - start for start, stop in shard)
  return len(by_process) > 1 and any(
      sum(map(size, shards)) < columns for shards in by_process.values())


def _by_rows(row, sharding) -> NamedSharding:
  """A sharding of the published rows over as many devices as divide them."""
  axis, used, left = row.axes[0], [], row.layer_shape[row.axes[0]]
  for name, size in sharding.mesh.shape.items():
    if left % size == 0:
      used, left = [*used, name], left // size
  spec = [None] * len(row.shape)
  spec[axis + bool(row.layers)] = tuple(used)
  return NamedSharding(sharding.mesh, PartitionSpec(*spec))
