"""A stand-in for the Hugging Face hub on loopback: repositories are folders, with one revision."""

import contextlib
import hashlib
import http.server
import json
import pathlib
import re
import threading
import urllib.parse

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(http.server.BaseHTTPRequestHandler):
  """Serves `root`/models/OWNER/NAME and `root`/datasets/OWNER/NAME; notes each request."""

  root: pathlib.Path
  asked: list[str]
  faults: list[str]  # what the next files' replies are: "503", "cut"
  gated = "owner/gated"

  protocol_version = "HTTP/1.1"

  def log_message(self, *_):
    pass

  def do_HEAD(self):
    self.do_GET()

  def do_GET(self):
    path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
    self.asked.append(f"{self.command} {path}")
    if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?.*", path):
      kind, name, what, revision = found.groups()
      return self._listing(kind, name, what, revision)
    found = re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
    if found:
      return self._file(*found.groups())
    self._send(404, b"{}")

  def _listing(self, kind, name, what, revision):
    folder = self.root / kind / name
    if name == self.gated:
      return self._send(403, b"{}", {"X-Error-Code": "GatedRepo"})
    if not folder.is_dir():
      return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
    if revision not in (None, "main", "v1", SHA):
      return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    if what == "tree":
      content = [{"type": "file", "path": p.relative_to(folder).as_posix(), "size": p.stat().st_size,
                  "oid": _digest(p)} for p in files]
    else:
      content = {"id": name, "modelId": name, "sha": SHA, "tags": [], "downloads": 0, "likes": 0,
                 "private": False, "siblings": [
                     {"rfilename": p.relative_to(folder).as_posix(), "size": p.stat().st_size,
                      "blobId": _digest(p)} for p in files]}
    self._send(200, json.dumps(content).encode())

  def _file(self, kind, name, revision, file):
    path = self.root / ("datasets" if kind else "models") / name / file
    if not path.is_file():
      return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
    data = path.read_bytes()
    head = {"ETag": f'"{_digest(path)}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes",
            "X-Linked-Size": str(len(data))}
    fault = self.faults.pop(0) if self.faults and self.command == "GET" else None
    if fault == "503":
      return self._send(503, b"")
    start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
    if start:
      head["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    self._send(206 if start else 200, data[start:], head, cut=fault == "cut")

  def _send(self, status, data, headers=None, cut=False):
    self.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
      self.send_header(name, value)
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data[:len(data) // 2] if cut else data)
      if cut:
        self.close_connection = True
        self.connection.close()


def _digest(path):
  return hashlib.sha1(path.read_bytes()).hexdigest()


@contextlib.contextmanager
def serving(root):
  """Yields the class that serves `root`, with its address as `url`."""
  handler = type("Handler", (Hub,), {"root": pathlib.Path(root), "asked": [], "faults": []})
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  handler.url = f"http://127.0.0.1:{server.server_port}"
  thread = threading.Thread(target=server.serve_forever, daemon=True)
  thread.start()
  try:
    yield handler
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
