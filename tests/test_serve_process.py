"""A real `irg serve` process: equal to `irg generate`, stopped by signals, under load."""

import concurrent.futures
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from engine import make_checkpoint
from irg_jax import commands
from irg_jax.generate import generator
from irg_jax.mini import verifier, world
from test_serve import pixels

PROGRAM = [sys.executable, "-m", "irg_jax"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
  """One CPU device, and a folder for compiled programs that both commands share."""
  found = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
  return found | {"JAX_PLATFORMS": "cpu", "NO_COLOR": "1",
                  "XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))}


@contextlib.contextmanager
def process(environment, *argv, verb="serve"):
  """Yields (process, address) of a server; it is stopped by SIGTERM, and must end well."""
  with subprocess.Popen([*PROGRAM, verb, "--port", "0", *argv], env=environment,
                        stderr=subprocess.PIPE, text=True) as running:
    lines = []
    try:
      for line in running.stderr:
        lines.append(line)
        if found := re.search(r"listening on (http://\S+?);", line):
          break
      assert found, "".join(lines)
      with concurrent.futures.ThreadPoolExecutor(1) as pool:
        rest = pool.submit(running.stderr.read)
        yield running, found[1]
        if running.poll() is None:
          running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 0
        assert "Traceback" not in rest.result()
    finally:
      running.kill()


def generated(environment, out, *argv):
  subprocess.run([*PROGRAM, "generate", "--out", str(out), *argv], env=environment, check=True,
                 capture_output=True)
  record = json.loads((out / "trace.json").read_text())
  return [entry["think"] for entry in record["rounds"]], [
      np.array(Image.open(out / entry["picture"])) for entry in record["rounds"]]


def test_a_server_draws_what_irg_generate_draws_and_finishes_what_runs_when_it_is_stopped(
    environment, tmp_path):
  checkpoint = make_checkpoint(tmp_path / "tiny")
  flags = ["--checkpoint", str(checkpoint), "--rounds", "1", "--config.cache_size=1024"]
  thoughts, images = generated(environment, tmp_path / "out", "a fox", "--seed", "3", *flags)
  with process(environment, *flags, "--batch-size", "1", "--max-images", "0") as (running, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    draw = lambda: client.images.generate(prompt="a fox", extra_body={"seed": 3}).data[0]
    found = draw()
    assert [entry["thought"] for entry in found.irg["rounds"]] == thoughts
    assert np.abs(pixels(found.b64_json).astype(int) - images[-1]).max() <= 1
    with concurrent.futures.ThreadPoolExecutor(1) as pool, httpx.Client() as poll:
      last = pool.submit(client.images.generate, prompt="a fox", n=8, extra_body={"seed": 3})
      while not last.done() and sum(poll.get(f"{url}/health").json()[x] for x in (
          "waiting", "running")) == 0:
        time.sleep(0.005)
      running.send_signal(signal.SIGTERM)
      assert last.result().data[0].b64_json == found.b64_json and len(last.result().data) == 8


@pytest.mark.long
def test_a_mesh_of_several_devices_serves_what_one_device_draws(environment, tmp_path):
  checkpoint = make_checkpoint(tmp_path / "tiny")
  flags = ["--checkpoint", str(checkpoint), "--rounds", "1", "--config.cache_size=1024"]
  thoughts, images = generated(environment, tmp_path / "out", "a fox", "--seed", "3", *flags)
  four = environment | {"JAX_NUM_CPU_DEVICES": "4"}
  with process(four, *flags, "--batch-size", "2", "--max-images", "0",
               "--mesh", "data=2,tensor=2") as (_, url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    found = client.images.generate(prompt="a fox", n=2, extra_body={"seed": 3}).data
  assert [entry["thought"] for entry in found[0].irg["rounds"]] == thoughts and len(found) == 2
  assert np.abs(pixels(found[0].b64_json).astype(int) - images[-1]).max() <= 1


@pytest.fixture(scope="module")
def large(tmp_path_factory):
  """Yields (process, address, environment) of the default model's server, all compiled."""
  kept = os.environ | {"JAX_PLATFORMS": "cpu"}
  kept.pop("XLA_FLAGS", None)
  with process(kept, "--batch-size", "8", "--queue", "200", "--max-rounds", "3") as (running, url):
    while httpx.get(f"{url}/health").status_code != 200:
      assert running.poll() is None
      time.sleep(1)
    yield running, url, kept


def figure(url, name):
  text = httpx.get(f"{url}/metrics").text
  return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])


def wait_idle(url, seconds=30):
  """Waits for rows of clients that left to end."""
  end = time.monotonic() + seconds
  while httpx.get(f"{url}/health").json()["running"] and time.monotonic() < end:
    time.sleep(0.1)


def resident(running):
  status = pathlib.Path(f"/proc/{running.pid}/status").read_text()
  return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1024  # MiB


@pytest.mark.long
def test_the_default_model_draws_and_asks_over_http_as_the_commands_do(large, tmp_path):
  _, url, environment = large
  client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
  prompt = "two red circles left of a blue star"
  found = client.images.generate(prompt=prompt, extra_body={"seed": 5}).data[0]
  thoughts, images = generated(environment, tmp_path / "out", prompt, "--seed", "5")
  assert [entry["thought"] for entry in found.irg["rounds"]] == thoughts
  for entry, image in zip(found.irg["rounds"], images):
    assert np.abs(pixels(entry["b64_json"]).astype(int) - image).max() <= 1
  photo = tmp_path / "out" / "round2.png"
  edited = client.images.edit(image=photo.read_bytes(), prompt="a green star",
                              extra_body={"seed": 5}).data[0]
  thoughts, images = generated(environment, tmp_path / "edit", "a green star", "--seed", "5",
                               "--image", str(photo))
  assert [entry["thought"] for entry in edited.irg["rounds"]] == thoughts
  assert np.abs(pixels(edited.b64_json).astype(int) - images[-1]).max() <= 2
  assert edited.irg["note"].startswith("this model was never trained to edit")
  asked = client.chat.completions.create(model="checkpoint", seed=5, messages=[
      {"role": "user", "content": "what is it"}], max_tokens=20)
  told = subprocess.run([*PROGRAM, "ask", "what is it", "--seed", "5", "--think-limit", "21"],
                        env=environment, check=True, capture_output=True, text=True)
  assert told.stdout == asked.choices[0].message.content + "\n"


def burst(url, records, rng):
  """Sends all requests at once, some wrong, some of clients that leave; {number: reply or None}."""
  def send(i):
    body, kind = {"prompt": records[i]["prompt"], "seed": i, "rounds": 1 + i % 3}, i % 8
    if kind == 5:
      body = rng.choice(["{", {"prompt": ""}, {"prompt": "a", "n": -1}, {"prompt": "a", "x": 1}])
    leaves, streams = kind in (3, 7), kind in (2, 6, 7)
    try:
      reply = httpx.post(
          f"{url}/v1/images/generations", timeout=rng.uniform(0.2, 8) if leaves else 600,
          headers={"content-type": "application/json"},
          content=body if isinstance(body, str) else json.dumps(body | {"stream": streams}))
    except httpx.TimeoutException:
      assert leaves
      return None
    if kind == 5:
      assert reply.status_code == 400 and "error" in reply.json()
      return None
    assert reply.status_code == 200, reply.text
    if not streams:
      return reply.json()["data"][0]
    last = [line for line in reply.text.splitlines() if line.startswith("data: ")][-1]
    return json.loads(last.removeprefix("data: "))

  with concurrent.futures.ThreadPoolExecutor(len(records)) as pool:
    return dict(enumerate(pool.map(send, range(len(records)))))


@pytest.mark.long
def test_64_requests_at_once_each_get_their_own_image_and_nothing_is_compiled_or_kept(large):
  running, url, _ = large
  rng, draw = random.Random(0), np.random.default_rng(0)
  records = [world.training_record(draw) for _ in range(64)]
  burst(url, records[:10], rng)
  wait_idle(url)
  compiled, memory = figure(url, "irg_compilations_total"), resident(running)
  right = crossed = total = 0
  for _ in range(2):
    for i, found in burst(url, records, rng).items():
      if found is None:
        continue
      assert found["irg"]["seed"] == i and len(found["irg"]["rounds"]) == 1 + i % 3
      image, other = pixels(found["b64_json"]), records[(i + 1) % len(records)]
      right += verifier.score(image, records[i]).correct
      crossed += verifier.score(image, other).correct
      total += 1
  assert total >= 64 and right > 0.85 * total and crossed < 0.1 * total, (right, crossed, total)
  assert figure(url, "irg_compilations_total") == compiled
  wait_idle(url)
  assert resident(running) < memory + 64, (memory, resident(running))
  assert httpx.get(f"{url}/health").json() == {"status": "ok", "waiting": 0, "running": 0}


@pytest.mark.parametrize("argv, fault", [
    (["--port", "70000"], "--port 70000"), (["--host", "203.0.113.1"], "--host 203.0.113.1"),
    (["--also-size", "50x50"], "50"), (["--max-steps", "1"], "--max-steps 1"),
    (["--also-size", "x"], "not a size"), (["--timeout", "0"], "seconds"),
    (["--checkpoint", "none"], "none"), (["--batch-size", "0"], "1 or more"),
    (["--config.cache_size=64"], "cache_size"), (["--workers", "-1"], "--workers -1"),
])
def test_a_server_that_cannot_work_says_so_before_it_reads_weights(monkeypatch, capsys, argv, fault):
  monkeypatch.setattr(generator, "load", None)
  try:
    status = commands.main(["serve", "--port", "0", *argv])
  except SystemExit as left:
    status = left.code
  shown = capsys.readouterr().err
  assert status == 2 and fault in shown and "Traceback" not in shown


def test_a_port_in_use_is_named(capsys):
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    assert commands.main(["serve", "--port", str(port)]) == 2
  assert f"--port {port}: cannot listen there" in capsys.readouterr().err
