"""Safetensors files, read and written tensor by tensor, so that no whole file is in memory.

Reading: the `safetensors` library checks the header; the data goes through memory maps of this
module, each open for one small block only, because every page that an open map has touched counts
as memory of the process. Names that other programs change are brought back: prefixes of wrappers
are left out, buffers of older libraries and scales of activations are passed over, and the scale of
an 8-bit weight is multiplied in as the weight is read.
Writing: the library's writer needs a whole file in memory, so the format is written here: length
of the header (8 bytes), header (JSON), bytes of the tensors.
"""

import collections.abc
import dataclasses
import functools
import json
import math
import pathlib
import re
import sys

import ml_dtypes
import numpy as np
import safetensors

from irg_jax import storage
from irg_jax.storage import write_json
from irg_jax.weights import ranges
from irg_jax.weights.names import CheckpointError, in_groups, listing

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I8": np.dtype(np.int8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes and rows of a block. Rows are few so that both sides of a transposing copy stay in the
# CPU's cache.
CHUNK = 4 * 2**20
ROWS = 256
_HEADER_BYTES = 2**22  # of a file of 25,000 tensors; a real one has some 1,500
# A key that every file of this stem holds: what stands before it is a prefix.
_ANCHORS = {"ema": "vae2llm.weight", "ae": "decoder.conv_in.weight"}
# Wrappers of PyTorch, anywhere in a key.
_WRAPPERS = re.compile(r"(?<![^.])(?:module|_fsdp_wrapped_module|_orig_mod|_forward_module|"
                       r"_checkpoint_wrapped_module)\.")
# Ends of keys that hold nothing learned: tables of positions, and scales of activations.
_IGNORED = re.compile(r".*(?:rotary_emb\.(?:inv_freq|original_inv_freq|cos_cached|sin_cached)|"
                      r"position_ids|\.input_scale|\.scale_input|scaled_fp8)", re.DOTALL)
