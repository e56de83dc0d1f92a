"""Chromium, driven over its pipe: how wide a page is at a width of the window, and screenshots."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile

# As little of a desktop as there is in a container.
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
          "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe")


def find() -> str | None:
  """The browser's program, or None."""
  names = ("chromium", "chromium-browser", "google-chrome", "chrome")
  return next(filter(None, map(shutil.which, names)), None)


class Browser:
  """One tab. Requests and answers are JSON that ends in a null byte, on two pipes."""

  def __init__(self, to, answers):
    self._to, self._from, self._number, self._session = to, answers, 0, None
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    self.call("Page.enable")

  def call(self, method, until=None, **params):
    """The result of a method; and waits for an event, if `until` names it."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": params}
    if self._session:
      message["sessionId"] = self._session
    self._to.write(json.dumps(message).encode() + b"\0")
    self._to.flush()
    result = None
    while result is None or until:
      got = json.loads(self._read())
      if got.get("id") == self._number:
        if "error" in got:
          raise RuntimeError(f"{method}: {got['error']}")
        result = got["result"]
      elif got.get("method") == until:
        until = None
    return result

  def open(self, path, width, dark=False, height=900):
    """Opens a file in a window `width` CSS pixels wide."""
    self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
              deviceScaleFactor=1, mobile=width < 600)
    self.call("Emulation.setEmulatedMedia", features=[
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
    self.call("Page.navigate", until="Page.loadEventFired", url=path.resolve().as_uri())

  def value(self, script):
    """The value of a JavaScript expression in the page."""
    found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
    if "exceptionDetails" in found:
      raise RuntimeError(f"{script}: {found['exceptionDetails']}")
    return found["result"].get("value")

  def screenshot(self, path, whole=True):
    """Writes a PNG of the page, or of the window alone."""
    shot = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
    path.write_bytes(base64.b64decode(shot["data"]))

  def _read(self):
    """The next message, without its null byte."""
    parts = bytearray()
    while (byte := self._from.read(1)) != b"\0":
      if not byte:
        raise RuntimeError("the browser went away")
      parts += byte
    return bytes(parts)


@contextlib.contextmanager
def started(program):
  """Yields a `Browser`."""
  (requests, to), (answers, out) = os.pipe(), os.pipe()
  with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
    words = [program, *_FLAGS, f"--user-data-dir={profile}"]
    process = subprocess.Popen(  # the browser reads descriptor 3 and writes 4
        ["bash", "-c", f'exec "$@" 3<&{requests} 4>&{out}', "bash", *words],
        pass_fds=(requests, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(requests)
    os.close(out)
    try:
      with open(to, "wb") as to, open(answers, "rb") as answers:
        yield Browser(to, answers)
    finally:
      process.kill()
      process.wait()
