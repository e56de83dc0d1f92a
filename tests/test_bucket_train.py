"""A training run in a bucket: the bytes of a local run, whatever the store or a kill does."""

import collections
import json
import random
import sys
import time

import bucket_server
import pytest
import train_runs
from bucket_server import broken, bucket
from train_runs import cache, data

from irg_jax import commands, leases, runs, storage, weights

pytestmark = bucket_server.needed
WEIGHTS = ("ema.safetensors", "ae.safetensors", "tokenizer.json")


def train(data, out, **fields) -> int:
  return commands.main(train_runs.flags(data, out, train_runs.MESH, run_stages="stage1", **fields))


@pytest.fixture(scope="module")
def whole(data, cache, tmp_path_factory):
  """The folder of a local run of stage 1."""
  out = tmp_path_factory.mktemp("whole") / "out"
  assert train(data, out) == 0
  return out


def assert_same(bucket, name, whole):
  """The run of a name in the bucket ended in the same bits as the local one."""
  for file in WEIGHTS:
    path = f"stage1/weights/{file}"
    assert bucket.content(f"{name}/{path}") == (whole / path).read_bytes(), file
  metadata = "stage1/checkpoints/4/run/metadata"  # data state and checksums of the training state
  assert bucket.content(f"{name}/{metadata}") == (whole / metadata).read_bytes()
  lines = [json.loads(line) for line in bucket.content(f"{name}/log.jsonl").splitlines()]
  steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
  assert steps == [(line["step"], line["loss"]) for line in train_runs.lines(whole)
                   if "loss" in line]
  assert not [n for n in bucket.names(name) if leases.UNFINISHED in n or ".lock" in n]
  assert not list(storage.cache_folder("logs").glob("*"))


@pytest.mark.long
def test_with_a_store_that_fails_now_and_then_it_ends_in_the_bytes_of_a_local_run(
    bucket, data, whole):
  dice, met = random.Random(0), collections.Counter()

  def now_and_then(*_):
    fault = dice.choice([503, "reset", "lost", 429]) if dice.random() < 0.03 else None
    met[fault] += 1
    return fault

  with broken(bucket, now_and_then):
    assert train(data, "gs://bucket/faults") == 0
  assert len(met) == 5
  assert_same(bucket, "faults", whole)
  assert any(n.startswith("faults/tensorboard/stage1/events") for n in bucket.names("faults"))
  record = json.loads(bucket.content("faults/run.json"))
  assert record["settings"] == json.loads((whole / "run.json").read_text())["settings"]
  assert train(data, "gs://bucket/faults") == 0  # nothing is left to do
  assert_same(bucket, "faults", whole)


@pytest.mark.long
def test_what_a_kill_leaves_half_written_is_made_again(bucket, data, whole):
  """A checkpoint without its mark, weights that are unfinished, a lock, a log that is ahead."""
  assert train(data, "gs://bucket/killed") == 0
  out = storage.path("gs://bucket/killed")
  step = out / "stage1" / "checkpoints" / "4"
  (step / "commit_success.txt").unlink()
  next(iter((step / "state" / "d").iterdir())).unlink()
  for lock in (out / ".lock", out / "stage1" / "weights" / leases.UNFINISHED):
    lock.write_bytes(bucket_server.dead_holder())
  (out / "stage1" / "weights" / "ema.safetensors").write_bytes(b"half")
  with pytest.raises(weights.CheckpointError, match="not complete"):
    weights.read_config(out / "stage1" / "weights")
  assert train(data, "gs://bucket/killed") == 0
  assert_same(bucket, "killed", whole)


@pytest.mark.long
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_it_is_used(
    bucket, data, whole, capsys):
  assert train(data, "gs://bucket/damaged") == 0
  out = storage.path("gs://bucket/damaged")
  out.joinpath("stage1", "weights").rmtree()
  part = next(p for p in (out / "stage1/checkpoints/4/state").rglob("*")
              if "/d/" in str(p) and p.stat().st_size > 1000)
  part.write_bytes(part.read_bytes()[:-100])
  assert train(data, "gs://bucket/damaged") == 0
  err = capsys.readouterr().err
  assert "checkpoint gs://bucket/damaged/stage1/checkpoints/4 is damaged" in err
  assert "and step 2 is used" in err
  assert bucket.names("damaged/stage1/checkpoints/damaged/4")
  assert_same(bucket, "damaged", whole)


def test_a_second_run_is_refused_and_other_settings_are_named(bucket, data, capsys):
  with runs.locked(storage.path("gs://bucket/used/.lock"), "x"):
    assert train(data, "gs://bucket/used") == 2
  assert "--out gs://bucket/used: another irg train is at work in it" in capsys.readouterr().err
  storage.path("gs://bucket/other/x").write_bytes(b"")
  assert train(data, "gs://bucket/other") == 2
  assert "--out gs://bucket/other: holds x, but no run.json" in capsys.readouterr().err
  assert bucket.names("used") == [] and bucket.names("other") == ["other/x"]


@pytest.mark.long
def test_a_bucket_that_is_away_is_waited_for(bucket, data, whole):
  away = [None]

  def after_a_checkpoint(method, name):
    if name.endswith("checkpoints/2/commit_success.txt") and away[0] is None:
      away[0] = time.monotonic() + 8
    return 503 if away[0] and time.monotonic() < away[0] else None

  with broken(bucket, after_a_checkpoint):
    assert train(data, "gs://bucket/away") == 0
  assert away[0]
  assert_same(bucket, "away", whole)


@pytest.mark.long
def test_a_bucket_that_stays_away_ends_the_run_with_the_last_good_checkpoint_named(
    bucket, data, whole, capsys, monkeypatch):
  monkeypatch.setattr(sys.modules["irg_jax.stores"], "PATIENCE", 1.0)
  gone = []

  def after_a_checkpoint(method, name):
    if method == "POST" and name.endswith("stage1/checkpoints/2/commit_success.txt"):
      gone.append(time.monotonic() + 1)
    return 503 if gone and time.monotonic() > gone[0] else None

  with broken(bucket, after_a_checkpoint):
    assert train(data, "gs://bucket/gone", log_every=1) == 2
  err = capsys.readouterr().err
  assert "the store did not answer for" in err
  assert "the last good checkpoint is gs://bucket/gone/stage1/checkpoints/2" in err
  storage.path("gs://bucket/gone/.lock").write_bytes(
      bucket_server.dead_holder())  # it could not remove it
  assert train(data, "gs://bucket/gone", log_every=1) == 0
  assert_same(bucket, "gone", whole)
