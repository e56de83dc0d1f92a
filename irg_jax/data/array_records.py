"""ArrayRecord files in a bucket: a record is read by a range of its own, and nothing else.

The library reads files of this machine only. The format is Riegeli's, in the form that
`irg data build` writes: one record a chunk, not compressed.

  blocks of 64 KiB, each begins with 24 bytes that belong to no chunk;
  chunk: header of 40 bytes (hash, size of data, hash, type and number of records, decoded size);
         data (compression, varint: bytes of the sizes, varints: sizes, then the records)
  last block: a chunk whose record has the position of the footer, which has those of all chunks
"""

import bisect
import itertools
import struct

import tensorflow_datasets as tfds

from irg_jax import leases, storage
from irg_jax.data.examples import SPLIT, features, from_example, shard_path
from irg_jax.data.records import Record

# Beside the records. In a bucket they are written last, in this order.
INFO = ("dataset_info.json", "features.json", "metadata.json")
_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 2**16, 24, 40


class BucketSource:
  """The ArrayRecord files of one mode in a bucket: each record is a range of its own."""

  def __init__(self, folder, mode: str):
    try:
      leases.check_finished(folder.parent)
      with storage.scratch_folder(storage.cache_folder("scratch")) as scratch:
        for name in INFO:
          (folder / name).download(scratch / name)
        info = tfds.builder_from_directory(scratch).info
        self.mode, self.metadata = mode, dict(info.metadata or {})
      lengths = info.splits[SPLIT].shard_lengths
      self._paths = [shard_path(folder, i, len(lengths)) for i in range(len(lengths))]
      missing = {path.name for path in self._paths} - {path.name for path in folder.iterdir()}
    except FileNotFoundError as e:
      raise ValueError(f"{folder}: not complete: {e.filename} is missing; start again the command "
                       "that writes it, or wait for it") from e
    except Exception as e:  # absl and tfds have no common error
      raise ValueError(f"{folder}: not a dataset of this version that can be read: {e}; build it "
                       "again with irg data build") from e
    if missing:
      raise ValueError(f"{folder}: {len(missing)} files are missing, the first is "
                       f"{min(missing)}; copy or build the dataset again")
    self._starts, self._places = [0, *itertools.accumulate(lengths)], {}

  def __len__(self):
    return self._starts[-1]

  def __getitem__(self, i: int) -> Record:
    i = range(len(self))[i]
    shard = bisect.bisect_right(self._starts, i) - 1
    number = i - self._starts[shard]
    path = self._paths[shard]
    try:
      if shard not in self._places:
        self._places[shard] = positions(path)
      data = read(path, *self._places[shard][number:number + 2])
      return from_example(features().deserialize_example_np(data), self.mode)
    except OSError:
      raise
    except Exception as e:
      raise ValueError(f"{path}: record {number} cannot be read: {e}; copy or build the dataset "
                       "again") from e


def positions(path) -> list[int]:
  """Positions in the file: the start of each record's chunk, and the end of the last one."""
  size = path.stat().st_size
  last = (size - 1) // _BLOCK * _BLOCK
  footer = _fields(_records(_chunk(path.read_range(last, size), last))[0])[1]
  entries = _records(_chunk(path.read_range(footer, last), footer))[1:]  # the first counts them
  return [*(_fields(entry)[1] for entry in entries), footer]


def read(path, start: int, stop: int) -> bytes:
  """The record of the chunk at [start, stop) of a file; ValueError if it is damaged."""
  record, = _records(_chunk(path.read_range(start, stop), start))
  return record


def _chunk(data, position) -> bytes:
  """Bytes of a file from a position on, without the headers of blocks."""
  parts, at = [], 0
  while at < len(data):
    inside = (position + at) % _BLOCK
    if not inside:
      at, inside = at + _BLOCK_HEADER, _BLOCK_HEADER
    parts.append(data[at:at + _BLOCK - inside])
    at += _BLOCK - inside
  return b"".join(parts)


def _records(chunk) -> list[bytes]:
  """The records of a chunk."""
  try:
    _, size, _, kind, _ = struct.unpack("<5Q", chunk[:_CHUNK_HEADER])
    data = chunk[_CHUNK_HEADER:_CHUNK_HEADER + size]
    if kind & 255 != ord("r") or len(data) != size or data[0]:
      raise ValueError("no chunk that is complete and not compressed")
    length, at = _varint(data, 1)
    end, sizes = at + length, []
    while at < end:
      length, at = _varint(data, at)
      sizes.append(length)
    if len(sizes) != kind >> 8 or end + sum(sizes) != size:
      raise ValueError("sizes that do not fit")
  except (struct.error, IndexError) as e:
    raise ValueError(f"an incomplete chunk ({e})") from e
  found = []
  for length in sizes:
    found.append(data[end:end + length])
    end += length
  return found


def _varint(data, at) -> tuple[int, int]:
  """(number, where it ends)."""
  number = shift = 0
  while True:
    byte = data[at]
    number, at, shift = number | (byte & 127) << shift, at + 1, shift + 7
    if byte < 128:
      return number, at


def _fields(message) -> dict[int, int]:
  """The numbers of a protocol buffer that has nothing else."""
  fields, at = {}, 0
  while at < len(message):
    tag, at = _varint(message, at)
    fields[tag >> 3], at = _varint(message, at)
  return fields
