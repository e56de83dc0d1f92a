"""Files that are whole or not there: written beside their place, then renamed."""

import contextlib
import os
import pathlib
import uuid


def partial_name() -> str:
  """A name, different each time, for what is being written; `.0123abcd.partial`."""
  return f".{uuid.uuid4().hex[:8]}.partial"


@contextlib.contextmanager
def atomic_file(path):
  """Yields a path beside `path` to write to; it is renamed on success, else removed."""
  path = pathlib.Path(path)
  aside = path.with_name(partial_name())
  try:
    yield aside
    os.replace(aside, path)
  finally:
    aside.unlink(missing_ok=True)
