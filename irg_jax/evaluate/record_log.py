"""A file of JSON lines, appended to only, that a kill at any moment leaves readable.

A record is one line and one write. A last line that was cut short is dropped at the next opening
(and counted), so what it held is simply made again. Only the places of the records are in memory.
"""

import fcntl
import json
import os
import pathlib
import threading


class RecordLog:
  """Records by name, on disk; of two with the same name the later one counts.

  May be used from several threads, by one process at a time.

  Attributes:
    path: the file.
    lost: lines that could not be read when the file was opened.
  """

  def __init__(self, path, field: str):
    """Opens the file, or makes it.

    Args:
      path: the file; its folder is made.
      field: the entry of a record that is its name, a string.

    Raises:
      ValueError: another process has it open, or it is not such a file.
    """
    self.path = pathlib.Path(path)
    self.lost = 0
    self._field = field
    self._places = {}
    self._mutex = threading.Lock()
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._file = open(self.path, "a+b", buffering=0)
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      self._end = self._read_places()
    except BlockingIOError:
      self._file.close()
      raise ValueError(f"{self.path}: another process is writing it; wait for that one, or name "
                       "another file") from None
    except ValueError:
      self._file.close()
      raise

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def __len__(self):
    return len(self._places)

  def __contains__(self, name: str):
    return name in self._places

  def get(self, name: str) -> dict | None:
    """The record of that name, or None."""
    with self._mutex:
      if name not in self._places:
        return None
      place, length = self._places[name]
      return json.loads(os.pread(self._file.fileno(), length, place))

  def append(self, record: dict) -> None:
    """Adds a record; it is in the file when this returns.

    Raises:
      OSError: it could not be written, for example because the disk is full.
    """
    line = json.dumps(record).encode() + b"\n"
    with self._mutex:
      written = self._file.write(line)
      if written != len(line):
        self._file.truncate(self._end)  # else the next line would be joined to this half
        raise OSError(f"{self.path}: only {written} of {len(line)} bytes could be written")
      self._places[record[self._field]] = (self._end, len(line))
      self._end += len(line)

  def close(self) -> None:
    with self._mutex:
      if not self._file.closed:
        os.fsync(self._file.fileno())
        self._file.close()

  def _read_places(self):
    """Finds every record, drops a line that was cut short; returns where the next one goes."""
    end = 0
    with open(self.path, "rb") as lines:
      for line in lines:
        name = self._name(line) if line.endswith(b"\n") else None
        if name is None:
          self.lost += 1
        else:
          self._places[name] = (end, len(line))
        if line.endswith(b"\n"):
          end += len(line)
        elif not self._places and not line.startswith(b"{"):
          break  # no file of ours: it must stay as it is
        else:
          self._file.truncate(end)
    if self.lost and not self._places and os.path.getsize(self.path):
      raise ValueError(f"{self.path}: no line of it is a record with {self._field!r}; name "
                       "another file")
    return end

  def _name(self, line):
    try:
      name = json.loads(line)[self._field]
    except (ValueError, LookupError, TypeError, RecursionError):
      return None
    return name if isinstance(name, str) else None
