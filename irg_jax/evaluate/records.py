"""Record files: readers of JSON lines, JSON and CSV, and the cache of paid answers.

The readers keep the place of every record: an error names the file and, where there is one, the
line.
"""

import contextlib
import csv
import io
import json
import pathlib
import re
import sqlite3
import typing

from irg_jax import leases, storage

_BETWEEN = re.compile(r"[\s,:]*")
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}
_SQLITE = b"SQLite format 3\0"
_OPEN = (
    "PRAGMA locking_mode=EXCLUSIVE", "PRAGMA journal_mode=WAL", "PRAGMA synchronous=NORMAL",
    "BEGIN EXCLUSIVE", "CREATE TABLE IF NOT EXISTS records "
    "(number INTEGER PRIMARY KEY, name TEXT NOT NULL, record TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS by_name ON records (name)")
_INSERT = "INSERT INTO records (name, record) VALUES (?, ?)"


class Entry(typing.NamedTuple):
  """A record of an official file."""

  where: str  # "FILE, line N", for messages
  key: str | None  # where the file is one JSON object of records
  record: dict


def file_in(path, name: str) -> pathlib.PurePath:
  """`path` itself, or the file `name` in the folder `path`."""
  file = path / name if path.is_dir() else path
  if not file.is_file():
    raise ValueError(f"--prompts {path}: no file {name} in there")
  return file


def read_lines(path):
  """Yields (line number from 1, object or None) of a JSON-lines file; None: not an object.

  Blank lines are skipped. A last line without its end is what a killed writer leaves.
  """
  opened = storage.path(path).open("rb")
  with io.TextIOWrapper(opened, encoding="utf-8", errors="replace") as file:
    for number, line in enumerate(file, 1):
      if not line.strip():
        continue
      try:
        value = storage.parse_json(line)
      except ValueError:
        value = None
      yield number, value if isinstance(value, dict) else None


def json_lines(path) -> list[Entry]:
  """Records of a JSON-lines file; ValueError names the first line that is not an object."""
  entries = []
  for number, line in enumerate(_read(path).rstrip().split("\n"), 1):
    where = f"{path}, line {number}"
    if not line.strip():
      raise ValueError(f"{where}: is empty, but every line must be a JSON object")
    entries.append(Entry(where, None, _object(_parse(line, where), where)))
  return entries


def json_records(path) -> list[Entry]:
  """Records of a JSON array of objects, or of a JSON object of objects, in the file's order."""
  text = _read(path)
  if not isinstance(_parse(text, str(path)), list | dict):
    raise ValueError(f"{path}: must be a JSON array or object of records")
  # `json.loads` forgets where records stand, and all but the last of those with one key. The
  # text is known to be valid by now, so that what is between two values can be skipped.
  decode, entries, keyed = json.JSONDecoder().raw_decode, [], text.lstrip()[0] == "{"
  at = _BETWEEN.match(text, text.index("{" if keyed else "[") + 1).end()
  while text[at] not in "]}":
    where, key = f"{path}, line {text.count(chr(10), 0, at) + 1}", None
    if keyed:
      key, at = decode(text, at)
      at = _BETWEEN.match(text, at).end()
    record, at = decode(text, at)
    entries.append(Entry(where, key, _object(record, where)))
    at = _BETWEEN.match(text, at).end()
  return entries


def csv_rows(path, columns) -> list[Entry]:
  """Rows of a CSV file with a header; `where` is the line at which a row begins."""
  rows = csv.DictReader(io.StringIO(_read(path), newline=""), strict=True)
  entries, line = [], 1
  try:
    if missing := [c for c in columns if c not in (rows.fieldnames or ())]:
      raise ValueError(f"{path}, line 1: no column {missing[0]!r}; the columns must be "
                       f"{', '.join(columns)}")
    line = rows.line_num + 1
    for row in rows:
      where = f"{path}, line {line}"
      if None in row or None in row.values():
        raise ValueError(f"{where}: has another number of fields than the header")
      entries.append(Entry(where, None, row))
      line = rows.line_num + 1
  except csv.Error as e:
    raise ValueError(f"{path}, line {line}: not CSV: {e}; a field with quotes is written "
                     "\"a \"\"big\"\" man\"") from e
  return entries


def field(entry: Entry, name: str, kind: type):
  """A field of a record. Raises ValueError where it is missing, empty or of another type."""
  value = entry.record.get(name)
  if type(value) is not kind:
    have = f"has no field {name!r}" if name not in entry.record else f"{name!r} is {value!r}"
    raise ValueError(f"{entry.where}: {have}; it must be {_KINDS[kind]}")
  if kind is str and not value.strip():
    raise ValueError(f"{entry.where}: {name!r} is empty")
  return value


def check_unique(entries, ids) -> None:
  """Raises ValueError, naming both places, where two records share an id."""
  first = {}
  for entry, name in zip(entries, ids):
    if name in first:
      raise ValueError(f"{entry.where}: {name} is there already, at {first[name]}")
    first[name] = entry.where


