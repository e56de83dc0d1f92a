"""Records of IRGL by random access, and the ArrayRecord files that make it cheap.

A mode is read from either of two forms; the first one wins.

  PATH/irgl/MODE       ArrayRecord, written by `irg data build`: one read a record. It is a dataset
                       of `tensorflow-datasets`, by the builder `Irgl`, with a config a mode. Its
                       images may have VAE moments, see `latents.encode_dataset`.
  PATH/MODE/*.parquet  the published form. Opening a mode decodes all its images once, to find
                       the usable rows; reading a record decompresses part of a row group. For
                       small sets: build large ones, and those that many hosts read.

`build` writes several modes and leaves nothing behind if it fails. By hand:

  builder = Irgl(config="initial_full_learning", data_dir="data", file_format="array_record")
  builder.download_and_prepare(
      download_config=tfds.download.DownloadConfig(manual_dir="IRG-Toy-Dataset"))
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from irg_jax.data import parquet
from irg_jax.data.records import MODES, ImagePart, Record, TextPart
from irg_jax.storage import atomic_file, local_path, scratch_folder

NAME = "irgl"
VERSION = "1.0.0"
SPLIT = "train"
SHARD_BYTES = 512 * 2**20

# One record a group: reading a record reads no other. Images and moments do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_EMPTY_PART = {"text": "", "picture": b"", "need_loss": False, "need_vae": False,
               "need_vit": False, "moments": b""}


def open_source(path, mode: str, *, max_rejected: float = 0.01, progress=None):
  """Opens a mode.

  Args:
    max_rejected: share of a published mode's rows that may be unusable.
    progress: called while rows are checked, as `irg_jax.progress.Progress` is.

  Returns:
    A source: `len(source)`, `source[i]` -> Record, `source.metadata` as of `parquet.Tally`. It
    can be pickled and used from several threads.

  Raises:
    ValueError: no such mode, nothing there, too many unusable rows, damaged files.
  """
  if mode not in MODES:
    raise ValueError(f"unknown mode {mode!r}; known: {', '.join(MODES)}")
  path = local_path(path)
  built = mode_folder(path, mode)
  if built.parent.is_dir():
    return BuiltSource(built, mode)
  if not (pathlib.Path(path) / mode).is_dir():
    raise ValueError(f"{path}: no mode {mode}: neither {built.relative_to(path).parent} (from "
                     f"irg data build) nor {mode} (parquet files) is a folder there")
  return parquet.PublishedSource(path, mode, max_rejected, progress)


def open_sources(path, modes=MODES, **options) -> dict:
  """`open_source` for each mode, by mode."""
  return {mode: open_source(path, mode, **options) for mode in modes}


def needed(files) -> list[str]:
  """Names of those files of a repository that belong to a mode, in either form."""
  paths = map(pathlib.PurePosixPath, files)
  return [str(p) for p in paths if set(p.parts[:-1]) & set(MODES) and not p.name.startswith(".")]


def fingerprint(source) -> str:
  """A short text that differs for other records of a mode; the same in either form.

  It is made from records in a fixed random order: from all of a small mode, and from 256 of them
  or 32 MiB of a large one.
  """
  digest, left = hashlib.sha256(str(len(source)).encode()), 32 * 2**20
  for i in np.random.default_rng(0).permutation(len(source))[:256]:
    record = source[int(i)]
    for part in record.parts:
      data = part.text.encode() if isinstance(part, TextPart) else part.data
      roles = [getattr(part, f"need_{role}", None) for role in ("loss", "vae", "vit")]
      digest.update(f"{record.index} {roles} {len(data)} ".encode() + data)
      left -= len(data)
    if left < 0:
      break
  return digest.hexdigest()[:16]


class BuiltSource:
  """The ArrayRecord files of one mode, see `open_source`."""

  def __init__(self, folder, mode: str):
    try:
      builder = tfds.builder_from_directory(folder)
      self._examples = builder.as_data_source(SPLIT)
      missing = [f for f in builder.info.splits[SPLIT].filepaths if not f.is_file()]
    except Exception as e:  # absl, tfds and array_record have no common error
      raise ValueError(f"{folder}: not a dataset of this version that can be read: {e}; build it "
                       "again with irg data build") from e
    if missing:
      raise ValueError(f"{folder}: {len(missing)} files are missing, the first is "
                       f"{missing[0].name}; copy or build the dataset again")
    self.mode, self.metadata = mode, dict(builder.info.metadata or {})
    self._folder = folder

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, i: int) -> Record:
    i = range(len(self))[i]
    try:
      return from_example(self._examples[i], self.mode)
    except Exception as e:
      raise ValueError(f"{self._folder}: record {i} cannot be read: {e}; copy or build the "
                       "dataset again") from e


class Irgl(tfds.core.GeneratorBasedBuilder):
  """Builder of IRGL; needs no TensorFlow. Its own arguments are those of `build`."""

  VERSION = tfds.core.Version(VERSION)
  BUILDER_CONFIGS = [
      tfds.core.BuilderConfig(name=mode, description=f"The rows of {mode}.") for mode in MODES]
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
      "manual_dir is the published dataset: a folder a mode with parquet files of one column "
      "'conversation'.")
  # Nothing is downloaded, and a search for checksums would need a package that tfds leaves out
  # of its requirements.
  url_infos = {}

  def __init__(self, *, max_rejected: float = 0.01, shard_bytes: int = SHARD_BYTES,
               workers: int | None = None, progress=None, **kwargs):
    self._max_rejected, self._shard_bytes = max_rejected, shard_bytes
    self._workers, self._progress = workers, progress
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
        builder=self, features=features(), disable_shuffling=True,
        description="Interleaved thoughts and images: learning to plan, draw, and improve.",
        metadata=tfds.core.MetadataDict())

  def _split_generators(self, dl_manager):
    return {SPLIT: self._generate_examples(dl_manager.manual_dir)}

  def _generate_examples(self, path):
    return ((record.index, to_example(record)) for record in self._records(path))

  def _generate_splits(self, dl_manager, download_config):
    # A private hook, since tfds has no public one: its own writer sorts, and holds a whole mode
    # in memory if the keys are in order.
    records = self._records(dl_manager.manual_dir)
    lengths, size = write_shards(self.data_path, records, self._shard_bytes)
    return [_split_info(self.data_path, lengths, size)]

  def _records(self, path):
    """The usable rows in order; the counts of others become metadata at the end."""
    mode = self.builder_config.name
    tally, record = parquet.Tally(path, mode, self._max_rejected), None
    for _, record in parquet.read_good(tally, workers=self._workers, progress=self._progress):
      yield record
    if record is None:
      raise ValueError(f"{path}: none of the {tally.total} rows of mode {mode} can be used")
    self.info.metadata.update(tally.metadata)


def build(source, out, modes=MODES, *, max_rejected: float = 0.01, workers: int | None = None,
          shard_bytes: int = SHARD_BYTES, progress=None) -> dict[str, dict]:
  """Builds modes of the published dataset at `source` as `out/irgl/MODE`, all or none.

  Args:
    max_rejected: share of a mode's rows that may be unusable.
    shard_bytes: size of a file.
    workers, progress: see `parquet.read_good`.

  Returns `parquet.Tally.metadata` by mode. Raises ValueError if a mode has no files, exists
  already, or has too many unusable rows.
  """
  out = pathlib.Path(out)
  for mode in modes:
    parquet.mode_files(source, mode)
    if mode_folder(out, mode).parent.exists():
      raise ValueError(f"{mode_folder(out, mode).parent} exists already; remove it, or choose "
                       "another folder")
  config = tfds.download.DownloadConfig(manual_dir=os.fspath(source), try_download_gcs=False)
  reports = {}
  with scratch_folder(out) as scratch:
    for mode in modes:
      builder = Irgl(config=mode, data_dir=os.fspath(scratch), file_format="array_record",
                     max_rejected=max_rejected, workers=workers, shard_bytes=shard_bytes,
                     progress=progress)
      with contextlib.redirect_stdout(io.StringIO()):  # tfds prints there
        builder.download_and_prepare(download_config=config)
      reports[mode] = dict(builder.info.metadata)
    if not (out / NAME).exists():  # all modes appear at once
      (scratch / NAME).rename(out / NAME)
    for mode in modes if (scratch / NAME).exists() else ():
      mode_folder(scratch, mode).parent.rename(mode_folder(out, mode).parent)
  return reports


def mode_folder(path, mode: str) -> pathlib.Path:
  """Folder of the ArrayRecord files of a mode under `path`."""
  return pathlib.Path(path) / NAME / mode / VERSION


def shard_path(folder, number: int, count: int) -> pathlib.Path:
  """File `number` of `count` of a mode, named as by tfds."""
  return pathlib.Path(folder) / f"{NAME}-{SPLIT}.array_record-{number:05d}-of-{count:05d}"


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


def write_shard(path, records, shard_bytes: float = math.inf) -> tuple[int, int]:
  """Writes records to one file, atomically; the file ends with the one that reaches `shard_bytes`.

  Returns the number of records, and of their bytes. Raises ValueError if there is no record, and
  OSError if the file cannot be written, for example because the disk is full.
  """
  count = size = 0
  with atomic_file(path) as partial:
    with _disk_errors(path):
      writer = ArrayRecordWriter(str(partial), _WRITER_OPTIONS)
    try:
      for record in records:
        data = features().serialize_example(features().encode_example(to_example(record)))
        with _disk_errors(path):
          writer.write(data)
        count, size = count + 1, size + len(data)
        if size >= shard_bytes:
          break
    finally:
      with _disk_errors(path):
        writer.close()
    if not count:
      raise ValueError(f"{path}: no record to write")
  return count, size


def write_shards(folder, records, shard_bytes: int) -> tuple[list[int], int]:
  """Writes an iterator of records to the files of an empty folder, as `write_shard` does.

  Returns the number of records of each file, and of bytes of all.
  """
  folder, sizes = pathlib.Path(folder), []
  for first in records:
    rest = itertools.chain([first], records)
    sizes.append(write_shard(folder / f"{len(sizes)}", rest, shard_bytes))
  for number in range(len(sizes)):  # each name has the number of files, which is known only now
    os.replace(folder / f"{number}", shard_path(folder, number, len(sizes)))
  return [count for count, _ in sizes], sum(size for _, size in sizes)


def write_info(path, mode: str, shard_lengths: list[int], num_bytes: int, metadata: dict) -> None:
  """Writes the descriptions that make a dataset of the files in `mode_folder(path, mode)`.

  `shard_lengths` and `num_bytes` are the records of each file and the bytes of all, as returned by
  `write_shard`; `metadata` is that of the source.
  """
  folder = mode_folder(path, mode)
  builder = Irgl(config=mode, data_dir=path, file_format="array_record")
  builder.info.set_splits(tfds.core.SplitDict([_split_info(folder, shard_lengths, num_bytes)]))
  builder.info.metadata.update(metadata)
  builder.info.write_to_directory(folder)


def _split_info(folder, lengths, size):
  template = tfds.core.ShardedFileTemplate(
      data_dir=tfds.core.Path(folder), dataset_name=NAME, split=SPLIT,
      filetype_suffix="array_record")
  return tfds.core.SplitInfo(
      name=SPLIT, shard_lengths=lengths, num_bytes=size, filename_template=template)


@contextlib.contextmanager
def _disk_errors(path):
  """Turns the library's RuntimeError into an OSError."""
  try:
    yield
  except RuntimeError as e:
    raise OSError(f"{path}: cannot be written: {e}") from e


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
