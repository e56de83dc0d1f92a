"""The record of a run's settings, JSON in the run's folder.

A run is continued with the same settings, or refused: one folder never holds results of two.
"""

import json
import os
import pathlib

from irg_jax import storage

_SHOWN = 80  # characters of a value in an error message
_UNSET = object()


def check_folder(path, kind: str) -> None:
  """Raises ValueError if the folder of the record at `path` holds files, but not the record.

  Hidden files may be there. `kind` is for the message: "a training run".
  """
  path = pathlib.Path(path)
  others = sorted(p.name for p in path.parent.glob("[!.]*"))
  if others and not path.is_file():
    raise ValueError(f"--out {path.parent}: holds {others[0]}, but no {path.name}, so it is not "
                     f"{kind}: choose another folder")


def check_same(recorded: dict, now: dict, where: str, *, flag: str | None = None, free=(),
               renamed=None) -> None:
  """Checks settings against the recorded ones of the run that they would continue.

  ValueError names each field that differs, both values, and how to continue the run.

  Args:
    recorded, now: JSON values by name; groups are dicts, fields are named "group.name".
    where: names the run in the message: "--out FOLDER".
    flag: prefix of "field=value" in the message, "--config."; None: no flag sets a field.
    free: fields and groups that may change from one start to the next, or that are gone.
    renamed: {name in older versions: present name} of fields and groups.
  """
  before, after = dict(_fields(recorded, renamed=renamed or {})), dict(_fields(now))
  changed = [field for field in sorted(before.keys() | after.keys())
             if before.get(field, _UNSET) != after.get(field, _UNSET) and not _within(field, free)]
  if not changed:
    return
  differences = "; ".join(f"{f}={_shown(before, f)}, not {_shown(after, f)}" for f in changed)
  flags = [f"{flag}{f}={_shown(before, f)}" for f in changed if flag is not None and f in before]
  again = " ".join(flags) or "the same settings"
  raise ValueError(f"{where}: the run was started with {differences}; give {again} to continue "
                   "it, or choose another folder")


def read(path, groups=()) -> dict:
  """Reads a record; ValueError if it is missing, damaged, or lacks a group (a JSON object)."""
  try:
    record = storage.read_json(path)
    for name in groups:
      if not isinstance(record.get(name), dict):
        raise ValueError(f"no object {name!r}")
  except (OSError, ValueError) as e:
    raise ValueError(f"{path}: cannot be read as the record of a run ({e}); restore it, or choose "
                     "another folder") from e
  return record


def write(path, record: dict) -> None:
  """Writes a record atomically, over the one that is there; makes the folder."""
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, record)


def create(path, record: dict) -> None:
  """Writes a record unless there is one: of processes that start together, the first wins."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.temporary_file(path.parent) as temporary:
    temporary.write_text(storage.json_text(record), encoding="utf-8")
    try:
      os.link(temporary, path)  # unlike a rename, fails where another process was first
    except FileExistsError:
      pass
    except OSError:  # a file system without hard links
      if not path.exists():
        os.replace(temporary, path)


def _fields(settings, prefix="", renamed=()):
  """Yields (dotted present name, value as it would come back from a JSON file)."""
  for name, value in settings.items():
    name = prefix + name
    if isinstance(value, dict) and value:
      yield from _fields(value, f"{name}.", renamed)
      continue
    old = next((old for old in renamed if _within(name, (old,))), None)
    new = name if old is None else renamed[old] + name.removeprefix(old)
    yield new, json.loads(json.dumps(value))


def _within(field, groups):
  return any(field == group or field.startswith(f"{group}.") for group in groups)


def _shown(fields, name):
  text = str(fields.get(name, "(unset)"))
  return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