class Cache(contextlib.AbstractContextManager):
  """An sqlite3 file of records by their "digest". All are kept; the last of a digest counts.

  A record is in the file when `add` returns, so a killed run loses none; of a file in a bucket it
  loses those of the last seconds, see `leases.Saver`. Threads may share a cache, processes may not.
  Caches of older versions were JSON lines: the first opening imports the `.jsonl` file that lies at
  or beside the path, and leaves it as it is. `lost` counts the lines of it that could
  not be read.
  """

  def __init__(self, path):
    """Opens or makes the file; ValueError where another process has it open, or of another kind."""
    self.path, old = _cache_paths(storage.path(path))
    lines, self.lost = _old_records(old)
    with contextlib.ExitStack() as stack:
      local, self._saver = self.path, None
      if not storage.is_local(self.path):
        local = stack.enter_context(leases.borrowed(self.path))
      local.parent.mkdir(parents=True, exist_ok=True)
      self._open(local, lines)
      stack.callback(self._db.close)
      if local is not self.path:
        self._saver = stack.enter_context(leases.Saver(
            self.path, self._write_copy, local.with_name("snapshot")))
      self._opened = stack.pop_all()

  def _open(self, file, lines):
    self._db = sqlite3.connect(file, timeout=0, isolation_level=None, check_same_thread=False)
    try:
      for statement in _OPEN:
        self._db.execute(statement)
      if self._db.execute("PRAGMA user_version").fetchone()[0]:
        self.lost = 0  # imported before
      else:
        self._db.executemany(_INSERT, lines)
        self._db.execute("PRAGMA user_version=1")
      self._db.execute("COMMIT")
    except sqlite3.DatabaseError as e:
      self._db.close()
      why = ("another process is writing it; wait for that one, or name another file"
             if "locked" in str(e) else f"not a cache ({e}); name another file")
      raise ValueError(f"{self.path}: {why}") from None

  def __exit__(self, *_):
    self._opened.close()

  def get(self, digest: str) -> dict | None:
    """The last record of that digest, or None."""
    found = self._db.execute("SELECT record FROM records WHERE name = ? ORDER BY number DESC "
                             "LIMIT 1", (digest,)).fetchone()
    return json.loads(found[0]) if found else None

  def add(self, record: dict) -> None:
    """Adds a record; OSError where it cannot be written, as on a full disk."""
    try:
      self._db.execute(_INSERT, (record["digest"], json.dumps(record)))
    except sqlite3.Error as e:
      raise OSError(f"{self.path}: cannot be written ({e})") from e
    if self._saver:
      self._saver.changed()

  def _write_copy(self, path):
    try:
      with contextlib.closing(sqlite3.connect(path)) as copy:
        self._db.backup(copy)
    except sqlite3.Error as e:
      raise OSError(f"{path}: cannot be written ({e})") from e


def _read(path):
  try:
    return storage.path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
  except UnicodeDecodeError as e:
    line = e.object.count(b"\n", 0, e.start) + 1
    raise ValueError(f"{path}, line {line}: not UTF-8 text") from e
  except OSError as e:
    raise ValueError(f"{path}: cannot be read ({e.strerror})") from e


def _parse(text, where):
  try:
    return storage.parse_json(text)
  except json.JSONDecodeError as e:
    place = where if ", line " in where else f"{where}, line {e.lineno}"
    raise ValueError(f"{place}: not JSON: {e.msg} (column {e.colno})") from e
  except ValueError as e:  # a number of thousands of digits, or deep nesting
    raise ValueError(f"{where}: not JSON that can be read: {e}") from e


def _object(value, where):
  if not isinstance(value, dict):
    raise ValueError(f"{where}: must be a JSON object, not {str(value)[:40]!r}")
  return value


def _cache_paths(path):
  """The sqlite3 file, and the JSON-lines file to import, for the path that a user gives."""
  with_lines = path.suffix == ".jsonl"
  if path.is_file() and not with_lines:
    with path.open("rb") as file:
      head = file.read(len(_SQLITE))
    with_lines = bool(head) and head != _SQLITE
  return (path.with_suffix(".sqlite"), path) if with_lines else (path, path.with_suffix(".jsonl"))


def _old_records(path):
  """[(digest, record as JSON)] of a cache in JSON lines; the number of lines that are lost."""
  *lines, rest = path.read_bytes().split(b"\n") if path.is_file() else [b""]
  found = []
  for line in lines:
    with contextlib.suppress(ValueError, LookupError, TypeError, RecursionError):
      if isinstance(digest := json.loads(line)["digest"], str):
        found.append((digest, line.decode()))
  lost = len(lines) - len(found) + bool(rest)
  if lost and not found and (lines or not rest.startswith(b"{")):
    raise ValueError(f"{path}: no line of it is a record with 'digest'; name another file")
  return found, lost
