"""The cache of compiled programs: JAX's own, on for the verbs that compile; Python asks for it."""

import os
import pathlib
import sys

import jax
from jax._src import lru_cache  # private: JAX writes in place, and keeps a torn file for good

from irg_jax import messages, storage

_LIMIT = 2 * 2**30  # bytes; beyond it, programs go that were not used for longest


def keep_programs() -> None:
  """Lets JAX read the programs that earlier processes compiled, and keep those of this one.

  Every verb that compiles calls it. It changes JAX for the whole process, so in Python it is a line
  of its own, `irg_jax.keep_programs()`; neither importing the package nor `load` does it.

  Programs are in `folder()`, unless JAX's settings name another one (JAX_COMPILATION_CACHE_DIR) or
  switch its cache off (JAX_ENABLE_COMPILATION_CACHE=false). Where that folder cannot be used, says
  so, and nothing is kept.
  """
  if jax.config.jax_compilation_cache_dir or not jax.config.jax_enable_compilation_cache:
    return
  try:
    place = folder()
    storage.check_output_folder(place)
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    if place.stat().st_uid != os.getuid():  # programs of others are not to be trusted
      raise ValueError(f"{place}: belongs to another user")
    _tidy(place)
  except (OSError, ValueError, RuntimeError) as e:
    print(f"note: compiled programs are not kept: {messages.message(e)}; set "
          "JAX_COMPILATION_CACHE_DIR to a folder for them", file=sys.stderr)
    return
  jax.config.update("jax_compilation_cache_dir", str(place))
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  lru_cache.LRUCache.put = _put


def folder() -> pathlib.Path:
  """Folder of the compiled programs, in the user's cache folder. RuntimeError without a home."""
  return storage.cache_folder("programs")


def _tidy(place):
  """Removes what killed commands left, and the programs beyond `_LIMIT`."""
  storage.remove_partials(place)
  found = []
  for path in place.rglob("*"):
    try:
      entry = path.stat()
    except FileNotFoundError:  # another command is at it
      continue
    if path.is_file():
      found.append((max(entry.st_atime, entry.st_mtime), entry.st_size, path))
  total = 0
  for _, size, path in sorted(found, reverse=True):
    total += size
    if total > _LIMIT:
      path.unlink(missing_ok=True)


def _put(cache, key: str, value: bytes) -> None:
  """Writes a program atomically. At the first failure, a full disk say, says so and gives up."""
  try:
    storage.write_bytes(pathlib.Path(cache.path, f"{key}-cache"), value)
  except OSError as e:
    print(f"note: compiled programs are not kept: {messages.message(e)}", file=sys.stderr)
    cache.put = lambda *_: None
