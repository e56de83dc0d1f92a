"""Random access to the usable records of a mode, in either of two forms; the first one wins.

  PATH/irgl/MODE       ArrayRecord, written by `irg data build`: one read a record.
  PATH/MODE/*.parquet  the published form. Opening a mode decodes all its images once, to find
                       the usable rows; reading a record decompresses part of a row group. For
                       small sets: build large ones, and those that many hosts read.
"""

import itertools
import pathlib
import threading

import numpy as np
import pyarrow.parquet as pq
import tensorflow_datasets as tfds

from irg_jax.data import array_records, parquet
from irg_jax.data.records import MODES, Record, parse_conversation


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
  built = array_records.mode_folder(path, mode)
  if built.parent.is_dir():
    return BuiltSource(built, mode)
  if not (pathlib.Path(path) / mode).is_dir():
    raise ValueError(f"{path}: no mode {mode}: neither {built.relative_to(path).parent} (from "
                     f"irg data build) nor {mode} (parquet files) is a folder there")
  return PublishedSource(path, mode, max_rejected, progress)


def open_sources(path, modes=MODES, **options) -> dict:
  """`open_source` for each mode, by mode."""
  return {mode: open_source(path, mode, **options) for mode in modes}


class BuiltSource:
  """The ArrayRecord files of one mode; see `open_source`."""

  def __init__(self, folder, mode: str):
    try:
      builder = tfds.builder_from_directory(folder)
      self._examples = builder.as_data_source(array_records.SPLIT)
      missing = [f for f in builder.info.splits[array_records.SPLIT].filepaths if not f.exists()]
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
      return array_records.from_example(self._examples[i], self.mode)
    except Exception as e:
      raise ValueError(f"{self._folder}: record {i} cannot be read: {e}; copy or build the "
                       "dataset again") from e


class PublishedSource:
  """The parquet files of one mode; see `open_source`."""

  def __init__(self, path, mode: str, max_rejected: float = 0.01, progress=None):
    tally = parquet.Tally(path, mode, max_rejected)
    good = [row.index for row, _ in parquet.read_good(tally, progress=progress)]
    if not good:
      raise ValueError(f"{path}: none of the {tally.total} rows of mode {mode} can be used")
    self.mode, self.metadata = mode, tally.metadata
    self._good = np.asarray(good)
    self._groups = []  # (file, number in the file, rows) of every row group
    for file in tally.files:
      meta = pq.read_metadata(file)
      self._groups += [(file, g, meta.row_group(g).num_rows) for g in range(meta.num_row_groups)]
    self._starts = np.cumsum([0] + [rows for _, _, rows in self._groups])
    self._open()

  def _open(self):
    self._lock, self._next, self._texts = threading.Lock(), (-1, 0), iter(())

  def __len__(self):
    return len(self._good)

  def __getitem__(self, i: int) -> Record:
    index = int(self._good[i])
    return parse_conversation(self._text(index), self.mode, index, decode=False)

  def _text(self, index):
    """One row. After the row before it, only this row is read, not the row group."""
    group = int(np.searchsorted(self._starts, index, side="right")) - 1
    offset = index - int(self._starts[group])
    with self._lock:
      current, position = self._next
      if current != group or position > offset:
        file, number, _ = self._groups[group]
        self._texts, position = parquet.iterate_texts(file, number), 0
      self._next = (-1, 0)  # in case reading fails
      text = next(itertools.islice(self._texts, offset - position, None), None)
      self._next = (group, offset + 1)
      return text

  def __getstate__(self):
    unshared = ("_lock", "_next", "_texts")
    return {name: value for name, value in self.__dict__.items() if name not in unshared}

  def __setstate__(self, state):
    self.__dict__.update(state)
    self._open()
