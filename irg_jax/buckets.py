"""Buckets, gs:// and s3://: paths through etils.epath, and what an object store can do.

Imported by `storage.path` alone, where a path names a bucket; its packages are the extras `gcs` and
`s3`. An object appears whole or not at all; there are no folders, only names that begin alike, and
nothing can be renamed. A write may depend on the state of its object, of which `Look.version` (GCS:
generation, S3: ETag) changes with every write: `Path.put_if`.

A store that does not answer is asked again, see `stores`. Each answer of a range is checked to be
complete.
"""

import contextlib
import errno
import fnmatch
import types
import typing

from etils.epath import gpath

from irg_jax import stores

_PART = 32 * 2**20  # bytes of a part of a large upload


class Look(typing.NamedTuple):
  """The state of an object."""

  content: bytes
  version: str


class Path(gpath.PosixGPath):
  """A path in a bucket: the methods of `pathlib.Path` that mean something there, and a few more.

  It asks the store each time. Errors are OSError, FileNotFoundError for a missing object.
  """

  @property
  def fs(self):
    """The filesystem of fsspec."""
    return stores.filesystem(self._uri_scheme)

  @property
  def place(self) -> tuple[str, str]:
    """(bucket, key)."""
    bucket, _, key = str(self).partition("://")[2].partition("/")
    return bucket, key

  @property
  def parent(self):
    """The folder above; a bucket is its own."""
    return super().parent if self.place[1] or not self._uri_scheme else self

  def absolute(self):
    return self

  def resolve(self, strict: bool = False):
    return self

  def expanduser(self):
    return self

  def is_symlink(self) -> bool:
    return False

  def exists(self) -> bool:
    return self._kind() is not None

  def is_file(self) -> bool:
    return self._kind() == "file"

  def is_dir(self) -> bool:
    return self._kind() == "directory"

  def stat(self):
    """A namespace with `st_size` and `st_mtime`, by the store's clock."""
    found = self.fs.info(str(self))
    time_ = found.get("mtime") or found.get("LastModified")
    return types.SimpleNamespace(
        st_size=found["size"], length=found["size"], st_mtime=time_.timestamp() if time_ else 0.0,
        is_directory=found["type"] == "directory")

  def iterdir(self):
    try:
      names = self.fs.ls(str(self), detail=False)
    except FileNotFoundError:
      return
    own = "/".join(self.place).rstrip("/")
    for name in names:
      if (name := name.rstrip("/")) != own:
        yield self / name.rpartition("/")[2]

  def glob(self, pattern: str):
    """The entries of this folder, and with slashes of those below, whose names match."""
    pattern, _, below = pattern.partition("/")
    for path in self.iterdir():
      if fnmatch.fnmatchcase(path.name, pattern):
        yield from path.glob(below) if below else [path]

  def rglob(self, pattern: str):
    """The objects below, at any depth, whose names match."""
    root = len("/".join(self.place).rstrip("/")) + 1
    for name in self.fs.find(str(self)):
      if fnmatch.fnmatchcase(name.rpartition("/")[2], pattern):
        yield self / name[root:]

  def check_writable(self) -> None:
    """Raises the OSError of a folder that cannot be written into."""
    probe = self / ".irg.probe"  # one name, so that killed commands leave one at most
    probe.write_bytes(b"")
    probe.unlink(missing_ok=True)

  def mkdir(self, mode=None, parents: bool = False, exist_ok: bool = False) -> None:
    """Does nothing: in a bucket, a folder exists once it holds an object."""

  def open(self, mode: str = "r", **_):
    """A file that reads pieces of about 4 MB; to write, see `writer`."""
    return self.fs.open(str(self), mode, block_size=2**22)

  def read_bytes(self) -> bytes:
    return self.fs.cat_file(str(self))

  def read_text(self, encoding: str = "utf-8") -> str:
    return self.read_bytes().decode(encoding)

  def read_range(self, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the object; OSError where the store sends others."""
    data = self.fs.cat_file(str(self), start=start, end=stop) if stop > start else b""
    if len(data) != stop - start:
      raise OSError(errno.EIO, f"bytes {start} to {stop - 1} were asked for, and {len(data)} bytes "
                    "came; the object is shorter than it should be", str(self))
    return data

  def write_bytes(self, data: bytes) -> int:
    self.fs.pipe_file(str(self), bytes(data), chunksize=_PART)
    return len(data)

  def write_text(self, text: str, encoding: str = "utf-8") -> int:
    return self.write_bytes(text.encode(encoding))

  @contextlib.contextmanager
  def writer(self):
    """Yields a file to write bit by bit; it appears if the context ends well."""
    file = self.fs.open(str(self), "wb", block_size=_PART)
    try:
      yield file
    except BaseException:
      with contextlib.suppress(OSError):  # of the first error
        file.discard()
      file.closed = True
      raise
    file.close()

  def upload(self, path) -> None:
    """Writes a local file's content, part by part."""
    self.fs.put_file(str(path), str(self), chunksize=_PART)

  def download(self, path) -> None:
    """Writes the content to a local file, part by part."""
    with open(path, "wb") as file:
      for start in range(0, size := self.stat().st_size, _PART):
        file.write(self.read_range(start, min(start + _PART, size)))

  def unlink(self, missing_ok: bool = False) -> None:
    try:
      self.fs.rm_file(str(self))
    except FileNotFoundError:
      if not missing_ok:
        raise

  def rmtree(self, missing_ok: bool = True) -> None:
    """Removes all objects below."""
    for path in list(self.rglob("*")):
      path.unlink(missing_ok=True)

  def replace(self, target):
    """Moves an object; a kill leaves it at both places."""
    self.fs.cp_file(str(self), str(target))
    self.unlink(missing_ok=True)
    return target

  def rename(self, target):
    """Copies all objects below to a folder, and removes them here; a kill leaves some at each."""
    for path in list(self.rglob("*")):
      path.replace(target / path.relative_to(self).as_posix())
    return target

  def look(self) -> Look | None:
    """Content and version of an object, which belong together; None without one."""
    while True:
      try:
        before, content = self._version(), self.read_bytes()
        if self._version() == before:
          return Look(content, before)
      except FileNotFoundError:
        if not self.exists():
          return None

  def put_if(self, data: bytes, version: str | None) -> str | None:
    """Writes the object if it still has this version; None: if there is none.

    Returns its new version, or None where another process was first.
    """
    try:
      return self._put_if(data, version)
    except FileExistsError:  # it may be ours: the store wrote, and its answer was lost
      found = self.look()
      return found.version if found and found.content == data else None

  def _put_if(self, data, version):
    bucket, key = self.place
    if self._uri_scheme == "gs":
      return self.fs.call("POST", f"{self.fs._location}/upload/storage/v1/b/{bucket}/o",
                          uploadType="media", name=key, ifGenerationMatch=version or "0",
                          data=data, json_out=True)["generation"]
    how = {"IfNoneMatch": "*"} if version is None else {"IfMatch": version}
    return self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **how)["ETag"]

  def _version(self):
    found = self.fs.info(str(self))
    if found["type"] != "file":
      raise FileNotFoundError(str(self))
    return str(found.get("generation") or found.get("ETag"))

  def _kind(self):
    try:
      return self.fs.info(str(self))["type"]
    except FileNotFoundError:
      return None
