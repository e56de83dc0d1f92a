"""Chromium, driven over its pipe: pages, what stands on them and what they load; screenshots."""

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time

# As little of a desktop as there is in a container.
_FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
          "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe")


def find() -> str | None:
  """The browser's program, or None."""
  names = ("chromium", "chromium-browser", "google-chrome", "chrome")
  return next(filter(None, map(shutil.which, names)), None)


class Browser:
  """One tab. Requests and answers are JSON that ends in a null byte, on two pipes.

  `requested` has the URLs that pages have asked for since it was cleared.
  """

  def __init__(self, to, answers):
    self._to, self._from, self._number, self._session = to, answers, 0, None
    self.requested = []
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    self.call("Page.enable")
    self.call("Network.enable")

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
      if got.get("method") == "Network.requestWillBeSent":
        self.requested.append(got["params"]["request"]["url"])
    return result

  def open(self, page, width, dark=False, height=900):
    """Opens a file, or a URL, in a window `width` CSS pixels wide."""
    self.resize(width, height)
    self.call("Emulation.setEmulatedMedia", features=[
        {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
    self.call("Page.navigate", until="Page.loadEventFired",
              url=page if isinstance(page, str) else page.resolve().as_uri())

  def resize(self, width, height=900):
    """Makes the window so many CSS pixels wide; a narrow one is a phone's."""
    self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
              deviceScaleFactor=1, mobile=width < 600)

  def value(self, script):
    """The value of a JavaScript expression in the page."""
    found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
    if "exceptionDetails" in found:
      raise RuntimeError(f"{script}: {found['exceptionDetails']}")
    return found["result"].get("value")

  def wait(self, script, seconds=60.0):
    """Waits until a JavaScript expression is true, or an element; AssertionError if it never is."""
    end = time.monotonic() + seconds
    while not self.value(f"Boolean({script})"):
      assert time.monotonic() < end, f"not within {seconds} s: {script}"
      time.sleep(0.05)

  def write(self, selector, text):
    """Types a text into an empty field."""
    self.value(f"document.querySelector({json.dumps(selector)}).focus()")
    self.call("Input.insertText", text=text)

  def upload(self, selector, path):
    """Chooses a file for an <input type=file>."""
    found = self.call("Runtime.evaluate",
                      expression=f"document.querySelector({json.dumps(selector)})")
    self.call("DOM.setFileInputFiles", files=[str(path)], objectId=found["result"]["objectId"])

  def click(self, selector):
    """Clicks on the middle of an element, as a mouse does, once it has stopped to move."""
    find, before, place = (
        f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
        "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect(); "
        "return [r.x + r.width / 2, r.y + r.height / 2] })()"), None, ()
    while place != before:
      before, place = place, self.value(find)
      time.sleep(0.1)
    for kind in ("mousePressed", "mouseReleased"):
      self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left",
                clickCount=1)

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
