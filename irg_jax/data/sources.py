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
import hashlib
import io
import itertools
import math
import os
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from irg_jax import leases, storage
from irg_jax.data import array_records, parquet
from irg_jax.data.examples import (
    NAME, SPLIT, VERSION, features, from_example, mode_folder, shard_path, to_example)
from irg_jax.data.records import MODES, Record, TextPart
from irg_jax.storage import atomic_file, scratch_folder

SHARD_BYTES = 512 * 2**20

# One record a group: reading a record reads no other. Images and moments do not compress.
_WRITER_OPTIONS = "group_size:1,uncompressed"



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
  path = storage.path(path)
  built = mode_folder(path, mode)
  if built.parent.is_dir():
    return (BuiltSource if storage.is_local(built) else array_records.BucketSource)(built, mode)
  if not (path / mode).is_dir():
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
  out = storage.path(out)
  for mode in modes:
    parquet.mode_files(source, mode)
    if leases.is_finished(mode_folder(out, mode).parent):
      raise ValueError(f"{mode_folder(out, mode).parent} exists already; remove it, or choose "
                       "another folder")
  if not storage.is_local(out):
    return {mode: _build_in_bucket(source, out, mode, max_rejected, shard_bytes, workers, progress)
            for mode in modes}
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


def _build_in_bucket(source, out, mode, max_rejected, shard_bytes, workers, progress) -> dict:
  """Builds one mode, file by file; its folder is refused until it is complete."""
  folder, tally = mode_folder(out, mode), parquet.Tally(source, mode, max_rejected)
  with leases.new_folder(folder.parent):
    good = parquet.read_good(tally, workers=workers, progress=progress)
    lengths, size = write_shards(folder, (record for _, record in good), shard_bytes)
    if not lengths:
      raise ValueError(f"{source}: none of the {tally.total} rows of mode {mode} can be used")
    with storage.atomic_files(folder) as scratch:
      write_info(out, mode, lengths, size, tally.metadata, scratch)
  return tally.metadata


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
  folder, sizes = storage.path(folder), []
  for first in records:
    rest = itertools.chain([first], records)
    sizes.append(write_shard(folder / f"{len(sizes)}", rest, shard_bytes))
  for number in range(len(sizes)):  # each name has the number of files, which is known only now
    (folder / f"{number}").replace(shard_path(folder, number, len(sizes)))
  return [count for count, _ in sizes], sum(size for _, size in sizes)


def write_info(path, mode: str, shard_lengths: list[int], num_bytes: int, metadata: dict,
               into=None) -> None:
  """Writes the descriptions that make a dataset of the files in `mode_folder(path, mode)`.

  `shard_lengths` and `num_bytes` are the records of each file and the bytes of all, as returned by
  `write_shard`; `metadata` is that of the source; `into` is another folder to write to.
  """
  folder = mode_folder(path, mode)
  builder = Irgl(config=mode, data_dir=into or path, file_format="array_record")
  builder.info.set_splits(tfds.core.SplitDict([_split_info(folder, shard_lengths, num_bytes)]))
  builder.info.metadata.update(metadata)
  builder.info.write_to_directory(into or folder)


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
