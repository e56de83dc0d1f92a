"""Files of records, JSON lines, JSON or CSV, each record with the place where it stands.

Every failure is a ValueError that names the file and, wherever there is one, the line.
"""

import csv
import io
import json
import pathlib
import re
import typing

_BETWEEN = re.compile(r"[\s,:]*")
_KINDS = {str: "text", int: "a whole number", list: "a list", dict: "an object"}


class Entry(typing.NamedTuple):
  """One record.

  Attributes:
    where: "FILE, line N", for messages.
    key: its key where the file is one JSON object of records, else None.
    record: as published.
  """

  where: str
  key: str | None
  record: dict


def json_lines(path) -> list[Entry]:
  """One JSON object a line."""
  lines = _read(path).rstrip().split("\n")
  entries = []
  for number, line in enumerate(lines, 1):
    where = f"{path}, line {number}"
    if not line.strip():
      raise ValueError(f"{where}: is empty, but every line must be a JSON object")
    entries.append(Entry(where, None, _object(_parse(line, where), where)))
  return entries


def json_records(path) -> list[Entry]:
  """A JSON array of objects, or a JSON object of objects, in the order of the file."""
  text = _read(path)
  if not isinstance(_parse(text, str(path)), list | dict):
    raise ValueError(f"{path}: must be a JSON array or object of records")
  # `json.loads` forgets where records stand, and all but the last of those with one key. The
  # text is known to be valid by now, so that what is between two values can be skipped.
  decode, entries = json.JSONDecoder().raw_decode, []
  at, keyed = text.index("[" if _first(text) == "[" else "{"), _first(text) == "{"
  at = _BETWEEN.match(text, at + 1).end()
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
  """The rows of a CSV file with a header; a row's place is where it begins."""
  rows = csv.DictReader(io.StringIO(_read(path), newline=""))
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
    raise ValueError(f"{path}, line {line}: not CSV: {e}") from e
  return entries


def field(entry: Entry, name: str, kind: type):
  """A field of a record; a text must say something.

  Raises:
    ValueError: missing or of another type.
  """
  value = entry.record.get(name)
  if type(value) is not kind:
    have = f"has no field {name!r}" if name not in entry.record else f"{name!r} is {value!r}"
    raise ValueError(f"{entry.where}: {have}; it must be {_KINDS[kind]}")
  if kind is str and not value.strip():
    raise ValueError(f"{entry.where}: {name!r} is empty")
  return value


def check_unique(entries, ids) -> None:
  """Raises ValueError with both places where two records have one id."""
  first = {}
  for entry, name in zip(entries, ids):
    if name in first:
      raise ValueError(f"{entry.where}: {name} is there already, at {first[name]}")
    first[name] = entry.where


def _first(text):
  return text.lstrip()[:1]


def _read(path):
  try:
    return pathlib.Path(path).read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
  except UnicodeDecodeError as e:
    line = e.object.count(b"\n", 0, e.start) + 1
    raise ValueError(f"{path}, line {line}: not UTF-8 text") from e
  except OSError as e:
    raise ValueError(f"{path}: cannot be read ({e.strerror})") from e


def _parse(text, where):
  try:
    return json.loads(text)
  except json.JSONDecodeError as e:
    place = where if ", line " in where else f"{where}, line {e.lineno}"
    raise ValueError(f"{place}: not JSON: {e.msg} (column {e.colno})") from e


def _object(value, where):
  if not isinstance(value, dict):
    raise ValueError(f"{where}: must be a JSON object, not {str(value)[:40]!r}")
  return value
