"""Everything in a bucket, killed again and again: `pytest -m long tests/test_bucket_long.py`."""

import json
import os
import random
import subprocess
import sys

import bucket_server
import numpy as np
import pytest
import train_runs
from bucket_server import broken, bucket
from train_runs import cache, data

from irg_jax import storage

pytestmark = [bucket_server.needed, pytest.mark.long]
STAGES = ("stage1", "stage2")
OTHER = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
  """The user's folder for caches of all processes."""
  folder = tmp_path_factory.mktemp("home")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("XDG_CACHE_HOME", str(folder))
    yield folder


def irg(*words):
  done = subprocess.run([sys.executable, "-m", "irg_jax", *map(str, words)], text=True,
                        capture_output=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.fixture(scope="module")
def built(bucket, data, home):
  """Data that were uploaded, and built in the bucket."""
  for path in data.rglob("*.parquet"):
    (storage.path("gs://bucket/raw") / path.relative_to(data).as_posix()).upload(path)
  irg("data", "build", "gs://bucket/raw", "--out", "gs://bucket/built", "--max-rejected", "0.1",
      "--mode", *train_runs.MODES)
  return "gs://bucket/built"


def flags(data, built, out, mesh):
  return train_runs.flags(data, out, mesh, data__path=built, stage1__steps=6, stage2__steps=4)


def finish(processes):
  for process in processes:
    text, _ = process.communicate()
    assert process.returncode == 0, text


def kill_at(bucket, processes, count, what) -> bool:
  """Kills processes at the `count`-th request that `what` takes; False if they ended before."""
  left = [count]

  def rule(method, name):
    left[0] -= what(method, name)
    if left[0] <= 0:
      for process in processes:
        process.kill()

  with broken(bucket, rule):
    for process in processes:
      process.communicate()
  return left[0] <= 0


def lines(bucket, out):
  found = [json.loads(line) for line in bucket.content(f"{out}/log.jsonl").splitlines()]
  return {(line["stage"], line["step"]): line for line in found if "loss" in line}


def test_five_kills_at_random_moments_leave_the_bytes_of_a_local_run(
    bucket, data, built, cache, home, tmp_path):
  finish([train_runs.process(flags(data, built, tmp_path / "out", train_runs.MESH), cache,
                             devices=8)])
  there, dice, kills = flags(data, built, "gs://bucket/run", train_runs.MESH), random.Random(1), 0
  moments = [lambda method, name: method == "POST" and name.startswith("run/"),
             lambda method, name: method == "POST" and "/checkpoints/" in name]
  for number in range(5):
    process = train_runs.process(there, cache, devices=8)
    kills += kill_at(bucket, [process], dice.randint(3, 40), moments[number % 2])
  assert kills == 5
  finish([train_runs.process(there, cache, devices=8)])
  for stage in STAGES:
    for name in ("ema.safetensors", "ae.safetensors", "tokenizer.json"):
      assert bucket.content(f"run/{stage}/weights/{name}") == (
          tmp_path / "out" / stage / "weights" / name).read_bytes()
  here = train_runs.steps(tmp_path / "out")
  assert {k: x["samples"] for k, x in lines(bucket, "run").items()} == {
      k: x["samples"] for k, x in here.items()}
  assert not [n for n in bucket.names("run") if n.endswith((".lock", ".unfinished"))]
  left = {path.name for path in (home / "irg_jax").rglob("*") if path.is_file()}
  assert not left  # programs are elsewhere in these tests
  irg("generate", "a fox", "--checkpoint", "gs://bucket/run/stage2/weights", "--out",
      "gs://bucket/drawn", "--size", "32", "--steps", "3", "--rounds", "1", "--think-limit", "4")
  assert "drawn/trace.json" in bucket.names("drawn")


def test_a_run_in_a_bucket_goes_on_with_two_processes_and_on_another_mesh(
    bucket, data, built, cache, tmp_path):
  pair = train_runs.two_processes(flags(data, built, "gs://bucket/moved", OTHER), cache)
  assert kill_at(bucket, pair, 1, lambda method, name: "stage1/checkpoints/4" in name)
  moved = flags(data, built, "gs://bucket/moved", {"fsdp": 8})
  finish([train_runs.process(moved, cache, devices=8)])
  finish([train_runs.process(flags(data, built, tmp_path / "out", train_runs.MESH), cache,
                             devices=8)])
  here, there = train_runs.steps(tmp_path / "out"), lines(bucket, "moved")
  assert here.keys() == there.keys()
  for place, line in here.items():
    assert there[place]["samples"] == line["samples"], place
    np.testing.assert_allclose(there[place]["loss"], line["loss"], rtol=1e-5)
