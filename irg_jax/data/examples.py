"""Records of IRGL as examples of `tensorflow-datasets`, and where the files of a mode are."""

import dataclasses
import functools
import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds

from irg_jax import storage
from irg_jax.data.records import ImagePart, Record, TextPart

NAME = "irgl"
VERSION = "1.0.0"
SPLIT = "train"

_EMPTY_PART = {"text": "", "picture": b"", "need_loss": False, "need_vae": False,
               "need_vit": False, "moments": b""}


def mode_folder(path, mode: str) -> pathlib.Path:
  """Folder of the ArrayRecord files of a mode under `path`."""
  return storage.path(path) / NAME / mode / VERSION


def shard_path(folder, number: int, count: int) -> pathlib.Path:
  """File `number` of `count` of a mode, named as by tfds."""
  return storage.path(folder) / f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{count:05d}"


@functools.cache
def features() -> tfds.features.FeaturesDict:
  """Features of an example: numbers and bytes, which need no TensorFlow.

  A part with an empty `picture` is a text. `moments` is empty, or `ImagePart.moments` in numpy's
  file format.
  """
  binary = tfds.features.Tensor(shape=(), dtype=np.object_)
  flag = tfds.features.Scalar(np.bool_)
  return tfds.features.FeaturesDict({
      "index": tfds.features.Scalar(np.int64),
      "parts": tfds.features.Sequence({
          "text": tfds.features.Text(), "picture": binary, "need_loss": flag,
          "need_vae": flag, "need_vit": flag, "moments": binary}),
  })


def from_example(example: dict, mode: str) -> Record:
  """Decoded example -> record."""
  columns = zip(*(example["parts"][name] for name in _EMPTY_PART))
  return Record(mode, int(example["index"]), tuple(_to_part(*column) for column in columns))


def to_example(record: Record) -> dict:
  """Record -> example of `features`; its mode is in the folder's name."""
  return {"index": record.index, "parts": [_from_part(part) for part in record.parts]}


def _from_part(part):
  if isinstance(part, TextPart):
    return _EMPTY_PART | dataclasses.asdict(part)
  moments = io.BytesIO()
  if part.moments is not None:
    np.save(moments, part.moments, allow_pickle=False)
  return _EMPTY_PART | {"picture": part.data, "need_loss": part.need_loss,
                        "need_vae": part.need_vae, "need_vit": part.need_vit,
                        "moments": moments.getvalue()}


def _to_part(text, image, need_loss, need_vae, need_vit, moments):
  if not image:
    return TextPart(text.decode("utf-8"), bool(need_loss))
  array = np.load(io.BytesIO(moments), allow_pickle=False) if moments else None
  return ImagePart(image, bool(need_loss), bool(need_vae), bool(need_vit), array)
