"""Buckets, gs:// and s3://: paths through etils.epath, and what an object store can do.

Imported by `storage.path` alone, where a path names a bucket; its packages are the extras `gcs` and
`s3`. An object appears whole or not at all; there are no folders, only names that begin alike, and
nothing can be renamed. A write may depend on the state of its object, of which `Look.version` (GCS:
generation, S3: ETag) changes with every write: `Path.put_if`.

A store that does not answer is asked again for `PATIENCE` seconds, or `_FIRST` if it never has;
then OSError names the object. Each answer of a range is checked to be complete.
"""

import asyncio
import contextlib
import errno
import fnmatch
import importlib
import inspect
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import types
import typing
import urllib.parse

from etils.epath import gpath

PATIENCE = float(os.environ.get("IRG_BUCKET_PATIENCE", 600))  # seconds
_FIRST = 10.0  # seconds, before the store has answered at all: it may be out of reach for good
_LAST = 5.0  # seconds, once the patience has ended, until the store answers again
_TIMEOUTS = {"total": None, "sock_connect": 30, "sock_read": 60}  # seconds
_PART = 32 * 2**20  # bytes of a part of a large upload
_SHORT, _LONG = 0.5, 30.0  # seconds between two attempts


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
    return _filesystem(self._uri_scheme)

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
    try:
      return self.fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, **how)["ETag"]
    except OSError as e:
      if re.search("PreconditionFailed|ConditionalRequestConflict|412|pre-conditions", repr(e)):
        raise FileExistsError(errno.EEXIST, "has changed", str(self)) from e
      raise

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


_FILESYSTEMS, _making = {}, threading.Lock()
_answered = threading.Event()  # a request was answered
_given_up = threading.Event()  # a request has ended without an answer, and none was answered since


def _filesystem(scheme):
  """The filesystem of a scheme, the same that etils.epath uses, and with it Orbax."""
  with _making:
    if scheme not in _FILESYSTEMS:
      conf = importlib.import_module("fsspec.config").conf
      # Listings are not kept: other hosts write, too.
      if scheme == "gs":
        aiohttp = importlib.import_module("aiohttp")
        conf["gcs"] = {"use_listings_cache": False, "consistency": "md5",
                       "session_kwargs": {"timeout": aiohttp.ClientTimeout(**_TIMEOUTS)}
                       } | conf.get("gcs", {})
        _register_patient()
      else:
        conf["s3"] = {"use_listings_cache": False, "config_kwargs": {
            "retries": {"mode": "standard", "total_max_attempts": 20}}} | conf.get("s3", {})
      _FILESYSTEMS[scheme] = gpath.backend_lib.fsspec_backend.fs(f"{scheme}://")
    return _FILESYSTEMS[scheme]


def _register_patient():
  """Makes fsspec's "gcs" a filesystem that asks again, see `_patiently`."""
  core = importlib.import_module("gcsfs.core")
  once = inspect.unwrap(core.GCSFileSystem._request)
  known = importlib.import_module("gcsfs.retry")
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

  async def request(self, method, path, *args, **kwargs):
    name = _object_name(path, args, kwargs)
    return await _patiently(lambda: once(self, method, path, *args, **kwargs), name, known)

  patient = type("PatientGCSFileSystem", (core.GCSFileSystem,), {"_request": request})
  for scheme in ("gcs", "gs"):
    importlib.import_module("fsspec").register_implementation(scheme, patient, clobber=True)


async def _patiently(attempt, name, known):
  """The result of a request, made again while the store does not answer; else OSError."""
  start, pause = time.monotonic(), _SHORT
  while True:
    patience = min(PATIENCE, _LAST if _given_up.is_set() else
                   PATIENCE if _answered.is_set() else _FIRST)
    try:
      answer = await attempt()
      _answered.set()
      _given_up.clear()
      return answer
    except FileNotFoundError:
      _answered.set()
      raise FileNotFoundError(errno.ENOENT, "no such object, or no such bucket", name) from None
    except FileExistsError:
      raise FileExistsError(errno.EEXIST, "has changed", name) from None
    except Exception as e:  # of several libraries
      fault = str(e).partition("\n")[2 if "Forbidden" in str(e) else 0] or type(e).__name__
      code = str(getattr(e, "code", ""))
      again = known.is_retriable(e) and code != "501" or isinstance(
          e, (TimeoutError, asyncio.TimeoutError))
      if not again and (code == "401" or "Forbidden" in str(e)):
        raise PermissionError(errno.EACCES, f"access denied by the store ({fault}); check the "
                              "credentials and the bucket's permissions", name) from e
      if not again:
        raise OSError(errno.EIO, f"the store refuses ({fault})", name) from e
      waited = time.monotonic() - start
      unknown = isinstance(getattr(e, "os_error", None), socket.gaierror)  # offline, most likely
      if waited > patience or unknown and not _answered.is_set():
        _given_up.set()
        after = f" for {waited:.0f} s" if waited >= 1 else ""
        raise OSError(errno.EIO, f"the store did not answer{after} ({fault})", name) from e
      if pause > 4:
        print(f"note: {name}: the store does not answer ({fault}); asking again for at most "
              f"{patience - waited:.0f} s", file=sys.stderr, flush=True)
      await asyncio.sleep(pause)
      pause = min(2 * pause, _LONG, max(patience - waited, _SHORT))


def _object_name(path, args, options) -> str:
  """The gs:// path that a request is about."""
  found = re.search(r"/b/([^/?]+)(?:/o(?:/([^?]*))?)?", path)
  parts = args or (found.groups() if found else (path,))
  key = options.get("name") or options.get("prefix")
  if query := re.search(r"[?&]name=([^&]*)", path):
    key = query[1]
  data = options.get("data")  # of an upload in parts, the first of which has the name
  if isinstance(data, bytes) and (named := re.search(rb'"name": ("[^"]*")', data[:4096])):
    key = json.loads(named[1])
  names = [part for part in (*parts[:2], None if len(parts) > 1 and parts[1] else key) if part]
  return "gs://" + "/".join(urllib.parse.unquote(name) for name in names)
