"""Records as ArrayRecord files, in the form of the `tensorflow-datasets` builder `irgl`.

A folder of one mode is `PATH/irgl/MODE/VERSION`. It may hold the moments of the images that
the VAE encodes, or not yet; nothing else differs.
"""

import contextlib
import functools
import io
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from irg_jax.data.records import ImagePart, Record, TextPart
from irg_jax.storage import atomic_file

NAME = "irgl"
VERSION = "1.0.0"
SPLIT = "train"

# One record a group, so that reading one record reads no other. Images and moments do not
# compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@functools.cache
def features() -> tfds.features.FeaturesDict:
  """Features of an example: plain numbers and bytes, which need no TensorFlow.

  A part with an empty `image` is a text. `moments` is empty, or the array of
  `ImagePart.moments` in numpy's own file format.
  """
  binary = tfds.features.Tensor(shape=(), dtype=np.object_)
  flag = tfds.features.Scalar(np.bool_)
  return tfds.features.FeaturesDict({
      "index": tfds.features.Scalar(np.int64),
      "parts": tfds.features.Sequence({
          "text": tfds.features.Text(), "picture": binary, "need_loss": flag,
          "need_vae": flag, "need_vit": flag, "moments": binary}),
  })


def mode_folder(path, mode: str) -> pathlib.Path:
  """Where the ArrayRecord files of a mode are under `path`."""
  return pathlib.Path(path) / NAME / mode / VERSION


def to_example(record: Record) -> dict:
  """A record as the features name it; the mode is the folder's."""
  return {"index": record.index, "parts": [_from_part(part) for part in record.parts]}


def from_example(example: dict, mode: str) -> Record:
  """The record of a decoded example."""
  parts = example["parts"]
  columns = zip(*(parts[name] for name in
                  ("text", "picture", "need_loss", "need_vae", "need_vit", "moments")))
  return Record(mode, int(example["index"]), tuple(_to_part(*column) for column in columns))


def serialize(example: dict) -> bytes:
  """An example as it stands in the file."""
  return features().serialize_example(features().encode_example(example))


def shard_path(folder, number: int, count: int) -> pathlib.Path:
  """File `number` of `count` of a mode, as tensorflow-datasets names it."""
  return pathlib.Path(folder) / f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{count:05d}"


def write_shard(path, records) -> tuple[int, int]:
  """Writes records to one file, which appears whole or not at all.

  Args:
    path: the file.
    records: iterable of Record, at least one; or of bytes from `serialize`.

  Returns:
    Number of records, and of their bytes.

  Raises:
    ValueError: there is no record.
    OSError: the file cannot be written, for example because the disk is full.
  """
  path = pathlib.Path(path)
  with atomic_file(path) as aside:
    count, size = _write(aside, records)
    if not count:
      raise ValueError(f"{path}: no record to write")
  return count, size


def write_shards(folder, examples, shard_bytes: int) -> tuple[list[int], int]:
  """Writes examples in order to as many files as it takes, holding one at a time.

  Args:
    folder: an empty folder.
    examples: iterable of what `to_example` returns, at least one.
    shard_bytes: a file ends with the record that reaches this size.

  Returns:
    Number of records of each file, and of all bytes.
  """
  folder, sizes = pathlib.Path(folder), []
  serialized = map(serialize, examples)
  for first in serialized:
    sizes.append(write_shard(folder / f"{len(sizes)}", _until_full(first, serialized, shard_bytes)))
  for number in range(len(sizes)):  # the count is in each name, and known only now
    os.replace(folder / f"{number}", shard_path(folder, number, len(sizes)))
  return [count for count, _ in sizes], sum(size for _, size in sizes)


def _write(path, records):
  with _disk_errors(path):
    writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
  count = size = 0
  try:
    for record in records:
      data = record if isinstance(record, bytes) else serialize(to_example(record))
      with _disk_errors(path):
        writer.write(data)
      count, size = count + 1, size + len(data)
  finally:
    with _disk_errors(path):
      writer.close()
  return count, size


@contextlib.contextmanager
def _disk_errors(path):
  """The library says RuntimeError where Python says OSError."""
  try:
    yield
  except RuntimeError as e:
    raise OSError(f"{path}: cannot be written: {e}") from e


def _until_full(first, rest, limit):
  size = len(first)
  yield first
  while size < limit and (data := next(rest, None)) is not None:
    size += len(data)
    yield data


def _from_part(part):
  if isinstance(part, TextPart):
    return {"text": part.text, "picture": b"", "need_loss": part.need_loss, "need_vae": False,
            "need_vit": False, "moments": b""}
  moments = io.BytesIO()
  if part.moments is not None:
    np.save(moments, part.moments, allow_pickle=False)
  return {"text": "", "picture": part.data, "need_loss": part.need_loss,
          "need_vae": part.need_vae, "need_vit": part.need_vit, "moments": moments.getvalue()}


def _to_part(text, image, need_loss, need_vae, need_vit, moments):
  if not image:
    return TextPart(text.decode("utf-8"), bool(need_loss))
  array = np.load(io.BytesIO(moments), allow_pickle=False) if moments else None
  return ImagePart(image, bool(need_loss), bool(need_vae), bool(need_vit), array)
