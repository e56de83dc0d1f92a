"""IRGL in its published form: a folder a mode, parquet files with one column `conversation`.

Reading goes row by row and counts the unusable rows; writing goes row group by row group.
"""

import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import pathlib
import threading
import typing

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from irg_jax import storage
from irg_jax.data.records import Record, Rejected, parse_conversation

COLUMN = "conversation"
_SCHEMA = pa.schema({COLUMN: pa.large_string()})
_GROUP_ROWS = 64
LISTED = 10  # unusable rows in an error message


class Row(typing.NamedTuple):
  """A row before parsing: its place in a file and among all rows, and its JSON (None: a null)."""

  file: str
  row: int
  index: int
  text: bytes | None


class Tally:
  """Counter of the unusable rows of a mode; raises when their share is too large.

  Attributes:
    mode, files, total: the mode, its parquet files, and the number of all rows.
    metadata: {"rows": all rows, "rejected": {reason: rows}, "offenders": [(file, row, reason,
      detail), ...]}, where the offenders are the first `listed` unusable rows. It grows while
      rows are read.
  """

  def __init__(self, path, mode: str, max_rejected: float, listed: int = LISTED):
    if not 0 <= max_rejected <= 1:
      raise ValueError("max_rejected is the share of rows that may be unusable, 0 to 1, not "
                       f"{max_rejected}")
    self.mode, self.files = mode, mode_files(path, mode)
    self.total = sum(_metadata(file).num_rows for file in self.files)
    self.metadata = {"rows": self.total, "rejected": {}, "offenders": []}
    self._max_rejected, self._listed = max_rejected, listed

  def reject(self, row: Row, why: Rejected) -> None:
    """Counts a row. Raises ValueError if there are too many and enough to list."""
    counts, offenders = self.metadata["rejected"], self.metadata["offenders"]
    counts[why.reason] = counts.get(why.reason, 0) + 1
    if len(offenders) < self._listed:
      offenders.append((row.file, row.row, why.reason, why.detail))
    if len(offenders) == self._listed:
      self.check(row.index + 1)

  def check(self, read: int) -> None:
    """Raises ValueError if too many of the first `read` rows have been rejected."""
    count = sum(self.metadata["rejected"].values())
    if count <= self._max_rejected * self.total:
      return
    lines = [f"  {file} row {row}: {reason}: {detail}"
             for file, row, reason, detail in self.metadata["offenders"]]
    rows = f"{self.total} rows" if read == self.total else f"the first {read} of {self.total} rows"
    raise ValueError(
        f"mode {self.mode}: {count} of {rows} cannot be used, more than the allowed share of "
        f"{self._max_rejected:.4g} (max_rejected). The first of them:\n"
        + "\n".join(lines))


def summary(mode: str, metadata: dict) -> str:
  """Usable rows of a mode, and unusable ones by reason, as text; `metadata` as in `Tally`."""
  rejected, rows = metadata["rejected"], metadata["rows"]
  reasons = [f"\n  {count} {reason}" for reason, count in sorted(rejected.items())]
  return f"{mode}: {rows - sum(rejected.values())} of {rows} rows usable" + "".join(reasons)


def mode_files(path, mode: str) -> list[pathlib.Path]:
  """The parquet files of a mode by name; ValueError if there are none or one is not usable."""
  folder = storage.path(path) / mode
  files = sorted(folder.glob("[!.]*.parquet"))  # hidden ones are not data, as macOS's ._x.parquet
  if not files:
    raise ValueError(f"{folder}: no parquet files")
  for file in files:
    with open_file(file) as parquet:
      schema = parquet.schema_arrow
    if COLUMN not in schema.names:
      raise ValueError(f"{file}: no column {COLUMN!r}; its columns: {', '.join(schema.names)}")
    if not _is_text(kind := schema.field(COLUMN).type):
      raise ValueError(f"{file}: column {COLUMN!r} holds {kind}, not text")
  return files


def open_file(path) -> pq.ParquetFile:
  """Opens a parquet file for reading in small pieces; ValueError if it cannot be read."""
  path = storage.path(path)
  if not path.is_file():
    raise ValueError(f"{path}: not a file, but a folder, pipe or device; move it away")
  try:
    # Without a buffer size, or with pre_buffer, pyarrow fetches whole row groups.
    file = path if storage.is_local(path) else path.open("rb")
    return pq.ParquetFile(file, buffer_size=2**20, pre_buffer=False)
  except (pa.ArrowException, OSError) as e:
    raise ValueError(f"{path}: not a parquet file that can be read: {e}") from e


