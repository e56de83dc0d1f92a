"""The folder of a run of `irg eval generate`: what it was made with, and files that are whole.

  OUT/run.json     settings; a start with others is refused
  OUT/.aside/...   files are written there and then renamed, so that none is ever half there

Scores beside them appear whole, too (`new_text`).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import uuid

from irg_jax.storage import atomic_file

SCORES = "scores.json"
_RUN, _ASIDE = "run.json", ".aside"
_SAMPLE = 2**20


class RunFolder:
  """Writes whole files into `out`. Any number of processes may share it."""

  def __init__(self, out: pathlib.Path, aside: pathlib.Path):
    self.out, self._aside = out, aside

  def write(self, relative, data: bytes) -> None:
    """Puts a file in its place, all of it or nothing."""
    path = self.out / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    os.replace(_written(self._aside, data), path)

  def exists(self, relative) -> bool:
    return (self.out / relative).is_file()


@contextlib.contextmanager
def open_run(out, settings: dict, notes: dict, process: str):
  """Yields the `RunFolder` of a new run, or of one with the same settings that goes on.

  Args:
    settings: JSON; what decides every file. Recorded, and compared from then on.
    notes: JSON; recorded beside them, not compared.
    process: names this process among those that share the folder.

  Raises:
    ValueError: the folder is of other settings or of something else, or a process of that
      name is at work in it.
  """
  out = pathlib.Path(out)
  check_run(out, settings)
  aside = out / _ASIDE / process
  with _alone(aside, out):
    for left in aside.iterdir():  # by a run that was killed
      left.unlink()
    _record(out, aside, {"settings": settings, "notes": notes})
    check_run(out, settings)
    yield RunFolder(out, aside)
    shutil.rmtree(aside)
    with contextlib.suppress(OSError):  # others are at work in it
      aside.parent.rmdir()


def check_run(out, settings: dict) -> None:
  """Raises ValueError unless `out` is new, empty, or a run with these settings."""
  out = pathlib.Path(out)
  if not out.is_dir():
    return
  if not (out / _RUN).is_file():
    others = sorted(p.name for p in out.iterdir() if p.name != _ASIDE)
    if others:
      raise ValueError(f"--out {out}: holds {others[0]!r} but no {_RUN}, so it is not a run of "
                       "irg eval generate; choose another folder")
    return
  found = read_run(out)["settings"]
  changed = [_difference(name, found.get(name), settings.get(name))
             for name in {**found, **settings} if found.get(name) != settings.get(name)]
  if changed:
    raise ValueError(f"--out {out}: was begun with other settings ({'; '.join(changed)}); "
                     "give the same ones, or another folder")


def read_run(out) -> dict:
  """What a run was made with: {"settings": ..., "notes": ...}.

  Raises:
    ValueError: no run there.
  """
  path = pathlib.Path(out) / _RUN
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
    return {"settings": dict(found["settings"]), "notes": dict(found["notes"])}
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise ValueError(f"{path}: cannot be read as the record of a run ({e})") from e


def fingerprint(folder) -> str:
  """A short text that differs for other weights or another tokenizer.

  Of every file: its name, its size, and its beginning, middle and end. Copies agree; another
  layout of the same weights does not. Scores that a checkpoint got since are no part of it.
  """
  folder, digest = pathlib.Path(folder), hashlib.sha256()
  files = [p for p in sorted(folder.rglob("*")) if p.is_file() and _counts(p.relative_to(folder))]
  for path in files:
    size = path.stat().st_size
    digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
    with path.open("rb") as f:
      for start in (0, (size - _SAMPLE) // 2, size - _SAMPLE):
        f.seek(max(0, start))
        digest.update(f.read(_SAMPLE))
  return digest.hexdigest()[:16]


@contextlib.contextmanager
def new_text(path):
  """Yields a text file that appears at `path`, whole, on success.

  What a writer that was killed left beside it goes away; one that lives has a lock.
  """
  path = pathlib.Path(path)
  for left in path.parent.glob(f".{'[0-9a-f]' * 8}.partial"):
    with contextlib.suppress(OSError), open(left, encoding="utf-8") as file:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      left.unlink()
  with atomic_file(path) as aside, open(aside, "w", encoding="utf-8", errors="replace") as file:
    with contextlib.suppress(OSError):  # a file system without locks
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield file


def _counts(path):
  hidden = any(part.startswith(".") for part in path.parts)
  weighs = path.suffix in (".json", ".txt", ".safetensors") and path.name != SCORES
  return not hidden and (weighs or len(path.parts) > 1)


def _difference(name, was, now):
  if isinstance(was, dict) and isinstance(now, dict):
    inner = next(k for k in {**was, **now} if was.get(k) != now.get(k))
    return _difference(f"{name}.{inner}", was.get(inner), now.get(inner))
  return f"{name} was {str(was)[:60]}, now {str(now)[:60]}"


def _record(out, aside, content):
  """Writes run.json unless another process has."""
  text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
  path = _written(aside, text.encode("utf-8", "replace"))
  try:
    os.link(path, out / _RUN)  # unlike a rename, never replaces the record of another start
  except FileExistsError:
    pass
  except OSError:  # a file system without links
    if not (out / _RUN).exists():
      os.replace(path, out / _RUN)
  path.unlink(missing_ok=True)


def _written(folder, data):
  path = folder / uuid.uuid4().hex
  with path.open("wb") as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  return path


@contextlib.contextmanager
def _alone(folder, out):
  """Makes a folder and holds a lock on it that ends with the process, however that ends."""
  folder.mkdir(parents=True, exist_ok=True)
  handle = os.open(folder, os.O_RDONLY)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as e:
    os.close(handle)
    raise ValueError(f"--out {out}: another process with the same --process-id and "
                     "--num-processes is at work in it") from e
  except OSError:  # a file system without locks: the user sees to it
    pass
  folder.mkdir(parents=True, exist_ok=True)  # the process that had the lock may have removed it
  try:
    yield
  finally:
    os.close(handle)
