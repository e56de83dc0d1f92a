"""Data in a bucket: built, encoded, checked, and trained on, the same as on disk."""

import pickle

import bucket_server
import numpy as np
import pytest
import train_runs
from array_record.python.array_record_module import ArrayRecordWriter
from bucket_server import broken, bucket
from train_runs import cache, data

from irg_jax import commands, leases, storage
from irg_jax.data import array_records, sources

pytestmark = bucket_server.needed
MODE = train_runs.MODES[0]
SHARE = ("--max-rejected", "0.1")


def at(name):
  return storage.path(f"gs://{bucket_server.BUCKET}/{name}")


def modes():
  return ["--mode", *train_runs.MODES]


@pytest.fixture(scope="module")
def published(bucket, data):
  """The published form in the bucket."""
  for path in data.rglob("*.parquet"):
    (at("published") / path.relative_to(data).as_posix()).write_bytes(path.read_bytes())
  return at("published")


@pytest.fixture(scope="module")
def built(published):
  """The built form in the bucket."""
  assert commands.main(["data", "build", str(published), "--out", str(at("built")), *modes(),
                        *SHARE]) == 0
  return at("built")


@pytest.mark.parametrize("largest, count", [(10, 3000), (300, 2000), (70_000, 100), (300_000, 20)])
def test_records_of_any_size_are_found_in_a_file_of_the_library(bucket, tmp_path, largest, count):
  rng = np.random.default_rng(largest)
  records = [rng.bytes(int(n)) for n in rng.integers(0, largest, count)]
  writer = ArrayRecordWriter(str(tmp_path / "x"), sources._WRITER_OPTIONS)
  for record in records:
    writer.write(record)
  writer.close()
  at("records").upload(tmp_path / "x")
  places = array_records.positions(at("records"))
  assert len(places) == count + 1
  for i in range(0, count, max(1, count // 40)):
    assert array_records.read(at("records"), *places[i:i + 2]) == records[i]
  damaged = bytearray((tmp_path / "x").read_bytes())
  damaged[places[1] + 8] ^= 1  # the size of a chunk
  at("records").write_bytes(damaged)
  with pytest.raises(ValueError, match="chunk|sizes"):
    array_records.read(at("records"), *places[1:3])


def test_data_built_in_a_bucket_are_those_of_disk_and_only_what_is_asked_for_is_read(
    bucket, data, published, built):
  for folder in (published, built):
    found = sources.open_source(folder, MODE, max_rejected=0.1)
    here = sources.open_source(data, MODE, max_rejected=0.1)
    assert [found[i] for i in range(len(found))] == [here[i] for i in range(len(here))]
    assert sources.fingerprint(found) == sources.fingerprint(here)
    assert found.metadata["rejected"] == here.metadata["rejected"]
  source = pickle.loads(pickle.dumps(sources.open_source(built, MODE)))
  bucket.read.clear()
  record = source[3]
  sent = sum(len(part.data) for part in record.parts if hasattr(part, "data"))
  places = 2 * 2**16 + 10_000  # last blocks of the file, once
  assert sum(bucket.read.values()) < sent + places
  assert not list(storage.cache_folder("scratch").glob("*"))
  assert not [name for name in bucket.names("built") if leases.UNFINISHED in name]


def test_a_build_that_was_killed_is_refused_and_made_again(bucket, published, capsys):
  build = ["data", "build", str(published), "--out", str(at("again")), "--mode", MODE, *SHARE]
  assert commands.main(build) == 0
  home = at("again") / "irgl" / MODE
  before = {n: bucket.content(n) for n in bucket.names("again") if "array_record" in n}
  (home / leases.UNFINISHED).write_bytes(bucket_server.dead_holder())
  next(iter(home.rglob("*array_record*"))).unlink()
  with pytest.raises(ValueError, match="not complete"):
    sources.open_source(at("again"), MODE)
  assert commands.main(build) == 0
  assert {n: bucket.content(n) for n in bucket.names("again") if "array_record" in n} == before
  assert commands.main(build) == 2
  assert "exists already" in capsys.readouterr().err


def test_latents_in_a_bucket_are_those_of_disk_whoever_wrote_which_file(
    bucket, data, built, tmp_path, capsys):
  assert commands.main(["init", "--config", "configs/tiny.py", "--out", str(at("vae"))]) == 0
  assert commands.main(["init", "--config", "configs/tiny.py", "--out", str(tmp_path / "vae")]) == 0
  encode = lambda path, out, *more: commands.main([
      "data", "encode-latents", str(path), "--out", str(out), "--size", "16", "64", "16", *modes(),
      *SHARE, *more])
  hosts = ("--num-processes", "2", "--process-id")
  there = ("--checkpoint", str(at("vae")))
  assert encode(built, at("latents"), *there, *hosts, "1") == 0
  with pytest.raises(ValueError, match="not complete"):
    sources.open_source(at("latents"), MODE)
  assert encode(built, at("latents"), *there, *hosts, "0") == 0
  assert "written" in capsys.readouterr().out
  assert encode(built, at("latents"), *there) == 0
  assert "there" in capsys.readouterr().out
  assert encode(data, tmp_path / "latents", "--checkpoint", str(tmp_path / "vae")) == 0
  found, here = (sources.open_source(x, MODE) for x in (at("latents"), tmp_path / "latents"))
  for i in range(len(here)):
    for a, b in zip(found[i].parts, here[i].parts, strict=True):
      assert getattr(a, "data", None) == getattr(b, "data", None)
      np.testing.assert_array_equal(getattr(a, "moments", None), getattr(b, "moments", None))


def test_data_in_a_bucket_are_checked_with_a_page_there(bucket, built):
  assert commands.main(["data", "check", str(built), "--out", str(at("pages/check.html")),
                        *modes()]) == 0
  assert b"<html" in bucket.content("pages/check.html")


@pytest.mark.long
def test_a_run_on_data_in_a_bucket_ends_in_the_bytes_of_one_on_disk(
    bucket, data, built, cache, tmp_path):
  """Worker processes read records by themselves; the batches follow from seed and streams."""
  train = lambda out, **fields: commands.main(train_runs.flags(
      data, out, train_runs.MESH, run_stages="stage1", stage1__steps=2, data__workers=2, **fields))
  assert train(tmp_path / "out") == 0
  met = []

  def now_and_then(method, name):
    met.append(name)
    return 503 if len(met) % 29 == 0 else None

  with broken(bucket, now_and_then):
    assert train(tmp_path / "there", data__path=str(built)) == 0
  for name in ("stage1/weights/ema.safetensors", "stage1/checkpoints/2/run/metadata"):
    assert (tmp_path / "there" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
