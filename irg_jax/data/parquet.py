"""IRGL in its published form: a folder a mode, parquet files with one column `conversation`.

Reading goes row by row and counts the unusable rows; writing goes row group by row group.
"""

import collections
import concurrent.futures
import dataclasses
import itertools
import json
import os
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

from irg_jax.data.records import Record, Rejected, parse_conversation

COLUMN = "conversation"
_GROUP_ROWS = 64
LISTED = 10  # unusable rows in an error message


@dataclasses.dataclass(frozen=True)
class Row:
  """A row before parsing.

  Attributes:
    file, row: name of the file, and number of the row in it from 0.
    index: number of the row among all rows of the mode.
    text: JSON as bytes; None for a null.
  """

  file: str
  row: int
  index: int
  text: bytes | None = dataclasses.field(repr=False)


class Tally:
  """Counter of the unusable rows of a mode; raises when their share is too large.

  Attributes:
    mode, total: the mode, and the number of all its rows.
    metadata: {"rows": all rows, "rejected": {reason: rows}, "offenders": [(file, row, reason,
      detail), ...]}, where the offenders are the first `listed` unusable rows. It grows while
      rows are read.
  """

  def __init__(self, mode: str, total: int, max_rejected: float, listed: int = LISTED):
    if not 0 <= max_rejected <= 1:
      raise ValueError("max_rejected is the share of rows that may be unusable, 0 to 1, not "
                       f"{max_rejected}")
    self.mode, self.total = mode, total
    self.metadata = {"rows": total, "rejected": {}, "offenders": []}
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
  rejected = metadata["rejected"]
  usable = metadata["rows"] - sum(rejected.values())
  reasons = [f"  {count} {reason}" for reason, count in sorted(rejected.items())]
  return "\n".join([f"{mode}: {usable} of {metadata['rows']} rows usable", *reasons])


def mode_files(path, mode: str) -> list[pathlib.Path]:
  """The parquet files of a mode by name; ValueError if there are none or one is not usable."""
  folder = pathlib.Path(path) / mode
  files = sorted(folder.glob("*.parquet"))
  if not files:
    raise ValueError(f"{folder}: no parquet files")
  for file in files:
    with open_file(file) as parquet:
      _check_column(parquet.schema_arrow, file)
  return files


def open_file(path) -> pq.ParquetFile:
  """Opens a parquet file for reading in small pieces; ValueError if it cannot be read."""
  try:
    # Without a buffer size, or with pre_buffer, pyarrow fetches whole row groups.
    return pq.ParquetFile(path, buffer_size=2**20, pre_buffer=False)
  except (pa.ArrowException, OSError) as e:
    raise ValueError(f"{path}: not a parquet file that can be read: {e}") from e


def count_rows(files) -> int:
  """Number of rows of all the files, from their footers."""
  total = 0
  for file in files:
    with open_file(file) as parquet:
      total += parquet.metadata.num_rows
  return total


def iterate_texts(file, group: int | None = None):
  """Yields the rows of a file, or of one row group, as bytes (None for a null), lazily.

  One page of the file is in memory at a time. Common writers make one page of a row group of up
  to a thousand rows, so row groups of tens of rows are best for images. Raises ValueError if the
  file is damaged.
  """
  with open_file(file) as parquet:
    groups = None if group is None else [group]
    batches = parquet.iter_batches(batch_size=4, row_groups=groups, columns=[COLUMN])
    while (batch := _next_batch(batches, file)) is not None:
      column = batch.column(0)
      large = pa.types.is_large_string(column.type) or pa.types.is_large_binary(column.type)
      # As bytes, so that a text that is not UTF-8 makes one row unusable and not the file.
      yield from column.cast(pa.large_binary() if large else pa.binary()).to_pylist()


class Writer:
  """Writer of FOLDER/MODE/00000.parquet; a context manager."""

  def __init__(self, folder):
    self._folder, self._files, self._waiting = pathlib.Path(folder), {}, {}

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for mode in self._waiting:
      self._write(mode)
    for file in self._files.values():
      file.close()

  def add(self, mode: str, conversation) -> None:
    """Adds a row: a list of turns, or its JSON text."""
    text = conversation if isinstance(conversation, str) else json.dumps(conversation)
    self._waiting.setdefault(mode, []).append(text)
    if len(self._waiting[mode]) == _GROUP_ROWS:
      self._write(mode)

  def _write(self, mode):
    rows, self._waiting[mode] = self._waiting[mode], []
    if not rows:
      return
    table = pa.table({COLUMN: pa.array(rows, pa.large_string())})
    if mode not in self._files:
      (self._folder / mode).mkdir(parents=True, exist_ok=True)
      self._files[mode] = pq.ParquetWriter(self._folder / mode / "00000.parquet", table.schema)
    self._files[mode].write_table(table)


def read_good(files, tally: Tally, *, workers: int | None = None, progress=None):
  """Yields (Row, Record) of every usable row in order; the others are counted in `tally`.

  Threads decode the images (Pillow releases the GIL); a few rows a thread are in memory.

  Args:
    files, tally: of one mode.
    workers: threads; default: one a CPU.
    progress: called after each row, as `irg_jax.progress.Progress` is.

  Raises:
    ValueError: too many rows are unusable (at the end of the mode, or as soon as there are
      ten to list), or a file is damaged.
  """
  parse = lambda row: _parse(row, tally.mode)
  for done, (row, result) in enumerate(_map_ordered(parse, _rows(files), workers), 1):
    if progress:
      progress(f"reading {tally.mode}", 0, done, tally.total)
    if isinstance(result, Rejected):
      tally.reject(row, result)
    else:
      yield row, result
  tally.check(tally.total)


def _next_batch(batches, file):
  try:
    return next(batches, None)
  except (pa.ArrowException, OSError) as e:
    raise ValueError(f"{file}: damaged parquet file: {e}") from e


def _rows(files):
  index = itertools.count()
  for file in files:
    for row, text in enumerate(iterate_texts(file)):
      yield Row(file.name, row, next(index), text)


def _parse(row, mode) -> Record | Rejected:
  try:
    return parse_conversation(row.text, mode, row.index)
  except Rejected as e:
    return e


def _map_ordered(function, items, workers):
  """Yields (item, function(item)) in order; the number of items in flight is bounded."""
  workers = workers or min(os.cpu_count() or 1, 32)
  with concurrent.futures.ThreadPoolExecutor(workers) as pool:
    pending = collections.deque()
    for item in items:
      pending.append((item, pool.submit(function, item)))
      if len(pending) > 2 * workers:
        first, future = pending.popleft()
        yield first, future.result()
    for item, future in pending:
      yield item, future.result()


def _check_column(schema, file):
  if COLUMN not in schema.names:
    raise ValueError(f"{file}: no column {COLUMN!r}; its columns: {', '.join(schema.names)}")
  kind = schema.field(COLUMN).type
  tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
           pa.types.is_large_binary)
  if not any(test(kind) for test in tests):
    raise ValueError(f"{file}: column {COLUMN!r} holds {kind}, not text")
