"""Files and folders, on disk or in buckets: atomic writes, and JSON that others wrote.

`path` makes the one type of path for all: `pathlib.Path`, or `buckets.Path` with the same methods.
What follows is of disks: an object of a bucket is atomic; for its folders see `leases.new_folder`.

A write goes to a temporary file or folder beside the target, renamed when it is complete, so a
reader finds the earlier content or the new one, never half of it. Temporary names look like
`.0123abcd.partial`. Only a killed process leaves one behind, and the next command that writes a
folder there removes it: the temporary files of living processes are locked.
"""

import contextlib
import errno
import fcntl
import importlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import stat
import sys
import time
import uuid

SHIPPED = pathlib.Path(__file__).parent / "mini" / "checkpoint"  # comes with the package
JSON_BYTES = 2**25  # largest JSON file that is read; tokenizers have up to half of it
BUCKETS = {"gs": "gcsfs", "s3": "s3fs"}  # the package that reads a scheme
_JSON_DEPTH = 64
# Of a disk that is full, over its quota or the largest size of a file, or read-only.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
# Temporary names; earlier versions had the last two forms.
_PARTIAL = re.compile(r"\.[0-9a-f]{8}\.partial|\..+\.partial-\d+|\.irg-[a-z0-9_]{8}")


def parse_json(text, **options):
  """`json.loads`; a ValueError, too, for brackets that are nested too deeply."""
  try:
    level = [value := json.loads(text, **options)]
  except RecursionError:
    raise ValueError("its brackets are nested too deeply") from None
  for _ in range(_JSON_DEPTH):
    groups = [x.values() if isinstance(x, dict) else x for x in level if isinstance(x, dict | list)]
    level = [x for group in groups for x in group]
  if level:
    raise ValueError(f"its brackets are nested more than {_JSON_DEPTH} deep")
  return value


def path(text) -> pathlib.PurePath:
  """The path that a flag or setting names; ValueError for a scheme that is not read."""
  if not (scheme := re.match(r"([A-Za-z][\w+.-]+):/", str(text))):
    return pathlib.Path(text)
  if scheme[1] not in BUCKETS or not re.match(r"\w+://[^/]", str(text)):
    raise ValueError(f"{text}: only paths of this machine, gs://BUCKET/... and s3://BUCKET/... are "
                     "read; copy what is there, and give that path")
  if not importlib.util.find_spec(BUCKETS[scheme[1]]):
    extra = {"gs": "gcs"}.get(scheme[1], scheme[1])
    raise ValueError(f"{text}: needs the package {BUCKETS[scheme[1]]}: pip install "
                     f"'irg_jax[{extra}]'")
  return importlib.import_module("irg_jax.buckets").Path(text)


def is_there(path) -> bool:
  """Whether something has that name, even a pipe, or a link to a file that is gone."""
  return path.exists() or os.path.islink(path)


def local_path(text) -> pathlib.Path:
  """A path of this machine; ValueError for one with a scheme, such as gs://bucket/folder."""
  if re.match(r"[A-Za-z][\w+.-]+:/", str(text)):
    raise ValueError(f"{text}: a path on this machine is wanted; copy what is there, and give it")
  return pathlib.Path(text)


def is_local(path) -> bool:
  """Whether a path is on this machine; `path` is one, or its text."""
  return isinstance(path, pathlib.Path) or not re.match(r"\w+://", str(path))


def read_json(file, **options) -> dict:
  """`parse_json` of a UTF-8 file that holds an object; OSError without one, else ValueError."""
  file = path(file)
  if file.is_file() and (size := file.stat().st_size) > JSON_BYTES:
    raise ValueError(f"it has {size} bytes, more than the {JSON_BYTES} that are read")
  value = parse_json(read_file(file).decode("utf-8-sig"), **options)
  if not isinstance(value, dict):
    raise ValueError(f"expected a JSON object, found {type(value).__name__}")
  return value


