"""Folders of runs: the record of a run's settings, and the lock that keeps other commands out.

A run is continued with the same settings, or refused: one folder never holds results of two.

A lock is a JSON file that says who holds it. It appears complete, by a hard link, which fails
where it is there already. Its holder touches it every few seconds. It is void once its process
has ended, which the holder's machine knows at once; on another machine, network file systems
included, once it was not touched for a minute. A void lock is replaced, so a killed command
blocks nobody.

In a bucket, the holder writes its lock anew instead of touching it, and each write of a lock
succeeds only where nobody else has written since, see `leases`.
"""

import contextlib
import itertools
import json
import os
import pathlib
import re
import sys
import threading
import time

from irg_jax import holders, leases, storage
from irg_jax.leases import Held

_SHOWN = 80  # characters of a value in an error message
_UNSET = object()
TOUCHED, VOID = 5.0, 60.0  # seconds between two touches; seconds without one


def check_folder(path, kind: str) -> None:
  """Raises ValueError if the folder of the record at `path` holds files, but not the record.

  Hidden files may be there. `kind` is for the message: "a training run".
  """
  path = storage.path(path)
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
  path = storage.path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  storage.write_json(path, record)


def create(path, record: dict) -> None:
  """Writes a record unless there is one: of processes that start together, the first wins."""
  path = storage.path(path)
  if not storage.is_local(path):
    path.put_if(storage.json_text(record).encode(), None)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  with storage.naming(path), storage.temporary_file(path.parent) as temporary:
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


# --- locks


@contextlib.contextmanager
def locked(path, refusal: str):
  """Holds the lock at `path`; makes its folder, and removes it again where it stays empty.

  Waits where a holder on another machine may have ended. A process whose lock was taken over, as
  on a machine that was suspended, is ended at once: another one writes the folder by then.

  Args:
    refusal: begins the message of `Held`: "--out DIR: another irg train is at work in it".
  """
  path = storage.path(path).absolute()
  storage.check_output_folder(path.parent)
  if not storage.is_local(path):
    with leases.leased(path, refusal, TOUCHED, VOID):
      yield
    return
  me, done = holders.me(), threading.Event()
  thread = threading.Thread(target=_touch, args=(path, me, done), daemon=True)
  holders.held.add(me["key"])
  with storage.kept_if_filled(path.parent):
    try:
      with storage.naming(path), _temporary(path.parent) as mine:
        mine.write_text(json.dumps(me))
        _take(path, mine, me, refusal)
      thread.start()
      yield
    finally:
      done.set()
      if thread.ident:
        thread.join()
      with contextlib.suppress(OSError):
        if _read(path) == me:
          path.unlink()
      holders.held.remove(me["key"])


@contextlib.contextmanager
def own_folder(path):
  """Path of a folder that is not there and that nobody else is given meanwhile.

  Yields `path`, or else PATH-2, PATH-3, ... The folder is not made, so a command that is refused
  leaves nothing; a lock keeps its name. For names that no user chose, such as a date: two commands
  of one second must not share a folder.
  """
  path = storage.path(path)
  for number in itertools.count(1):
    own = path if number == 1 else path.with_name(f"{path.name}-{number}")
    with contextlib.ExitStack() as stack:
      try:
        stack.enter_context(locked(own.with_name(f".{own.name}.name.lock"), f"{own} is taken"))
      except Held:
        continue
      if not storage.is_there(own):
        yield own
        return


def remove_void(folder) -> None:
  """Removes the locks of this machine's killed processes directly in a folder."""
  if not storage.is_local(folder):
    return
  for path in pathlib.Path(folder).glob(".*.lock"):
    with contextlib.suppress(OSError, Held):
      holder = _read(path)
      if holder and holder.get("machine") == holders.machine() and not holders.alive(holder):
        with locked(path, ""):
          pass


@contextlib.contextmanager
def _temporary(folder):
  """`storage.temporary_file` in a folder, which is made."""
  with contextlib.ExitStack() as stack:
    mine = None
    while mine is None:
      folder.mkdir(parents=True, exist_ok=True)
      with contextlib.suppress(FileNotFoundError):  # empty, and another process removed it
        mine = stack.enter_context(storage.temporary_file(folder))
    yield mine


def _take(path, mine, me, refusal):
  """Puts a file with the content of `mine` at `path`; Held where a living process has."""
  while not _linked(mine, path):
    holder = _read(path)
    if holder == me:
      return  # the answer of a file server was lost
    if holder is None or not _void(path, mine, holder, refusal):
      continue  # given back, or with another holder by now
    # Of those that find it void, the one that holds this replaces it.
    claim = path.with_name(f"{path.name}-{holder['key']}")
    _take(claim, mine, me, refusal)
    try:
      if _read(path) == holder:
        storage.write_json(path, me)
        return
    finally:
      claim.unlink(missing_ok=True)


def _void(path, mine, holder, refusal) -> bool:
  """Whether the lock is void; False if it has changed hands. Raises Held."""
  held = leases.refused(refusal, holder)
  if holder.get("machine") == holders.machine():
    if holders.alive(holder):
      raise held
    return True
  first, end, told = _touched(path), time.monotonic() + VOID, False
  while _read(path) == holder:
    if _touched(path) != first:
      raise held
    os.utime(mine)  # both times are of the file server's clock
    if _touched(mine) - first > VOID or time.monotonic() > end:
      return True
    if not told:
      print(f"{refusal}, or has ended: waiting for a sign of life, at most {VOID:.0f} s",
            file=sys.stderr, flush=True)
    told = True
    time.sleep(TOUCHED / 10)
  return False


def _touch(path, me, done):
  """Touches the lock until `done`; ends the process if the lock has another holder."""
  while not done.wait(TOUCHED):
    with contextlib.suppress(OSError):  # the file system may be away for a while
      holder = _read(path)
      if holder == me:
        os.utime(path)
      elif holder is not None:
        leases.give_way(path, holder)


def _linked(mine, path) -> bool:
  """Makes `path` with the content of `mine`; returns False where it is there."""
  try:
    os.link(mine, path)
  except FileExistsError:
    return False
  except OSError:  # a file system without hard links
    try:
      with open(path, "x", encoding="utf-8") as file:
        file.write(mine.read_text())
    except FileExistsError:
      return False
  return True


def _read(path) -> dict | None:
  """Content of a lock, at least its "key"; None without one."""
  try:
    return leases.holder_in(storage.read_file(path))
  except FileNotFoundError:
    return None


def _touched(path) -> float:
  """The time of the last touch, not from a cache: opening asks the file server. 0: no file."""
  with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
    return os.fstat(file.fileno()).st_mtime
  return 0.0