# Keys of the scale of X.weight, X for "{}".
_SCALES = ("{}.scale_weight", "{}.weight_scale", "{}.weight_scale_inv")
VIT = ("vit_model.", "connector.", "vit_pos_embed.")  # keys of the ViT
VIT_FILE = "vit.safetensors"  # holds them where `ema` does not


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Location of a tensor in a file, `offset` in bytes; none of its data is in memory.

  `stored` is the dtype in the file. Numbers are multiplied by `scale`, one for all or one a row.
  """

  path: pathlib.Path
  key: str
  stored: np.dtype
  shape: tuple[int, ...]
  offset: int
  scale: "Tensor | None" = None

  @property
  def dtype(self) -> np.dtype:
    """The dtype to hold the numbers: bfloat16 for 8-bit weights with a scale, and for vectors."""
    wide = self.stored.itemsize == 1 and (self.scale or len(self.shape) == 1)
    return np.dtype(ml_dtypes.bfloat16) if wide else self.stored

  def map(self) -> np.ndarray:
    """The numbers in the file."""
    if storage.is_local(self.path):
      return np.memmap(self.path, self.stored, "r", self.offset, self.shape)
    stop = self.offset + self.stored.itemsize * math.prod(self.shape)
    data = storage.read_range(self.path, self.offset, stop)
    return np.frombuffer(data, self.stored).reshape(self.shape)

  @property
  def row_bytes(self) -> int:
    return self.stored.itemsize * math.prod(self.shape[1:])

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Some rows of the file."""
    if storage.is_local(self.path):
      return self.map()[start:stop]
    return dataclasses.replace(self, offset=self.offset + start * self.row_bytes,
                               shape=(stop - start, *self.shape[1:])).map()

  @functools.cached_property
  def _row_scales(self) -> np.ndarray | None:
    """[rows, 1, ...], or None."""
    ones = (1,) * (len(self.shape) - 1)
    return self.scale and np.broadcast_to(
        self.scale.map().astype(np.float32).reshape(-1, *ones), (self.shape[0], *ones))

  def read_into(self, out: np.ndarray, index: tuple | None = None) -> None:
    """out[...] = tensor[index], cast to out's dtype; reads only the pages that it needs.

    `index` is a slice of step 1 for each axis, None: everything; `out` any writable view of the
    shape that it selects. Raises CheckpointError for a number that is not finite in out's dtype.
    """
    first, *rest = index or (slice(None),) * len(self.shape)
    start, stop, _ = first.indices(self.shape[0])
    step = max(1, min(CHUNK // self.row_bytes, ROWS))
    for row in range(start, stop, step):
      end = min(row + step, stop)
      self.put(self.rows(row, end), row, rest, out[row - start:end - start])

  def put(self, found: np.ndarray, row: int, rest, block: np.ndarray) -> None:
    """block[...] = found[:, *rest], scaled; `found` are the rows from `row` on; see `read_into`."""
    scale, end = self._row_scales, row + len(block)
    with np.errstate(over="ignore", invalid="ignore"):  # reported below
      part = found[(slice(None), *rest)]
      block[...] = part if scale is None else part.astype(np.float32) * scale[row:end]
    if not _finite(block):
      fault = (f"numbers too large for {block.dtype}; use bfloat16 or float32"
               if _finite(np.array(found)) else
               f"NaN or infinite numbers (rows {row} to {end - 1}); the file is damaged or its "
               "training diverged")
      raise CheckpointError(f"{self.path}: {self.key} has {fault}")


def all_finite(x: np.ndarray) -> bool:
  """Whether `x` holds no NaN and no infinity; checked block by block."""
  flat, step = x.reshape(-1), CHUNK // x.dtype.itemsize
  return all(_finite(flat[i:i + step]) for i in range(0, flat.size, step))


def read_json(path: pathlib.Path, object_pairs_hook=None) -> dict:
  """Reads a JSON object from a file; CheckpointError if it cannot be read."""
  try:
    return storage.read_json(path, object_pairs_hook=object_pairs_hook)
  except FileNotFoundError:
    raise CheckpointError(f"{path}: no such file") from None
  except CheckpointError:  # of `object_pairs_hook`
    raise
  except (OSError, ValueError) as e:
    raise CheckpointError(f"{path}: not readable as JSON: {e}") from e


def find_tensors(folder: pathlib.Path, stem: str) -> dict[str, Tensor]:
  """Finds the tensors of `stem`.safetensors, or of the shards that an index names.

  The index is `stem`.safetensors.index.json. Without `ema`, `model` is read. Keys are the
  published ones, whatever the file calls them. Raises CheckpointError as `read_header` does, and if
  index and shards disagree.
  """
  for name in (stem, *["model"] * (stem == "ema")):
    single, index = (folder / f"{name}.safetensors{end}" for end in ("", ".index.json"))
    if single.is_file() and index.is_file():
      raise CheckpointError(f"{folder}: has both {single.name} and {index.name}; remove the one "
                            "that is stale")
    if single.is_file() or index.is_file():
      read = read_header(single) if single.is_file() else _read_shards(index)
      tensors = _published(read, stem)
      break
  else:
    others = [p.name for end in ("safetensors", "bin", "pt") for p in folder.glob(f"*.{end}")]
    raise CheckpointError(f"{folder / stem}.safetensors: no such file, and no {stem}.safetensors."
                          f"index.json beside it; found {listing(others) or 'no weights'}")
  spare = folder / VIT_FILE
  if stem == "ema" and spare.is_file() and not any(key.startswith(VIT) for key in tensors):
    base = _published(read_header(spare), stem)
    tensors |= {key: tensor for key, tensor in base.items() if key.startswith(VIT)}
    _note(f"{spare}: the ViT is read from it")
  return tensors


def read_header(path: pathlib.Path) -> dict[str, Tensor]:
  """Reads the header of one file: its tensors by key, in the order of the file.

  Raises CheckpointError: no such file, not safetensors, truncated, a key twice, not a float.
  """
  if not path.is_file():
    raise CheckpointError(f"{path}: no such file")
  try:
    size = path.stat().st_size
    length = int.from_bytes(storage.read_range(path, 0, min(8, size)), "little")
    if length > min(_HEADER_BYTES, size):
      raise ValueError(f"its header would have {length} bytes")
    if storage.is_local(path):
      with safetensors.safe_open(path, framework="numpy"):
        pass  # opening checks the header against itself and against the file's length
    header = storage.parse_json(storage.read_range(path, 8, 8 + length),
                                object_pairs_hook=lambda p: _unique(p, path))
    if not storage.is_local(path):
      ranges.check_places(header, size - 8 - length)
  except CheckpointError:  # of `_unique`
    raise
  except (safetensors.SafetensorError, OSError, ValueError) as e:
    raise CheckpointError(f"{path}: not a complete safetensors file ({e}); download or write it "
                          "again") from e
  header.pop("__metadata__", None)
  for key, entry in header.items():
    if entry["dtype"] not in DTYPES and not _IGNORED.fullmatch(key):
      raise CheckpointError(f"{path}: {key} has dtype {entry['dtype']}; expected one of "
                            f"{', '.join(DTYPES)}; save quantized weights as bfloat16")
  return {key: Tensor(path, key, DTYPES.get(entry["dtype"]), tuple(entry["shape"]),
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


def in_order(tensors: list[Pending]) -> list[Pending]:
  """Sorts tensors as `write_tensors` makes and writes them."""
  # Widest dtype first, like the library: every tensor is aligned to its dtype.
  return sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))


@functools.cache  # headers are read more than once
def _note(text):
  print(f"note: {text}", file=sys.stderr)


def _published(tensors, stem) -> dict[str, Tensor]:
  """The tensors by published keys: see the top of this file. Says on stderr what was changed."""
  names = {key: _WRAPPERS.sub("", key) for key in tensors}
  anchor, where = _ANCHORS[stem], next((t.path.parent for t in tensors.values()), "")
  ends = [name for name in names.values() if name.endswith(f".{anchor}")]
  if anchor not in names.values() and len(ends) == 1:
    prefix = ends[0].removesuffix(anchor)
    names = {key: name.removeprefix(prefix) for key, name in names.items()}
  if changed := [key for key, name in names.items() if key != name]:
    _note(f"{where}: prefixes of {len(changed)} keys are left out: {changed[0]} is read as "
          f"{names[changed[0]]}")
  if len(set(names.values())) < len(names):
    twice = [name for name, n in collections.Counter(names.values()).items() if n > 1]
    raise CheckpointError(f"{where}: without prefixes, {listing(twice)} is there twice; remove one")
  if ignored := [key for key in names if _IGNORED.fullmatch(key)]:
    _note(f"{where}: {len(ignored)} buffers that hold nothing learned are passed over: "
          f"{listing(ignored)}")
  found = {names[key]: t for key, t in tensors.items() if not _IGNORED.fullmatch(key)}
  for key in [k for k, t in found.items() if k.endswith(".weight") and t.stored.itemsize == 1]:
    for name in (form.format(key.removesuffix(".weight")) for form in _SCALES):
      if name in found:
        found[key] = _scaled(found[key], found.pop(name))
        break
  return found


def _scaled(tensor, scale):
  rows = tensor.shape[:1] + (1,) * (len(scale.shape) - 1)
  if math.prod(scale.shape) != 1 and scale.shape != rows:
    raise CheckpointError(f"{scale.path}: {scale.key} has shape {scale.shape}, a scale for each "
                          f"block of {tensor.key}; only one for all or one a row is read: multiply "
                          "the scales in and save the weights as bfloat16")
  return dataclasses.replace(tensor, scale=scale)


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
  weight_map = read_json(index, lambda p: _unique(p, index)).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise CheckpointError(f"{index}: has no weight_map from key to file")
  for key, name in weight_map.items():
    short = str(name).removeprefix("./")
    if not isinstance(name, str) or pathlib.PurePath(short).name != short or len(short) > 200:
      raise CheckpointError(f"{index}: weight_map places {key} in {str(name)[:80]!r}; expected a "
                            "file name")
    weight_map[key] = short
  for name in set(weight_map.values()):
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
  with storage.writer(path) as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
      # Viewed as bytes, since files cannot write numpy's extension dtypes.
      f.write(np.ascontiguousarray(t.make()).view(np.uint8).data)
