"""A bucket on loopback: gcp-storage-emulator with conditional writes, counts and faults.

The emulator knows no conditions (ifGenerationMatch), which locks need; they are added here. Faults
are rules: a function of (method, object's name) that returns None, or what is to happen:

  503, 403, 404    the answer's status
  "reset"          half of the answer, then the connection is reset
  "lost"           the request is done, but its answer is lost
  ("slow", 2.0)    the answer comes after so many seconds
"""

import collections
import contextlib
import http.server
import io
import json
import logging
import re
import socket
import struct
import threading
import time
import urllib.parse

import pytest

from irg_jax import holders

BUCKET = "bucket"
try:
  from gcp_storage_emulator import server as emulator
  from gcp_storage_emulator.handlers import buckets
  from gcp_storage_emulator.storage import Storage
  import gcsfs
except ImportError as e:
  MISSING = f"no emulator of a bucket: {e} (pip install 'irg_jax[test]')"
else:
  MISSING = None
  for name in ("gcp_storage_emulator", "api.object", "api.bucket"):
    logging.getLogger(name).setLevel(logging.CRITICAL + 1)

needed = pytest.mark.skipif(MISSING is not None, reason=MISSING or "")


class Bucket:
  """The server of one bucket.

  Attributes:
    read: bytes sent by name of object.
    requests: list of (method, name).
    fault: see the top of this file.
  """

  def __init__(self):
    self.read, self.requests, self.fault = collections.Counter(), [], lambda *_: None
    self.lock = threading.RLock()
    self._storage = Storage(use_memory_fs=True)
    self._storage._write_config_to_file = lambda: None  # slow where there are many objects
    buckets.create_bucket(BUCKET, self._storage)
    owner = self

    class Handler(_Handler):
      bucket, storage = owner, owner._storage

      def __init__(self, *args, **kwargs):
        http.server.BaseHTTPRequestHandler.__init__(self, *args, **kwargs)

    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    self._server.daemon_threads = True
    self._server.handle_error = lambda *_: None
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  @property
  def environment(self) -> dict:
    """Variables that lead gcsfs and TensorStore here."""
    return {"STORAGE_EMULATOR_HOST": self.url, "TENSORSTORE_GCS_HTTP_URL": self.url}

  def names(self, prefix: str = "") -> list[str]:
    """Names of all objects that begin so."""
    with self.lock:
      return sorted(n for n in self._storage.objects.get(BUCKET, {}) if n.startswith(prefix))

  def content(self, name: str) -> bytes:
    with self.lock:
      return bytes(self._storage.get_file(BUCKET, name))

  def close(self):
    self._server.shutdown()
    self._server.server_close()


if MISSING is None:

  class _Handler(emulator.RequestHandler):
    """One request."""

    def _answer(self, method):
      parsed = urllib.parse.urlparse(self.path)
      query = urllib.parse.parse_qs(parsed.query)
      found = re.search(r"/b/[^/]+/o/(.+)", parsed.path)
      name = urllib.parse.unquote(found[1]) if found else query.get("name", query.get(
          "prefix", [""]))[0]
      body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
      self.rfile = io.BytesIO(body)
      if not name and (named := re.search(rb'"name": ("[^"]*")', body[:4096])):
        name = json.loads(named[1])
      self.bucket.requests.append((method, name))
      what = self.bucket.fault(method, name)
      self._name, self._fault = name, what
      if isinstance(what, tuple):
        time.sleep(what[1])
      if isinstance(what, int):
        return self._refuse(what)
      with self.bucket.lock:
        if not self._allowed(query, name):
          return self._refuse(412)
        emulator.Router(self).handle(method)

    def _allowed(self, query, name):
      self._generation = self.storage.objects.get(BUCKET, {}).get(name, {}).get("generation", "0")
      return query.get("ifGenerationMatch", [self._generation])[0] == self._generation

    def _refuse(self, status):
      text = json.dumps({"error": {"code": status, "message": f"fault {status}"}}).encode()
      self.send_response(status)
      self.send_header("Content-Length", str(len(text)))
      self.end_headers()
      self.wfile.write(text)

    def end_headers(self):
      if self.command == "GET" and getattr(self, "_generation", "0") != "0":
        self.send_header("x-goog-generation", self._generation)  # TensorStore's condition
      super().end_headers()
      self.wfile = _Counted(self, self.wfile)

    do_GET = lambda self: self._answer("GET")
    do_POST = lambda self: self._answer("POST")
    do_PUT = lambda self: self._answer("PUT")
    do_DELETE = lambda self: self._answer("DELETE")
    do_PATCH = lambda self: self._answer("PATCH")


class _Counted:
  """The body of an answer: counted, or broken off."""

  def __init__(self, handler, file):
    self._handler, self._file = handler, file

  def write(self, data):
    fault = getattr(self._handler, "_fault", None)
    if fault in ("reset", "lost"):
      self._file.write(data[:len(data) // 2] if fault == "reset" else b"")
      self._file.flush()
      # Linger of 0: a reset instead of an end.
      self._handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER,
                                          struct.pack("ii", 1, 0))
      self._handler.connection.close()
      raise ConnectionResetError
    if self._handler.command == "GET":
      self._handler.bucket.read[self._handler._name] += len(data)
    return self._file.write(data)

  def __getattr__(self, name):
    return getattr(self._file, name)


@pytest.fixture(scope="module")
def bucket():
  """A bucket for the tests of a file, and for the processes that they start."""
  if MISSING:
    pytest.skip(MISSING)
  server = Bucket()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in server.environment.items():
      patch.setenv(name, value)
    yield server
  server.close()


def dead_holder() -> bytes:
  """The lock of a process of this machine that was killed."""
  return json.dumps(holders.me() | {"pid": 2**22 + 1, "key": "0" * 32}).encode()


@contextlib.contextmanager
def broken(bucket, fault):
  """Faults meanwhile."""
  bucket.fault = fault
  try:
    yield
  finally:
    bucket.fault = lambda *_: None
