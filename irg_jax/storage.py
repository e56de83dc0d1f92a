"""Atomic writes: a temporary file or folder beside the target, renamed when it is complete.

A reader finds the earlier content or the new one, never half of it. Temporary names look like
`.0123abcd.partial`; only a process that was killed leaves one behind.
"""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import tempfile
import uuid


def read_file(path) -> bytes:
  """Content of a file; OSError for a pipe or device, which could block, or never end."""
  path = pathlib.Path(path)
  if path.exists() and not (path.is_file() or path.is_dir() or str(path) == os.devnull):
    raise OSError(errno.EINVAL, "a pipe or device, not a file", str(path))
  return path.read_bytes()


def local_path(text) -> pathlib.Path:
  """A path of this machine; ValueError for one with a scheme, such as gs://bucket/folder."""
  if re.match(r"[A-Za-z][\w+.-]+:/", str(text)):
    raise ValueError(f"{text}: a path on this machine is wanted; mount the bucket, or copy what "
                     "is there, and give that path")
  return pathlib.Path(text)


def partial_name() -> str:
  """A new temporary name such as `.0123abcd.partial`."""
  return f".{uuid.uuid4().hex[:8]}.partial"


def is_partial(name: str) -> bool:
  """Whether `partial_name` makes such names."""
  return re.fullmatch(r"\.[0-9a-f]{8}\.partial", name) is not None


def remove_partials(folder) -> None:
  """Removes temporary files and folders directly in `folder`; no other process may write there."""
  for path in filter(lambda p: is_partial(p.name), pathlib.Path(folder).glob(".*")):
    if path.is_dir():
      shutil.rmtree(path, ignore_errors=True)
    else:
      path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path, temporary_folder=None):
  """Yields a temporary path to write to; renames it to `path` on success, else removes it.

  The folder of `path` must exist. `temporary_folder`, by default the same one, must be on the
  same file system.
  """
  path = pathlib.Path(path)
  temporary = pathlib.Path(temporary_folder or path.parent) / partial_name()
  try:
    yield temporary
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def write_bytes(path, data: bytes, temporary_folder=None) -> None:
  """Writes a file atomically; its content is on the disk before it gets its name."""
  with atomic_file(path, temporary_folder) as temporary, open(temporary, "wb") as file:
    file.write(data)
    file.flush()
    os.fsync(file.fileno())


def write_text(path, text: str) -> None:
  """`write_bytes` of UTF-8; a lone surrogate becomes a question mark."""
  write_bytes(path, text.encode("utf-8", "replace"))


def write_json(path, content, **options) -> None:
  """`write_text` of JSON, two spaces a level; `options` as of `json.dumps`."""
  write_text(path, json.dumps(content, **{"indent": 2} | options) + "\n")


def check_absent(folder) -> None:
  """Raises FileExistsError if there is a file, or a folder that holds something."""
  folder = pathlib.Path(folder)
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise FileExistsError(f"{folder}: exists and is not an empty folder; choose another or "
                          "remove it")


@contextlib.contextmanager
def atomic_folder(folder):
  """`atomic_file` for a folder; makes its parents. FileExistsError as of `check_absent`."""
  check_absent(folder)
  folder = pathlib.Path(folder).absolute()
  with scratch_folder(folder.parent) as scratch:
    yield scratch
    scratch.rename(folder)


@contextlib.contextmanager
def atomic_files(folder):
  """Yields a temporary folder; its files replace those of the same names in `folder` on success.

  A folder that exists may be a mount point, which cannot be renamed: there, each file is moved
  by itself. A new folder appears at once.
  """
  folder = pathlib.Path(folder).absolute()
  with scratch_folder(folder if folder.is_dir() else folder.parent) as scratch:
    yield scratch
    if not folder.exists():
      scratch.rename(folder)
      return
    for path in sorted(scratch.iterdir()):
      os.replace(path, folder / path.name)


@contextlib.contextmanager
def scratch_folder(parent):
  """Yields a temporary folder in `parent` that is gone at the end.

  `parent` is made where it does not exist, and removed again where it is still empty then.
  """
  parent = pathlib.Path(parent)
  made = [p for p in (parent, *parent.parents) if not p.exists()]
  scratch = parent / partial_name()
  scratch.mkdir(parents=True)
  try:
    yield scratch
  finally:
    shutil.rmtree(scratch, ignore_errors=True)
    for folder in made:
      with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def check_output_folder(path) -> None:
  """Raises ValueError with the reason if a folder cannot be made, or written into, at `path`.

  Call this before expensive work; it leaves nothing behind.
  """
  path = pathlib.Path(path)
  try:
    existing = next(p for p in (path.absolute(), *path.absolute().parents)
                    if p.exists() or p.is_symlink())
    if not existing.is_dir():
      raise ValueError(f"cannot write into {path}: {existing} is not a folder")
    # Permissions mislead (root, read-only mounts), so a folder is made and removed.
    tempfile.TemporaryDirectory(dir=existing, prefix=".irg-").cleanup()
  except OSError as e:
    raise ValueError(f"cannot write into {path}: {e.strerror or e}") from e