def read_file(file) -> bytes:
  """Content of a file; OSError for a pipe or device, which could block, or never end."""
  file = path(file)
  if is_local(file):
    mode = os.stat(file).st_mode  # once: the file may go away meanwhile
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(file) == os.devnull):
      raise OSError(errno.EINVAL, "a pipe or device, not a file", str(file))
  return file.read_bytes()


def read_text(file) -> str:
  """Text of a UTF-8 file, with \\n for all ends of lines; ValueError for another encoding."""
  try:
    text = read_file(file).decode("utf-8-sig")
  except UnicodeDecodeError as e:
    raise ValueError(f"not UTF-8 text (byte {e.start}); save it as UTF-8") from e
  if "\0" in text:  # UTF-16 without a mark is valid UTF-8 with such bytes
    raise ValueError("has bytes of 0, as UTF-16 has; save it as UTF-8")
  return text.replace("\r\n", "\n").replace("\r", "\n")


def read_range(path, start: int, stop: int) -> bytes:
  """Bytes [start, stop) of a file; fewer at its end on disk, OSError in a bucket."""
  if not is_local(path):
    return path.read_range(start, stop)
  with path.open("rb") as file:
    file.seek(start)
    return file.read(stop - start)


def writer(path):
  """A context that yields a binary file to write; in a bucket, it appears at the end."""
  return path.open("wb") if is_local(path) else path.writer()


def cache_folder(name: str) -> pathlib.Path:
  """A folder in the user's for caches, which may not exist. RuntimeError without a home."""
  root, usual = os.environ.get("XDG_CACHE_HOME", ""), {"darwin": "Library/Caches"}
  home = lambda: pathlib.Path.home() / usual.get(sys.platform, ".cache")
  return pathlib.Path(root if os.path.isabs(root) else home(), "irg_jax", name)


def partial_name() -> str:
  """A new temporary name such as `.0123abcd.partial`."""
  return f".{uuid.uuid4().hex[:8]}.partial"


def is_partial(name: str) -> bool:
  """Whether this or an earlier version makes such temporary names."""
  return _PARTIAL.fullmatch(name) is not None


def remove_partials(folder) -> None:
  """Removes the temporary files and folders directly in `folder` that killed processes left."""
  found = pathlib.Path(folder).glob(".*") if is_local(folder) else ()
  for path in filter(lambda p: is_partial(p.name), found):
    with contextlib.suppress(OSError), _locked(path):
      if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      else:
        path.unlink()


@contextlib.contextmanager
def _locked(path):
  """Holds the lock of a file or folder; OSError if another process does, or without locks."""
  handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield
  finally:
    os.close(handle)


@contextlib.contextmanager
def _temporary(parent, make):
  """Yields a new path in `parent` that `make` made, locked where the file system has locks."""
  with naming(parent), contextlib.ExitStack() as stack:
    while True:
      path = pathlib.Path(parent) / partial_name()
      make(path)
      try:
        stack.enter_context(_locked(path))
      except (FileNotFoundError, BlockingIOError):
        continue  # taken for a killed process's, before it was locked
      except OSError:
        pass
      if path.exists():
        break
    yield path


def remove_folder(folder) -> None:
  """Removes a folder and all that is in it, if it is there."""
  if is_local(folder):
    shutil.rmtree(folder, ignore_errors=True)
  else:
    folder.rmtree()


@contextlib.contextmanager
def naming(path):
  """Adds `path` to the error of a full disk, which the system may raise without a file name."""
  try:
    yield
  except OSError as e:
    if e.errno in _FULL:
      raise OSError(e.errno, os.strerror(e.errno), str(path)) from e
    raise


@contextlib.contextmanager
def temporary_file(parent):
  """Yields the path of a temporary file in `parent`, empty, that is gone at the end."""
  with _temporary(parent, lambda p: p.open("xb").close()) as path:
    try:
      yield path
    finally:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path, temporary_folder=None):
  """Yields a temporary path to write to; renames it to `path` on success, else removes it.

  `temporary_folder`, by default that of `path`, must be on its file system."""
  if not is_local(path):
    with scratch_folder(cache_folder("scratch")) as scratch:
      yield scratch / path.name
      path.upload(scratch / path.name)
    return
  path = pathlib.Path(path)
  with naming(path), temporary_file(temporary_folder or path.parent) as temporary:
    yield temporary
    os.replace(temporary, path)


