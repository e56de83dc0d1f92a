"""Locks, new folders and local copies of files in buckets, where nothing can be renamed.

A lock is an object that says who holds it. Its holder writes it anew every few seconds, and each
write succeeds only where nobody else has written since (see `buckets.Path.put_if`), so a lock whose
holder gave no sign of life for a minute has one new holder, and the old one finds out.

A folder is marked as unfinished, by such a lock in it, until it is complete.

A file that grows record by record, such as a database, is written in a local copy, see `borrowed`,
which `Saver` copies out every few seconds; a kill loses what came since, some seconds at most.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import sys
import threading
import time

from irg_jax import holders, messages, storage

UNFINISHED = ".unfinished"  # the lock in a folder that is being made
_PAUSE = 5.0  # seconds between two copies, or three times what one takes if that is longer
_UNSAVED = "unsaved"  # folder in the user's caches for what no bucket would take


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


@contextlib.contextmanager
def borrowed(there):
  """Yields the path of a local copy of the object `there`, which may be missing.

  Holds a lock in the bucket meanwhile. Nothing is copied back, see `Saver`; the local copy is gone
  at the end.
  """
  lock = there.with_name(f".{there.name}.lock")
  with leased(lock, f"{there}: another process is writing it"):
    with storage.scratch_folder(storage.cache_folder("scratch")) as scratch:
      if there.is_file():
        there.download(scratch / there.name)
      yield scratch / there.name


class Saver(contextlib.AbstractContextManager):
  """Copies a growing file into a bucket, in a thread of its own."""

  def __init__(self, there, snapshot, local):
    """
    Args:
      there: the object.
      snapshot: writes the state of the file to a path; called from the thread.
      local: a path for that.
    """
    self._there, self._snapshot, self._local = there, snapshot, local
    self._news, self._over = threading.Event(), threading.Event()
    self._changed, self._error = False, None
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def changed(self) -> None:
    """Has the file copied soon; OSError where that has failed."""
    self._changed = True
    self._news.set()
    if self._error:
      raise self._error

  def __exit__(self, *_):
    """Copies what is new; OSError names a file that keeps it where the bucket does not take it."""
    self._over.set()
    self._news.set()
    self._thread.join()
    if not self._changed:
      return
    self._copy()
    if self._error:
      kept = storage.cache_folder(_UNSAVED) / f"{time.strftime('%Y%m%d-%H%M%S')}-{self._there.name}"
      kept.parent.mkdir(parents=True, exist_ok=True)
      shutil.copyfile(self._local, kept)
      raise OSError(f"{messages.message(self._error)}. Its newest content is in {kept}: copy that "
                    f"to {self._there}, then start the same command again") from self._error

  def _run(self):
    while not self._over.is_set():
      self._news.wait()
      self._news.clear()
      begin = time.monotonic()
      if self._changed and not self._over.is_set():
        self._copy()
      self._over.wait(max(_PAUSE, 3 * (time.monotonic() - begin)))

  def _copy(self):
    self._changed = False  # before the snapshot: what comes during it is in the next one
    try:
      self._snapshot(self._local)
      self._there.upload(self._local)
      self._error = None
    except Exception as e:  # of several libraries
      self._changed = True
      self._error = e if isinstance(e, OSError) else OSError(f"{self._there}: {e}")
