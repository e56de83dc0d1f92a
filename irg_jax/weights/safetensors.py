"""Safetensors files, read and written tensor by tensor, so that no whole file is in memory.

Reading: the `safetensors` library checks the header; the data goes through memory maps of this
module, each open for one small block only, because every page that an open map has touched counts
as memory of the process.
Writing: the library's writer needs a whole file in memory, so the format is written here: length
of the header (8 bytes), header (JSON), bytes of the tensors.
"""

import collections.abc
import dataclasses
import json
import math
import pathlib

import ml_dtypes
import numpy as np
import safetensors

from irg_jax.storage import write_json
from irg_jax.weights.names import CheckpointError, listing

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes and rows of a block. Rows are few so that both sides of a transposing copy stay in the
# CPU's cache.
CHUNK = 4 * 2**20
ROWS = 256


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Location of a tensor in a file, `offset` in bytes; none of its data is in memory."""

  path: pathlib.Path
  key: str
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  def read_into(self, out: np.ndarray, index: tuple | None = None) -> None:
    """out[...] = tensor[index], cast to out's dtype; reads only the pages that it needs.

    `index` is a slice of step 1 for each axis, None: everything; `out` any writable view of the
    shape that it selects. Raises CheckpointError for a number that is not finite in out's dtype.
    """
    first, *rest = index or (slice(None),) * len(self.shape)
    start, stop, _ = first.indices(self.shape[0])
    row_bytes = self.dtype.itemsize * int(np.prod(self.shape[1:]))
    step = max(1, min(CHUNK // row_bytes, ROWS))
    for row in range(start, stop, step):
      block, end = out[row - start:row - start + step], min(row + step, stop)
      stored = np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
      with np.errstate(over="ignore"):  # reported below
        block[...] = stored[(slice(row, end), *rest)]
      if not _finite(block):
        fault = (f"numbers too large for {out.dtype}; use bfloat16 or float32"
                 if _finite(np.array(stored[row:end])) else
                 f"NaN or infinite numbers (rows {row} to {end - 1}); the file is damaged or its "
                 "training diverged")
        raise CheckpointError(f"{self.path}: {self.key} has {fault}")


def all_finite(x: np.ndarray) -> bool:
  """Whether `x` holds no NaN and no infinity; checked block by block."""
  flat, step = x.reshape(-1), CHUNK // x.dtype.itemsize
  return all(_finite(flat[i:i + step]) for i in range(0, flat.size, step))


def read_json(path: pathlib.Path, object_pairs_hook=None):
  """Reads a JSON file; CheckpointError if it cannot be read."""
  try:
    return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=object_pairs_hook)
  except FileNotFoundError:
    raise CheckpointError(f"{path}: no such file") from None
  except CheckpointError:  # of `object_pairs_hook`
    raise
  except (OSError, ValueError) as e:
    raise CheckpointError(f"{path}: not readable as JSON: {e}") from e


def find_tensors(folder: pathlib.Path, stem: str) -> dict[str, Tensor]:
  """Finds the tensors of `stem`.safetensors, or of the shards that an index names.

  The index is `stem`.safetensors.index.json; for `ema` also model.safetensors.index.json. Raises
  CheckpointError as `read_header` does, and if index and shards disagree.
  """
  single, index = (folder / f"{stem}.safetensors{end}" for end in ("", ".index.json"))
  if single.is_file():
    if index.is_file():
      raise CheckpointError(f"{folder}: has both {single.name} and {index.name}; remove the one "
                            "that is stale")
    return read_header(single)
  for path in (index, *[folder / "model.safetensors.index.json"] * (stem == "ema")):
    if path.is_file():
      return _read_shards(path)
  raise CheckpointError(f"{single}: no such file, and no {index.name} beside it")


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Reads the header of one file: its tensors by key, in the order of the file.

  Raises CheckpointError: no such file, not safetensors, truncated, a key twice, not a float.
  """
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file")
  try:
    with safetensors.safe_open(path, framework="numpy"):
      pass  # opening checks the header against itself and against the file's length
  except (safetensors.SafetensorError, OSError) as e:
    raise CheckpointError(f"{path}: not a complete safetensors file ({e}); download or write it "
                          "again") from e
  with open(path, "rb") as f:
    length = int.from_bytes(f.read(8), "little")
    header = json.loads(f.read(length), object_pairs_hook=lambda p: _unique(p, path))
  header.pop("__metadata__", None)
  for key, entry in header.items():
    if entry["dtype"] not in DTYPES:
      raise CheckpointError(f"{path}: {key} has dtype {entry['dtype']}; expected one of "
                            f"{', '.join(DTYPES)}")
  return {key: Tensor(path, key, DTYPES[entry["dtype"]], tuple(entry["shape"]),
                      8 + length + entry["data_offsets"][0]) for key, entry in header.items()}