def write_bytes(path, data: bytes, temporary_folder=None) -> None:
  """Writes a file atomically; its content is on the disk before it gets its name."""
  if not is_local(path):
    path.write_bytes(data)
    return
  with atomic_file(path, temporary_folder) as temporary, open(temporary, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def write_text(path, text: str) -> None:
  """`write_bytes` of UTF-8; a lone surrogate becomes a question mark."""
  write_bytes(path, text.encode("utf-8", "replace"))


def json_text(content, **options) -> str:
  """JSON of two spaces a level; `options` as of `json.dumps`."""
  return json.dumps(content, **{"indent": 2} | options) + "\n"


def write_json(path, content, **options) -> None:
  """`write_text` of `json_text`."""
  write_text(path, json_text(content, **options))


def check_absent(folder) -> None:
  """Raises FileExistsError if there is a file, or a folder that holds something.

  What killed processes left in the folder is removed.
  """
  folder = pathlib.Path(folder)
  remove_partials(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"{folder}: exists and is not an empty folder; choose another or "
                          "remove it")


@contextlib.contextmanager
def atomic_folder(folder):
  """`atomic_file` for a folder; makes its parents. FileExistsError as of `check_absent`."""
  check_absent(folder)
  folder = pathlib.Path(folder).absolute()
  with naming(folder), scratch_folder(folder.parent) as scratch:
    yield scratch
    scratch.rename(folder)


@contextlib.contextmanager
def atomic_files(folder):
  """Yields a temporary folder; its files replace those of the same names in `folder` on success.

  A new folder appears at once. In one that exists, and may be a mount point, and in a bucket, each
  file is moved by itself, in the order of the names.
  """
  folder = path(folder).absolute()
  if not is_local(folder):
    with scratch_folder(cache_folder("scratch")) as scratch:
      yield scratch
      for file in sorted(scratch.iterdir()):
        (folder / file.name).upload(file)
    return
  parent = folder if folder.is_dir() else folder.parent
  with naming(folder), scratch_folder(parent) as scratch:
    yield scratch
    if not folder.exists():
      scratch.rename(folder)
      return
    for file in sorted(scratch.iterdir()):
      os.replace(file, folder / file.name)


@contextlib.contextmanager
def kept_if_filled(folder):
  """Removes `folder` and those above it at the end, if they are new and empty."""
  folder = pathlib.Path(folder)
  new = [p for p in (folder, *folder.parents) if not p.exists()]
  try:
    yield
  finally:
    for path in new:
      with contextlib.suppress(OSError):  # not empty
        path.rmdir()


@contextlib.contextmanager
def scratch_folder(parent):
  """Yields a temporary folder in `parent` that is gone at the end.

  `parent` is made where it does not exist, and removed again where it is still empty then. What
  killed processes left in it is removed.
  """
  parent = pathlib.Path(parent)
  remove_partials(parent)
  with kept_if_filled(parent), _temporary(parent, lambda p: p.mkdir(parents=True)) as scratch:
    try:
      yield scratch
    finally:
      for pause in (0, 0.1, 0.5, 1):  # threads of a failed write may still add files
        time.sleep(pause * scratch.exists())
        shutil.rmtree(scratch, ignore_errors=True)


def check_output_folder(folder) -> None:
  """Raises ValueError with the reason if a folder cannot be made, or written into, at `folder`.

  Call this before expensive work; it leaves nothing behind.
  """
  folder = path(folder)
  try:
    if not is_local(folder):
      return folder.check_writable()
    existing = next(p for p in (folder.absolute(), *folder.absolute().parents)
                    if p.exists() or p.is_symlink())
    if not existing.is_dir():
      raise ValueError(f"cannot write into {folder}: {existing} is not a folder")
    with scratch_folder(existing):  # permissions mislead: root, read-only mounts
      pass
  except OSError as e:
    raise ValueError(f"cannot write into {folder}: {e.strerror or e}") from e