def _metadata(file):
  with open_file(file) as parquet:
    return parquet.metadata


def iterate_texts(file, group: int | None = None):
  """Yields the rows of a file, or of one row group, as bytes (None for a null), lazily.

  One page of the file is in memory at a time. Common writers make one page of a row group of up
  to a thousand rows, so row groups of tens of rows are best for images. Raises ValueError if the
  file is damaged.
  """
  with open_file(file) as parquet:
    groups = None if group is None else [group]
    try:
      for batch in parquet.iter_batches(batch_size=4, row_groups=groups, columns=[COLUMN]):
        yield from _as_bytes(batch.column(0)).to_pylist()
    except (pa.ArrowException, OSError) as e:
      raise ValueError(f"{file}: damaged parquet file: {e}") from e


def _is_text(kind) -> bool:
  """Whether an Arrow type is text or bytes, be it by a dictionary or an extension such as JSON."""
  if isinstance(kind, pa.DictionaryType):
    return _is_text(kind.value_type)
  if isinstance(kind, pa.BaseExtensionType):
    return _is_text(kind.storage_type)
  return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.binary(),
                  pa.large_binary(), pa.binary_view())


def _as_bytes(column):
  """A column of text as bytes: a text that is not UTF-8 makes one row unusable, not the file."""
  while not pa.types.is_large_binary(column.type):
    if isinstance(column, pa.DictionaryArray):
      column = column.dictionary_decode()
    else:
      column = column.storage if isinstance(column, pa.ExtensionArray) else column.cast(
          pa.large_binary())
  return column


class PublishedSource:
  """The parquet files of one mode, see `sources.open_source`."""

  def __init__(self, path, mode: str, max_rejected: float = 0.01, progress=None):
    tally = Tally(path, mode, max_rejected)
    good = [row.index for row, _ in read_good(tally, progress=progress)]
    if not good:
      raise ValueError(f"{path}: none of the {tally.total} rows of mode {mode} can be used")
    self.mode, self.metadata = mode, tally.metadata
    self._good = np.asarray(good)
    self._groups = []  # (file, number in the file, rows) of every row group
    for file in tally.files:
      meta = _metadata(file)
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
        self._texts, position = iterate_texts(file, number), 0
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


def write(folder, rows) -> None:
  """Writes FOLDER/MODE/00000.parquet from pairs of a mode and a list of turns, or its JSON text."""
  waiting, files = collections.defaultdict(list), {}
  with contextlib.ExitStack() as stack:
    for mode, row in rows:
      if mode not in files:
        path = storage.path(folder) / mode / "00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = stack.enter_context(storage.atomic_file(path))
        files[mode] = stack.enter_context(pq.ParquetWriter(aside, _SCHEMA))
      waiting[mode].append(row if isinstance(row, str) else json.dumps(row))
      if len(waiting[mode]) == _GROUP_ROWS:
        files[mode].write_table(pa.table({COLUMN: waiting.pop(mode)}, _SCHEMA))
    for mode, rest in waiting.items():
      files[mode].write_table(pa.table({COLUMN: rest}, _SCHEMA))


def read_good(tally: Tally, *, workers: int | None = None, progress=None):
  """Yields (Row, Record) of every usable row in order; the others are counted in `tally`.

  `workers` threads (default: one a CPU) decode the images, since Pillow releases the GIL; a few
  rows a thread are in memory.

  `progress` is called after each row, as `irg_jax.progress.Progress` is.

  Raises:
    ValueError: too many rows are unusable (at the end of the mode, or as soon as there are
      ten to list), or a file is damaged.
  """
  index = itertools.count()
  rows = (Row(file.name, number, next(index), text) for file in tally.files
          for number, text in enumerate(iterate_texts(file)))
  for done, (row, future) in enumerate(_parsed(rows, tally.mode, workers), 1):
    if progress:
      progress(f"reading {tally.mode}", 0, done, tally.total)
    if isinstance(error := future.exception(), Rejected):
      tally.reject(row, error)
    else:
      yield row, future.result()
  tally.check(tally.total)


def _parsed(rows, mode, workers):
  """Yields (row, future of its record) in order; the number of rows in flight is bounded."""
  workers = workers or min(os.cpu_count() or 1, 32)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending = collections.deque()
    for row in rows:
      pending.append((row, pool.submit(parse_conversation, row.text, mode, row.index)))
      if len(pending) > 2 * workers:
        yield pending.popleft()
    yield from pending