@dataclasses.dataclass(frozen=True)
class Pending:
  """A tensor to write: its entry in the header, and a function that makes its data."""

  key: str
  dtype: np.dtype
  shape: tuple[int, ...]
  make: collections.abc.Callable[[], np.ndarray]

  @property
  def size(self) -> int:
    return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(folder: pathlib.Path, stem: str, tensors: list[Pending],
                  max_shard_bytes: int | None = None) -> None:
  """Writes `stem`.safetensors, or shards and their index if it would be too large.

  A file has at most `max_shard_bytes` of tensors, or one larger tensor; None: one file.
  """
  tensors, weight_map = in_order(tensors), {}
  shards = in_groups(tensors, lambda t: t.size, max_shard_bytes or math.inf)
  if len(shards) == 1:
    return _write_file(folder / f"{stem}.safetensors", tensors)
  for i, shard in enumerate(shards, 1):
    name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
    _write_file(folder / name, shard)
    weight_map |= {t.key: name for t in shard}
  index = {"metadata": {"total_size": sum(t.size for t in tensors)},
           "weight_map": dict(sorted(weight_map.items()))}
  write_json(folder / f"{stem}.safetensors.index.json", index)


def in_groups(items, size, limit) -> list[list]:
  """Cuts a list into groups whose sizes sum up to at most `limit`, or of one larger item."""
  groups, total = [[]], 0
  for item in items:
    if groups[-1] and total + size(item) > limit:
      groups, total = [*groups, []], 0
    groups[-1].append(item)
    total += size(item)
  return groups


def in_order(tensors: list[Pending]) -> list[Pending]:
  """Sorts tensors as `write_tensors` makes and writes them."""
  # Widest dtype first, like the library: every tensor is aligned to its dtype.
  return sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))


def _finite(x):
  if x.dtype == ml_dtypes.bfloat16:  # ml_dtypes' isfinite is slow: one number at a time
    return ((x.view(np.uint16) & 0x7F80) != 0x7F80).all()  # the exponent's bits
  return np.isfinite(x).all()


def _unique(pairs, path):
  counts = collections.Counter(key for key, _ in pairs)
  if twice := [key for key, count in counts.items() if count > 1]:
    raise CheckpointError(f"{path}: holds {listing(twice)} twice; write the file again")
  return dict(pairs)


def _read_shards(index):
  content = read_json(index, lambda p: _unique(p, index))
  weight_map = content.get("weight_map") if isinstance(content, dict) else None
  if not isinstance(weight_map, dict) or not weight_map:
    raise CheckpointError(f"{index}: has no weight_map from key to file")
  for key, name in weight_map.items():
    if not isinstance(name, str) or pathlib.PurePath(name).name != name:
      raise CheckpointError(f"{index}: weight_map places {key} in {name!r}; expected a file name")
    if not (index.parent / name).is_file():
      raise CheckpointError(f"{index.parent / name}: no such file, though {index.name} names it")
  tensors = {}
  for name in sorted(set(weight_map.values())):
    for key, tensor in read_header(index.parent / name).items():
      if key in tensors:
        raise CheckpointError(f"{tensor.path}: {key} is in {tensors[key].path.name} too; remove "
                              "one of them and its file from the index")
      tensors[key] = tensor
  if surplus := tensors.keys() - weight_map.keys():
    raise CheckpointError(f"{index}: does not name {listing(surplus)}, which "
                          f"{tensors[min(surplus)].path.name} holds")
  for key, name in weight_map.items():
    if key not in tensors or tensors[key].path.name != name:
      raise CheckpointError(f"{index.parent / name}: lacks {key}, which {index.name} places there")
  return tensors


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
      # Viewed as bytes, since files cannot write numpy's extension dtypes.
      f.write(np.ascontiguousarray(t.make()).view(np.uint8))
