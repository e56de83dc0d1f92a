"""`irg serve` under hostile input: clean errors in the API's form, no crash, no hang, no growth."""

import base64
import gc
import json
import os
import socket
import struct
import time
import tracemalloc
import urllib.parse
import zlib

import httpx
import numpy as np
import pytest

from engine import make_checkpoint
from irg_jax.images import encode_image
from irg_jax.serve import run
from serving import Drawer, serving
from test_serve import data_url, eventually, photo

BODY = 200_000  # bytes that a request may have here


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  checkpoint = make_checkpoint(tmp_path_factory.mktemp("weights") / "tiny")
  with pytest.MonkeyPatch.context() as patch, serving(
      checkpoint, patch, Drawer(), body=BODY, pixels=10_000, read_seconds=0.5) as found:
    yield found


@pytest.fixture
def url(served):
  yield served[1]
  assert eventually(lambda: served[0].engine.load == (0, 0))
  good = httpx.post(f"{served[1]}/v1/images/generations", json={"prompt": "a fox", "seed": 1})
  assert good.status_code == 200


def png(width, height):
  """A PNG file of so many black pixels, small as it is."""
  chunk = lambda name, data: (struct.pack(">I", len(data)) + name + data
                              + struct.pack(">I", zlib.crc32(name + data)))
  packer = zlib.compressobj(9)
  rows = min(height, 3000)  # of very many, the file lacks the rest
  data = b"".join(packer.compress(bytes(1 + width // 8)) for _ in range(rows)) + packer.flush()
  head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data[:BODY // 4])
          + chunk(b"IEND", b""))


IMAGE = {"type": "image_url", "image_url": {"url": data_url(photo())}}
user = lambda content: {"messages": [{"role": "user", "content": content}]}
linked = lambda text: user([{"type": "image_url", "image_url": {"url": text}}])


@pytest.mark.parametrize("fields, fault", [
    ({}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": " \n"}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": ["a"]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": "word " * 2000}, "prompt"),
    ({"n": 0}, "n"), ({"n": -1}, "n"), ({"n": 9}, "n"), ({"n": 10**9}, "n"), ({"n": 1e99}, "n"),
    ({"n": "2"}, "n"), ({"n": True}, "n"), ({"n": 1.5}, "n"), ({"n": [1]}, "n"),
    ({"size": "1000000000x1000000000"}, "size"), ({"size": "0x0"}, "size"),
    ({"size": "-48x32"}, "size"), ({"size": "48x32x1"}, "size"), ({"size": "4٨x32"}, "size"),
    ({"size": 48}, "size"), ({"size": "16x16"}, "size"), ({"size": "../48x32"}, "size"),
    ({"seed": -1}, "seed"), ({"seed": 2**32}, "seed"), ({"seed": 1.0}, "seed"),
    ({"seed": 10**400}, "seed"), ({"seed": "; rm -rf /"}, "seed"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"num_inference_steps": 20}, "num_inference_steps"),
    ({"rounds": 4}, "rounds"), ({"rounds": 0}, "rounds"),
    ({"rounds": 2, "think": False}, None),
    ({"max_think_tokens": 5}, "max_think_tokens"),
    ({"guidance_scale": float("nan")}, "guidance_scale"),
    ({"guidance_scale": float("inf")}, "guidance_scale"),
    ({"guidance_scale": -1}, "guidance_scale"), ({"guidance_scale": 1e39}, "guidance_scale"),
    ({"true_cfg_scale": "high"}, "true_cfg_scale"),
    ({"flow_shift": 0}, "flow_shift"), ({"flow_shift": float("-inf")}, "flow_shift"),
    ({"think_temperature": float("nan")}, "think_temperature"),
    ({"think": "yes"}, "think"), ({"stream": 1}, "stream"),
    ({"response_format": "file:///etc/passwd"}, "response_format"),
    ({"partial_images": -1}, "partial_images"),
    ({"quality": "high"}, "quality"), ({"output_format": "exe"}, "output_format"),
    ({"__class__": "x"}, "__class__"), ({"rouns": 2}, "rouns"),
    ({"model": "../../etc/passwd"}, "model"), ({"model": 7}, "model"),
])
def test_a_wrong_field_is_named(url, fields, fault):
  body = json.dumps({"prompt": "a fox"} | fields if fields else {})
  reply = httpx.post(f"{url}/v1/images/generations", content=body,
                     headers={"content-type": "application/json"}, timeout=5)
  assert reply.status_code in (400, 404), reply.text
  error = reply.json()["error"]
  assert error["param"] == fault and error["message"] and len(reply.content) < 2000


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b'"a"', b"\xff\xfe", b"[" * 100_000, b'{"prompt":' * 20_000,
    b'{"prompt": "a", "seed": ' + b"9" * 50_000 + b"}", b"\x00" * 100, b'{"prompt": NaN}',
])
def test_a_body_that_is_not_the_json_wanted_is_refused(url, body):
  for path in ("images/generations", "chat/completions"):
    reply = httpx.post(f"{url}/v1/{path}", content=body, timeout=5,
                       headers={"content-type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body, fault", [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": {}}, "messages"),
    ({"messages": ["a"]}, "messages"), ({"messages": [{"role": "root", "content": "a"}]}, "role"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "last message"),
    (user(None), "last message"), (user(" "), "last message"), (user(7), "content"),
    (user([7]), "part of type"), (user([{"type": "input_audio"}]), "part of type"),
    (user([{"type": "text", "text": ["a"]}]), "text"),
    (user([{"type": "image_url", "image_url": "data:,"}]), "part of type"),
    (linked("http://169.254.169.254/latest/meta-data"), "nothing is fetched"),
    (linked("file:///etc/passwd"), "nothing is fetched"), (linked(None), "nothing is fetched"),
    (linked("data:text/html;base64,PGI+"), "nothing is fetched"),
    (linked("data:image/png;base64,!!!"), "not base64"),
    (linked("data:image/png;base64,AAAA"), "not an image"),
    (linked("data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode()), "not an image"),
    (linked("data:image/png;base64," + base64.b64encode(png(100_000, 100_000)).decode()),
     "more than the 10,000 pixels"),
    (user([IMAGE] * 3), "at most 2"),
    (user([{"type": "text", "text": "a" * 5000}]), "tokens"),
    (user("a") | {"modalities": "image"}, "modalities"),
    (user("a") | {"modalities": ["audio"]}, "modalities"),
    (user("a") | {"tools": [{"type": "function"}]}, "tools"),
    (user("a") | {"n": 2}, "n"), (user("a") | {"max_tokens": 10**9}, "max_tokens"),
    (user("a") | {"temperature": -1}, "temperature"), (user("a") | {"top_p": 0.1}, "top_p"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "first"),
])
def test_a_wrong_chat_is_refused(url, body, fault):
  reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=5)
  assert reply.status_code == 400 and fault in reply.json()["error"]["message"], reply.text


def form(url, files, **data):
  return httpx.post(f"{url}/v1/images/edits", data=data, files=files, timeout=5)


@pytest.mark.parametrize("files, data, fault", [
    ({"image": b""}, {}, "not an image"),
    ({"image": b"GIF89a"}, {}, "not an image"),
    ({"image": png(70_000, 70_000)}, {}, "more than the 10,000 pixels"),
    ({"image": encode_image(photo())[:300]}, {}, "image"),
    ({"mask": encode_image(photo())}, {}, "only image"),
    ({"../../x": encode_image(photo())}, {}, "only image"),
    ({"image": encode_image(photo())}, {"n": "two"}, "n"),
    ({"image": encode_image(photo())}, {"guidance_scale": "nan"}, "guidance_scale"),
    ({"image": encode_image(photo())}, {"stream": "maybe"}, "stream"),
    ({"image": encode_image(photo())}, {"seed": "9" * 5000}, "seed"),
    ({"image": encode_image(photo())}, {"what": "a"}, "what"),
])
def test_a_wrong_edit_is_refused(url, files, data, fault):
  reply = form(url, files, prompt="more rain", **data)
  assert reply.status_code == 400 and fault in reply.json()["error"]["message"], reply.text


def test_an_edit_without_its_parts_is_refused(url):
  many = [("image", encode_image(photo()))] * 3
  for files, fault in ((many, "at most 2"), ([("image", b"x")] * 100, "form")):
    reply = form(url, files, prompt="a")
    assert reply.status_code == 400 and fault in reply.json()["error"]["message"]
  post = lambda **more: httpx.post(f"{url}/v1/images/edits", timeout=5, **more)
  kind = {"content-type": "multipart/form-data; boundary=x"}
  assert post(data={"prompt": "a"}).status_code == 415
  assert post(content=b"--x\r\n", headers=kind).status_code == 400
  assert post(content=b"\x00" * 999, headers=kind).status_code == 400
  assert post(content=b"--x\r\n\r\n\r\n--x--", headers=kind).status_code == 400
  assert post(content=b"", headers={"content-type": "multipart/form-data"}).status_code == 400
  lone = post(content=b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n--x--\r\n',
              headers=kind)
  assert lone.status_code == 400 and "image" in lone.json()["error"]["message"]


def test_names_and_prompts_with_paths_and_scripts_are_text(url, tmp_path, monkeypatch):
  before = sorted(os.listdir("."))
  files = {"image": ("../../../etc/cron.d/x", encode_image(photo()), "text/html")}
  prompt = "<script>alert(1)</script> $(touch owned) ../../x \u202e{{7*7}}"
  reply = form(url, files, prompt=prompt, seed="1")
  assert reply.status_code == 200 and prompt in reply.json()["data"][0]["revised_prompt"]
  assert sorted(os.listdir(".")) == before


def test_a_body_beyond_the_bound_is_refused_before_it_is_all_there(url):
  big = {"prompt": "a" * (BODY + 1)}
  reply = httpx.post(f"{url}/v1/images/generations", json=big, timeout=5)
  assert reply.status_code == 413 and reply.json()["error"]["code"] == "too_large"
  endless = (b"a" * 10_000 for _ in range(10**6))
  try:
    reply = httpx.post(f"{url}/v1/images/generations", content=endless, timeout=5,
                       headers={"content-type": "application/json"})
    assert reply.status_code == 413
  except (httpx.WriteError, httpx.ReadError):  # the connection is closed while more is sent
    pass


def connect(url):
  place = urllib.parse.urlsplit(url)
  return socket.create_connection((place.hostname, place.port), timeout=10)


def reply_to(connection):
  data = b""
  while part := connection.recv(65536):
    data += part
  return data


@pytest.mark.parametrize("raw", [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 10, b"GET /\r\n\r\n", b"\r\n" * 1000,
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n"
    b"content-length: 6\r\n\r\n",
    b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
])
def test_what_is_not_http_is_refused_and_the_connection_closed(url, raw):
  with connect(url) as connection:
    try:
      connection.sendall(raw)
      assert reply_to(connection)[9:12] in (b"400", b"431", b"404", b"")
    except (ConnectionResetError, BrokenPipeError):
      pass


def test_a_slow_sender_is_given_up(url, monkeypatch):
  with connect(url) as connection:  # of a body
    connection.sendall(b"POST /v1/images/generations HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
                       b"content-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    assert reply_to(connection)[9:12] == b"408"
  monkeypatch.setattr(run, "_HEADER_SECONDS", 0.2)
  for start in (b"", b"GET /health HTTP/1.1\r\nhost: x\r\n"):  # of headers
    with connect(url) as connection:
      connection.sendall(start)
      begin = time.monotonic()
      try:
        for _ in range(50):
          connection.sendall(b"a: b\r\n" if start else b"G")
          time.sleep(0.1)
        pytest.fail("the connection is still open")
      except (ConnectionResetError, BrokenPipeError):
        pass
      assert time.monotonic() - begin < 4


@pytest.mark.parametrize("method, path, status", [
    ("GET", "/", 404), ("GET", "/v1/../../etc/passwd", 404), ("GET", "/images/%00", 404),
    ("GET", "/v1/models/%2e%2e/%2e%2e", 404), ("DELETE", "/v1/models/tiny", 405),
    ("GET", "/v1/images/generations", 405), ("PUT", "/v1/chat/completions", 405),
    ("GET", "/images/..%2f..%2fsetup.cfg", 404),
])
def test_wrong_paths_and_methods_are_errors_in_the_apis_form(url, method, path, status):
  reply = httpx.request(method, url + path, timeout=5)
  assert reply.status_code == status and reply.json()["error"]["message"]


def test_memory_stays_flat_under_bodies_that_are_refused(url):
  image = encode_image(np.zeros((3000, 3000, 3), np.uint8))  # small as a file
  bodies = [{"prompt": "a" * 150_000}, linked("data:image/png;base64," + base64.b64encode(
      image).decode()), {"prompt": "a", "response_format": "url"}]
  assert len(image) < BODY // 2

  def send():
    for path in ("images/generations", "chat/completions"):
      for body in bodies:
        httpx.post(f"{url}/v1/{path}", json=body, timeout=5)

  send()
  tracemalloc.start()
  try:
    send()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(6):
      send()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
  finally:
    tracemalloc.stop()
  assert grown < 500_000, grown
