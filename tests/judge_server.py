"""A stand-in judge: an HTTP server on loopback that answers in OpenAI's form, or goes wrong."""

import collections
import contextlib
import gzip
import http.server
import json
import socket
import sqlite3
import struct
import sys
import threading
import time
import zlib

FAULTS = ("slow", "429", "429 bare", "500", "502 html", "malformed", "no choices", "empty",
          "null", "drop", "cut")


class JudgeServer:
  """Serves until the `with` ends.

  Attributes:
    url: for Settings.
    bodies: the requests so far, decoded.
    keys: what came as Authorization.
    told: {prompt: number of whole answers sent}.
    most: the largest number of requests under way at once.
  """

  def __init__(self, answer=lambda body: "fine", faults=lambda number, body: None, seconds=0.0):
    """
    Args:
      answer: body -> text, or a whole choice as a dict.
      faults: number of the request (from 0), body -> what goes wrong, one of FAULTS and of
        those in `_misbehave`, or None.
      seconds: that every answer takes.
    """
    self.answer, self.faults, self.seconds = answer, faults, seconds
    self.bodies, self.keys, self.told, self.errors = [], [], collections.Counter(), []
    self.most = self.running = self.sent = 0  # sent: bytes of a flood
    self.elsewhere = ""  # where a redirect leads
    self.mutex = threading.Lock()
    handler = type("Handler", (_Handler,), {"judge": self})
    self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    self._server.handle_error = self._handle_error
    self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
    return self

  def __exit__(self, kind, *_):
    self._server.shutdown()
    self._server.server_close()
    if kind is None:
      assert not self.errors, self.errors

  def _handle_error(self, *_):
    error = sys.exception()
    if not isinstance(error, ConnectionError):  # such as of a client that was killed
      self.errors.append(repr(error))


def cached(path) -> list[dict]:
  """All records of a closed cache, oldest first."""
  with contextlib.closing(sqlite3.connect(path)) as db:
    return [json.loads(text) for text, in db.execute("SELECT record FROM records ORDER BY number")]


def prompt_of(body: dict) -> str:
  """The question's text in the body of a request."""
  return body["messages"][-1]["content"][-1]["text"]


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = "HTTP/1.1"
  disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
  judge = None

  def do_POST(self):
    judge = self.judge
    data = self.rfile.read(length := int(self.headers["content-length"]))
    if len(data) < length:  # the client was closed while it sent
      self.close_connection = True
      return
    body = json.loads(data)
    with judge.mutex:
      number = len(judge.bodies)
      judge.bodies.append(body)
      judge.keys.append(self.headers.get("authorization"))
      judge.running += 1
      judge.most = max(judge.most, judge.running)
    try:
      time.sleep(judge.seconds)
      fault = judge.faults(number, body) if self.path == "/v1/chat/completions" else "404"
      self._misbehave(fault, body) if fault else self._answer(body)
    except (BrokenPipeError, ConnectionResetError):
      self.close_connection = True  # the client was killed, or is out of patience
    finally:
      with judge.mutex:
        judge.running -= 1

  def _answer(self, body):
    said = self.judge.answer(body)
    choice = said if isinstance(said, dict) else {"message": {"content": said}}
    choice = {"index": 0, "finish_reason": "stop"} | choice
    self._send(200, json.dumps({"model": body["model"] + "-dated", "choices": [choice]}))
    with self.judge.mutex:
      self.judge.told[prompt_of(body)] += 1

  def _misbehave(self, fault, body):
    quoted = self.headers.get("authorization")
    error = lambda text, code=None: json.dumps({"error": {"message": text, "code": code}})
    if fault == "slow":
      time.sleep(0.05)
      self._answer(body)
    elif fault in ("429", "429 bare"):
      self._send(429, error("slow down"), {"Retry-After": "0.02"} if fault == "429" else {})
    elif fault == "429 later":
      self._send(429, error("come back"), {"Retry-After": "86400"})
    elif fault == "quota":
      self._send(429, error("pay first", "insufficient_quota"))
    elif fault in ("500", "401", "403", "400", "404"):
      self._send(int(fault), error(f"it went wrong for {quoted}"))
    elif fault == "filtered":
      self._send(400, error("not this picture", "content_filter"))
    elif fault == "502 html":
      self._send(502, "<html>bad gateway</html>", {"Content-Type": "text/html"})
    elif fault == "malformed":
      self._send(200, '{"choices": [{"message": {"cont')
    elif fault == "no choices":
      self._send(200, json.dumps({"choices": []}))
    elif fault in ("empty", "null"):
      text = " \n" if fault == "empty" else None
      self._send(200, json.dumps({"choices": [{"message": {"content": text}}]}))
    elif fault == "drop":
      self._reset()
    elif fault == "cut":
      self._send(200, '{"choices": [{"message"', {"Content-Length": "900"})
      self._reset()
    elif fault == "endless":
      self._send(200, '{"choices": "' + "x" * (5 << 20))
    elif fault == "dribble":
      self._dribble()
    elif fault == "error dribble":
      self._dribble(500)
    elif fault == "header dribble":
      self._drip([b"HTTP/1.1 200 OK\r\n", *[b"X-A: b\r\n"] * 500])
    elif fault.startswith("400 "):
      self._send(400, error(fault[4:]))
    elif fault in ("302", "307"):
      self._send(int(fault), "", {"Location": f"{self.judge.elsewhere}/v1/chat/completions?k=1"})
    elif fault in ("200 flood", "500 flood"):
      self._flood(int(fault.split()[0]))
    elif fault == "bomb":
      zipper = zlib.compressobj(1, wbits=zlib.MAX_WBITS + 16)
      data = b"".join(zipper.compress(b" " * (1 << 20)) for _ in range(128)) + zipper.flush()
      self.judge.sent += len(data)
      self._send(200, data, {"Content-Encoding": "gzip"})
    elif fault == "gzip":
      self._send(200, gzip.compress(json.dumps(
          {"choices": [{"message": {"content": "zipped"}}]}).encode()),
          {"Content-Encoding": "gzip"})
    else:
      raise ValueError(fault)

  def _send(self, status, text, headers=None):
    data = text.encode() if isinstance(text, str) else text
    headers = {"Content-Type": "application/json", "Content-Length": str(len(data))} | (
        headers or {})
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data)
    self.wfile.flush()

  def _reset(self):
    self.close_connection = True
    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    self.connection.shutdown(socket.SHUT_RDWR)

  def _dribble(self, status=200):
    self._send(status, "", {"Content-Length": "500"})
    self._drip([b" "] * 500)

  def _drip(self, parts):
    for part in parts:
      self.wfile.write(part)
      self.wfile.flush()
      time.sleep(0.02)

  def _flood(self, status):
    self._send(status, "", {"Content-Length": str(500 << 20)})
    for _ in range(500):
      self.wfile.write(b"x" * (1 << 20))
      self.judge.sent += 1 << 20

  def log_message(self, *_):
    pass
