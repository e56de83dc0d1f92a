"""The filesystems of gs:// and s3://: fsspec's, with one rule for a store that does not answer.

It is asked again for `PATIENCE` seconds, or `_FIRST` if it never has answered; then OSError names
the object. Denied and missing objects are errors at once: PermissionError, FileNotFoundError.
"""

import asyncio
import errno
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
import urllib.parse

from etils.epath import gpath

PATIENCE = float(os.environ.get("IRG_BUCKET_PATIENCE", 600))  # seconds
_FIRST = 10.0  # seconds, before the store has answered at all: it may be out of reach for good
_LAST = 5.0  # seconds, once the patience has ended, until the store answers again
_TIMEOUTS = {"total": None, "sock_connect": 30, "sock_read": 60}  # seconds
_SHORT, _LONG = 0.5, 30.0  # seconds between two attempts
_FILESYSTEMS, _making = {}, threading.Lock()
_answered = threading.Event()  # a request was answered
_given_up = threading.Event()  # a request has ended without an answer, and none was answered since
# Verdicts on an error of a request; None: the store refuses.
_AGAIN, _DENIED, _CHANGED = "again", "denied", "changed"


def filesystem(scheme: str):
  """The filesystem of a scheme, the same that etils.epath uses, and with it Orbax."""
  with _making:
    if scheme not in _FILESYSTEMS:
      {"gs": _register_gs, "s3": _register_s3}[scheme]()
      _FILESYSTEMS[scheme] = gpath.backend_lib.fsspec_backend.fs(f"{scheme}://")
    return _FILESYSTEMS[scheme]


def _register_gs():
  """Makes fsspec's "gcs" a filesystem that asks again."""
  aiohttp, core, known = map(importlib.import_module, ("aiohttp", "gcsfs.core", "gcsfs.retry"))
  logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
  once = inspect.unwrap(core.GCSFileSystem._request)

  def verdict(e):
    code = str(getattr(e, "code", ""))
    if known.is_retriable(e) and code != "501" or isinstance(
        e, (TimeoutError, asyncio.TimeoutError)):
      return _AGAIN
    return _DENIED if code == "401" or "Forbidden" in str(e) else None

  async def request(self, method, path, *args, **kwargs):
    name = _object_name(path, args, kwargs)
    return await _patiently(lambda: once(self, method, path, *args, **kwargs), name, verdict)

  patient = type("PatientGCSFileSystem", (core.GCSFileSystem,), {"_request": request})
  _register(patient, "gcs", "gs", consistency="md5",
            session_kwargs={"timeout": aiohttp.ClientTimeout(**_TIMEOUTS)})


def _register_s3():
  """Makes fsspec's "s3" a filesystem that asks again; its own attempts are few."""
  core, asyn = map(importlib.import_module, ("s3fs.core", "fsspec.asyn"))
  away = importlib.import_module("botocore.exceptions").ConnectionError  # s3fs has the others

  def verdict(e):
    response = getattr(e.__cause__ or e, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    if status == 429 or status >= 500 and status != 501 or isinstance(
        e, (away, *core.S3_RETRYABLE_ERRORS)):
      return _AGAIN
    if status in (409, 412):
      return _CHANGED
    denied = status in (401, 403) or isinstance(e, PermissionError)
    return _DENIED if denied or "credentials" in str(e) else None

  def patient(once):
    async def method(self, *args, **kwargs):
      place = kwargs.get("Bucket"), kwargs.get("Key") or kwargs.get("Prefix")
      name = ("/".join(filter(None, place)) or args[0]).rstrip("/")
      return await _patiently(lambda: once(self, *args, **kwargs), f"s3://{name}", verdict)
    return method

  # Listings and the bodies of answers do not go through the first.
  methods = {name: patient(getattr(core.S3FileSystem, name))
             for name in ("_call_s3", "_cat_file", "_lsdir")}
  methods["call_s3"] = asyn.sync_wrapper(methods["_call_s3"])
  _register(type("PatientS3FileSystem", (core.S3FileSystem,), methods), "s3", config_kwargs={
      "connect_timeout": _TIMEOUTS["sock_connect"], "read_timeout": _TIMEOUTS["sock_read"],
      "retries": {"mode": "standard", "total_max_attempts": 1}})


def _register(patient, *schemes, **options):
  """Registers a filesystem; what the user's configuration of fsspec says goes before `options`."""
  conf = importlib.import_module("fsspec.config").conf
  # Listings are not kept: other hosts write, too.
  conf[schemes[0]] = {"use_listings_cache": False} | options | conf.get(schemes[0], {})
  for scheme in schemes:
    importlib.import_module("fsspec").register_implementation(scheme, patient, clobber=True)


async def _patiently(attempt, name, verdict):
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
    except Exception as e:  # of several libraries
      found = verdict(e)
      if found == _CHANGED or isinstance(e, FileExistsError):
        raise FileExistsError(errno.EEXIST, "has changed", name) from None
      if getattr(e, "filename", None):  # of a request within this one
        raise
      fault = str(e).partition("\n")[2 if "Forbidden" in str(e) else 0] or type(e).__name__
      if found == _DENIED:
        raise PermissionError(errno.EACCES, f"access denied by the store ({fault}); check the "
                              "credentials and the bucket's permissions", name) from e
      if found != _AGAIN:
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
