"""Safetensors files written tensor by tensor.

The library's writer wants a whole file in memory, so the format is written here: the length
of the header (8 bytes), the header (JSON), then the bytes of the tensors.
"""

import collections.abc
import dataclasses
import json
import math
import pathlib

import numpy as np

from irg_jax.storage import write_json
from irg_jax.weights.tensors import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Pending:
  """A tensor to write: what the header says of it, and a function that makes it."""

  key: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: collections.abc.Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(folder: pathlib.Path, stem: str, tensors: list[Pending],
                  max_shard_bytes: int | None = None) -> None:
  """Writes `stem`.safetensors, or shards and their index where it would be too large.

  Args:
    max_shard_bytes: upper bound on the tensor bytes of a file (a single larger tensor gets
      a file of its own); None writes one file.
  """
  tensors = in_order(tensors)
  shards = _split(tensors, max_shard_bytes)
  if len(shards) == 1:
    _write_file(folder / f"{stem}.safetensors", tensors)
    return
  weight_map = {}
  for i, shard in enumerate(shards, 1):
    name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
    _write_file(folder / name, shard)
    weight_map |= {t.key: name for t in shard}
  index = {"metadata": {"total_size": sum(t.size for t in tensors)},
           "weight_map": dict(sorted(weight_map.items()))}
  write_json(folder / f"{stem}.safetensors.index.json", index)


def in_order(tensors: list[Pending]) -> list[Pending]:
  """The order in which `write_tensors` makes and writes tensors."""
  # Widest dtype first, as the library orders them: every tensor is aligned to its dtype.
  return sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))


def _split(tensors, max_bytes):
  shards, size = [[]], 0
  for t in tensors:
    if max_bytes is not None and shards[-1] and size + t.size > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(t)
    size += t.size
  return shards


def _write_file(path, tensors):
  header, end = {"__metadata__": {"format": "pt"}}, 0
  for t in tensors:
    header[t.key] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape),
                     "data_offsets": [end, end + t.size]}
    end += t.size
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
      # As bytes: files cannot write numpy's extension dtypes.
      f.write(np.ascontiguousarray(t.make()).view(np.uint8))
