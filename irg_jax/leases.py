"""Locks and new folders in buckets, where nothing can be renamed.

A lock is an object that says who holds it. Its holder writes it anew every few seconds, and each
write succeeds only where nobody else has written since (see `buckets.Path.put_if`), so a lock whose
holder gave no sign of life for a minute has one new holder, and the old one finds out.

A folder is marked as unfinished, by such a lock in it, until it is complete.
"""

import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time

from irg_jax import holders, storage

UNFINISHED = ".unfinished"  # the lock in a folder that is being made


class Held(ValueError):
  """A living process holds the lock."""


@contextlib.contextmanager
def new_folder(folder):
  """`storage.atomic_folder`; in a bucket, yields the folder itself, marked until it is complete.

  Readers refuse a marked folder, see `check_finished`. What a killed process left is removed.
  """
  if storage.is_local(folder := storage.path(folder)):
    with storage.atomic_folder(folder) as partial:
      yield partial
    return
  check_new(folder)
  with leased(folder / UNFINISHED, f"{folder}: another command is at work in it"):
    _clear(folder)
    try:
      yield folder
    except BaseException:
      _clear(folder)
      raise


def check_new(folder) -> None:
  """`storage.check_absent`; in a bucket, what a killed process left does not count."""
  if storage.is_local(folder := storage.path(folder)):
    storage.check_absent(folder)
  elif folder.exists() and not (folder / UNFINISHED).exists():
    raise FileExistsError(f"{folder}: exists and is not an empty folder; choose another or "
                          "remove it")


def is_finished(folder) -> bool:
  """Whether a folder is there and complete."""
  folder = storage.path(folder)
  return folder.exists() and (storage.is_local(folder) or not (folder / UNFINISHED).exists())


def check_finished(folder) -> None:
  """ValueError for a folder that is there and not complete."""
  if folder.exists() and not is_finished(folder):
    raise ValueError(f"{folder}: not complete: the command that writes it is at work, or was "
                     "killed; wait for it, or start it again")


def _clear(folder):
  for path in list(folder.rglob("*")):
    if path != folder / UNFINISHED:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def leased(path, refusal: str, touched: float = 5.0, void: float = 60.0):
  """Holds the lock at `path`, of a bucket; `refusal` as of `runs.locked`.

  Args:
    touched, void: seconds between two signs of life, and seconds without one.
  """
  me, done, state = holders.me(), threading.Event(), {}
  holders.held.add(me["key"])
  thread = threading.Thread(target=_renew, args=(path, me, state, touched, done), daemon=True)
  try:
    state["version"] = _take(path, json.dumps(me).encode(), refusal, touched, void)
    thread.start()
    yield
  finally:
    done.set()
    if thread.ident:
      thread.join()
      with contextlib.suppress(OSError):
        if (found := path.look()) and holder_in(found.content)["key"] == me["key"]:
          path.unlink(missing_ok=True)
    holders.held.remove(me["key"])


def _take(path, data, refusal, touched, void) -> str:
  """Writes the lock once it is void; returns its version. Raises Held."""
  first, end, told = path.look(), time.monotonic() + void, False
  while True:
    found = path.look()
    holder, known = (holder_in(x.content) if x else {} for x in (found, first))
    here = holder.get("machine") == holders.machine()
    moved = found and first and found.version != first.version
    if found and (holders.alive(holder) if here else moved and holder["key"] == known["key"]):
      raise refused(refusal, holder)
    if not found or here or not moved and time.monotonic() > end:
      if version := path.put_if(data, found and found.version):
        return version
    elif moved or not first:
      first, end = found, time.monotonic() + void
    elif not told:
      print(f"{refusal}, or has ended: waiting for a sign of life, at most {void:.0f} s",
            file=sys.stderr, flush=True)
      told = True
    time.sleep(touched / 10)


def _renew(path, me, state, touched, done):
  """Writes the lock anew until `done`; ends the process if another one has written it."""
  for beat in itertools.count():
    if done.wait(touched):
      return
    data = json.dumps(me | {"beat": beat}).encode()  # S3's version is a digest of the content
    with contextlib.suppress(OSError):  # the store may be away for a while
      version = path.put_if(data, state["version"])
      if version is None and (found := path.look()):
        if (holder := holder_in(found.content))["key"] != me["key"]:
          give_way(path, holder)
        version = found.version  # of an earlier write, whose answer was lost
      state["version"] = version


def refused(refusal: str, holder: dict) -> Held:
  """The error of a lock that a living process holds."""
  return Held(f"{refusal}: process {holder.get('pid')} on {holder.get('host')}, since "
              f"{holder.get('since')}; wait for it to end, or choose another folder")


def give_way(path, holder: dict):
  """Ends this process at once: another one has taken its lock."""
  print(f"error: {path}: taken over by process {holder.get('pid')} on {holder.get('host')}, "
        "which took this one for dead", file=sys.stderr, flush=True)
  os._exit(2)


def holder_in(data: bytes) -> dict:
  """The content of a lock, at least its "key"."""
  with contextlib.suppress(ValueError):
    content = storage.parse_json(data.decode("utf-8", "replace"))
    if isinstance(content, dict) and re.fullmatch("[0-9a-f]{32}", str(content.get("key"))):
      return content
  return {"key": "damaged"}
