"""Buckets: objects, locks, checkpoints and `irg generate`, against an emulator on loopback."""

import json
import os
import subprocess
import sys
import time
import threading

import bucket_server
import jax
import numpy as np
import pytest
from bucket_server import broken, bucket  # noqa: F401 (fixture)

from irg_jax import commands, config, holders, leases, messages, runs, sharding, storage, weights
from irg_jax.weights import CheckpointError, init, ranges

pytestmark = bucket_server.needed

def at(name):
  return storage.path(f"gs://{bucket_server.BUCKET}/{name}")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
  """A published checkpoint on disk."""
  folder = tmp_path_factory.mktemp("weights") / "tiny"
  model = config.read_model("configs/tiny.py", [])
  init.write_random_checkpoint(folder, model, 0)
  return folder


@pytest.fixture(scope="module")
def remote(bucket, local):
  """Its copy in the bucket."""
  for path in local.iterdir():
    (at("weights") / path.name).write_bytes(path.read_bytes())
  return at("weights")


def same(a, b):
  equal = jax.tree.map(lambda x, y: x.dtype == y.dtype and bool(
      (np.asarray(x) == np.asarray(y)).all()), a, b)
  return all(jax.tree.leaves(equal))


# --- objects


def test_paths_in_a_bucket_behave_as_on_disk(bucket):
  path = at("objects/a/b.txt")
  assert not path.exists() and not list(at("objects").iterdir())
  assert storage.path(str(path)) == path and not storage.is_local(path)
  storage.write_text(path, "x\r\n\u00e9")
  assert path.is_file() and path.parent.is_dir() and path.stat().st_size == 5
  assert storage.read_file(path).decode() == "x\r\n\u00e9" and path.read_range(1, 3) == b"\r\n"
  assert [p.name for p in at("objects").iterdir()] == ["a"]
  assert list(at("objects").rglob("*.txt")) == [path] == list(path.parent.glob("b*"))
  assert path.absolute() == path and at("").parent == at("")
  path.unlink()
  assert not path.exists() and not path.parent.exists()
  with pytest.raises(FileNotFoundError):
    path.unlink()


@pytest.mark.parametrize("text", ["http://host/x", "hf://owner/x", "gs:///x", "gs://", "s3:/x"])
def test_other_schemes_are_refused_at_once(text):
  with pytest.raises(ValueError, match="only paths of this machine, gs://BUCKET"):
    storage.path(text)


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"needs the package gcsfs: pip install 'irg_jax\[gcs\]'"):
    storage.path("gs://bucket/x")


def test_a_file_written_bit_by_bit_appears_at_the_end_or_not_at_all(bucket):
  data = os.urandom(2**20)
  with storage.writer(at("bits/whole")) as file:
    for _ in range(40):  # more than one part
      file.write(data)
    assert not at("bits/whole").exists()
  assert at("bits/whole").read_bytes() == 40 * data
  with pytest.raises(KeyError), storage.writer(at("bits/half")) as file:
    file.write(40 * data)
    raise KeyError
  with pytest.raises(KeyError), storage.atomic_file(at("bits/half")) as temporary:
    temporary.write_bytes(data)
    raise KeyError
  assert bucket.names("bits") == ["bits/whole"]


@pytest.mark.parametrize("fault", [503, "reset", ("slow", 0.2), *(
    pytest.param(fault, marks=pytest.mark.long) for fault in (429, "lost"))])
def test_a_fault_of_the_store_is_asked_again_and_nothing_is_read_or_written_wrong(bucket, fault):
  path, data, left = at(f"faults/{fault}"), os.urandom(100_000), [2]

  def twice(*_):
    left[0] -= 1
    return fault if left[0] >= 0 else None

  for action in (lambda: path.write_bytes(data), lambda: path.read_range(7, 99_000)):
    left[0] = 2
    with broken(bucket, twice):
      result = action()
    assert left[0] < 2  # the fault was met
  assert result == data[7:99_000] and path.read_bytes() == data
  left[0] = 2
  with broken(bucket, twice):  # its first answer may be lost: it is known to be ours
    assert at(f"faults/created {fault}").put_if(data, None)


@pytest.mark.parametrize("fault, error, message", [
    (403, PermissionError, "access denied by the store"), (401, PermissionError, "access denied"),
    (404, FileNotFoundError, "no such object"), (400, OSError, "the store refuses")])
def test_denied_and_missing_objects_are_one_error_that_names_them(bucket, fault, error, message):
  with broken(bucket, lambda *_: fault):
    for action in (at("x/y").read_bytes, lambda: at("x/y").write_bytes(b"")):
      with pytest.raises(error) as caught:
        action()
      assert f"gs://bucket/x/y: {message}" in messages.message(caught.value)
    if fault != 404:  # not taken for a missing file
      with pytest.raises(error):
        at("x/y").exists()


def test_a_store_that_is_away_ends_in_an_error_that_names_the_object(bucket, monkeypatch):
  monkeypatch.setattr(sys.modules["irg_jax.stores"], "PATIENCE", 1.0)
  with broken(bucket, lambda *_: 503), pytest.raises(OSError) as caught:
    at("x").write_bytes(b"")
  assert "gs://bucket/x: the store did not answer for" in messages.message(caught.value)
  monkeypatch.setattr(sys.modules["irg_jax.stores"], "PATIENCE", 600.0)
  monkeypatch.setattr(sys.modules["irg_jax.stores"], "_FIRST", 1.0)
  for name in ("_answered", "_given_up"):  # as in a new process
    monkeypatch.setattr(sys.modules["irg_jax.stores"], name, threading.Event())
  with broken(bucket, lambda *_: 503), pytest.raises(OSError, match="did not answer for"):
    at("x").read_bytes()
  with pytest.raises(OSError, match="object is shorter"):
    at("short").write_bytes(b"123")
    at("short").read_range(1, 9)


# --- locks and folders


HOLD = """
import sys, time
from irg_jax import leases, storage
with leases.leased(storage.path(sys.argv[1]), "busy", 0.2, 60):
  print("held", flush=True)
  time.sleep(60)
"""


def holder(path):
  process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
  assert process.stdout.readline() == "held\n"
  return process


def test_a_lock_has_one_holder_and_is_void_once_that_was_killed(bucket):
  path = at("locks/a/.lock")
  process = holder(path)
  for _ in range(2):
    with pytest.raises(runs.Held, match=rf"busy: process {process.pid} on "):
      with runs.locked(path, "busy"):
        pytest.fail("was let in")
  process.kill()
  process.wait()
  with runs.locked(path, "busy"), pytest.raises(runs.Held):
    with runs.locked(path, "busy"):
      pytest.fail("was let in twice")
  assert not bucket.names("locks/a")


def test_a_holder_elsewhere_is_known_by_its_signs_and_finds_out_that_it_lost(bucket, monkeypatch):
  path = at("locks/b/.lock")
  process = holder(path)
  monkeypatch.setattr(holders, "machine", lambda: "elsewhere")
  with pytest.raises(runs.Held), leases.leased(path, "busy", 0.2, 5):
    pytest.fail("was let in")
  os.kill(process.pid, 19)  # SIGSTOP, as a machine that is suspended
  with leases.leased(path, "busy", 0.2, 1):
    os.kill(process.pid, 18)
    assert process.wait(20) == 2 and "taken over by process" in process.stderr.read()
    assert json.loads(path.read_bytes())["pid"] == os.getpid()


def test_a_holder_whose_sign_was_written_but_not_answered_goes_on(bucket, monkeypatch):
  path = at("locks/e/.lock")
  monkeypatch.setattr(sys.modules["irg_jax.stores"], "PATIENCE", 0.1)
  lost = lambda method, name: "lost" if method == "POST" and name.endswith("e/.lock") else None
  with leases.leased(path, "busy", 0.05, 60):
    before = path.look().version
    with broken(bucket, lost):
      while path.look().version == before:
        pass
      time.sleep(1.5)
    after = path.look().version
    while path.look().version == after:  # it goes on, and has not given way to itself
      pass
  assert not path.exists()


def test_each_sign_of_life_has_another_content(bucket):
  """The version of an object may be a digest of its content, as in S3."""
  path, seen = at("locks/d/.lock"), set()
  with leases.leased(path, "busy", 0.05, 60):
    while len(seen) < 3:
      seen.add(path.read_bytes())


def test_of_many_that_come_at_once_one_gets_the_lock(bucket):
  path = at("locks/c")
  versions = [version for i in range(5) if (version := path.put_if(f"{i}".encode(), None))]
  assert len(versions) == 1 and path.read_bytes() == b"0"
  assert path.put_if(b"old", "1") is None and path.put_if(b"new", versions[0])


def test_a_new_folder_is_refused_until_it_is_complete_and_cleared_after_a_failure(bucket, remote):
  folder = at("new/weights")
  with leases.new_folder(folder):
    for name in ("llm_config.json", "vit_config.json"):
      (folder / name).write_bytes((remote / name).read_bytes())
    with pytest.raises(CheckpointError, match="not complete: the command that writes it"):
      weights.read_config(folder)
    with pytest.raises(runs.Held), leases.new_folder(folder):
      pytest.fail("was let in")
  with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
    leases.check_new(folder)
  with pytest.raises(KeyError), leases.new_folder(at("new/failed")) as failed:
    (failed / "a").write_bytes(b"half")
    raise KeyError
  (at("new/killed") / leases.UNFINISHED).write_bytes(
      bucket_server.dead_holder())
  (at("new/killed") / "left").write_bytes(b"")
  with leases.new_folder(at("new/killed")) as again:
    (again / "whole").write_bytes(b"")
  assert bucket.names("new/") == ["new/killed/whole", "new/weights/llm_config.json",
                                  "new/weights/vit_config.json"]


# --- checkpoints


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "data": 2}, None])
def test_published_weights_are_read_by_ranges_each_byte_once(bucket, local, remote, shape):
  mesh = shape and sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | shape)
  place = mesh and (lambda tree: sharding.parameter_shardings(tree, mesh))
  weights.read_config(remote)
  bucket.read.clear()
  found = weights.load_checkpoint(remote, shardings_fn=place)
  assert found[0] == weights.read_config(local)
  assert same(found[1], weights.load_checkpoint(local, shardings_fn=place)[1])
  for name in ("ema", "ae"):
    size = (local / f"{name}.safetensors").stat().st_size
    headers = 3 * 2**16  # read for the configuration, too
    assert size - 200_000 < bucket.read[f"weights/{name}.safetensors"] < size + headers
  assert weights.fingerprint(remote) == weights.fingerprint(local)


def test_large_tensors_are_read_in_pieces_and_memory_holds_few_of_them(bucket, remote, monkeypatch):
  monkeypatch.setattr(ranges, "CHUNK", 20_000)
  asked = []
  read = type(remote).read_range
  monkeypatch.setattr(type(remote), "read_range",
                      lambda self, a, b: asked.append(b - a) or read(self, a, b))
  weights.load_checkpoint(remote, part="vae")
  assert len(asked) > 150 and max(asked[2:]) <= 40_000


@pytest.mark.parametrize("fault, message", [
    ("short", "not a complete safetensors file"), ("header", "not a complete safetensors file"),
    ("missing", "no such file"), ("denied", "access denied"), ("shrunk", "shorter")])
def test_a_damaged_checkpoint_in_a_bucket_is_named(bucket, local, remote, fault, message):
  folder = at(f"damaged/{fault}")
  for path in local.iterdir():
    (folder / path.name).write_bytes(path.read_bytes())
  weights_file = folder / "ae.safetensors"
  data = weights_file.read_bytes()
  rule = lambda *_: None
  if fault == "short":
    weights_file.write_bytes(data[:-1])
  elif fault == "header":
    weights_file.write_bytes(data.replace(b'"data_offsets":[0,', b'"data_offsets":[1,'))
  elif fault == "missing":
    weights_file.unlink()
  elif fault == "denied":
    rule = lambda method, name: 403 if name.endswith("ae.safetensors") else None
  else:  # between header and data
    def rule(method, name):
      if bucket.read[name] > 1000 and name == "damaged/shrunk/ae.safetensors":
        bucket._storage.create_file("bucket", name, data[:2000], bucket._storage.get_file_obj(
            "bucket", name))
  with broken(bucket, rule), pytest.raises((CheckpointError, OSError)) as caught:
    weights.load_checkpoint(folder)
  text = messages.message(caught.value)
  assert message in text and f"gs://bucket/damaged/{fault}/ae.safetensors" in text


def test_weights_are_converted_within_a_bucket_bit_for_bit(bucket, local, remote, capsys):
  assert commands.main(["convert", str(remote), str(at("orbax")), "--to", "orbax"]) == 0
  assert commands.main(["convert", str(at("orbax")), str(at("back")), "--to", "published"]) == 0
  for name in ("ema.safetensors", "ae.safetensors", "tokenizer.json"):
    assert bucket.content(f"back/{name}") == (local / name).read_bytes()
  assert commands.main(["convert", str(remote), str(at("back")), "--to", "orbax"]) == 2
  assert "gs://bucket/back: exists and is not an empty folder" in capsys.readouterr().err
  assert not [n for n in bucket.names() if leases.UNFINISHED in n or "probe" in n]


# --- generate


SMALL = ("--size", "32", "--steps", "3", "--rounds", "1", "--think-limit", "4")


def test_generate_reads_and_writes_buckets_and_goes_on_with_the_same_bytes(
    bucket, local, remote, tmp_path, capsys, on_one_device):
  at("texts/prompts.txt").write_bytes(b"a fox\r\na cat\n")
  at("texts/system.txt").write_bytes(b"Think.")
  (tmp_path / "prompts.txt").write_bytes(b"a fox\r\na cat\n")
  ask = ["generate", "--prompts-file", str(at("texts/prompts.txt")), "--checkpoint", str(remote),
         "--system-prompt-file", str(at("texts/system.txt")), "--out", str(at("made")), *SMALL]
  written = []
  with broken(bucket, lambda method, name: written.append(name) if method == "POST" else None):
    assert commands.main(ask) == 0
  for number in ("001", "002"):
    order = [name.rpartition("/")[2] for name in written if name.startswith(f"made/{number}/")]
    assert order[-1] == "trace.json" and "round1.png" in order
  names = bucket.names("made")
  assert names == ["made/001/round1.png", "made/001/trace.html", "made/001/trace.json",
                   "made/002/round1.png", "made/002/trace.html", "made/002/trace.json",
                   "made/index.html"]
  before = {name: bucket.content(name) for name in names}
  at("made/002/trace.json").unlink()  # as if killed before it
  assert commands.main(ask) == 0
  assert {n: bucket.content(n) for n in names if n.endswith("png")} == {
      n: data for n, data in before.items() if n.endswith("png")}
  here = [str(local) if x == str(remote) else x for x in ask]
  here[here.index("--out") + 1] = str(tmp_path / "out")
  assert commands.main(here) == 0
  assert (tmp_path / "out" / "002" / "round1.png").read_bytes() == before["made/002/round1.png"]
  assert not list(storage.cache_folder("scratch").glob("*"))


def test_generate_edits_an_image_in_a_bucket_and_names_one_that_is_missing(bucket, remote, capsys):
  assert commands.main(["generate", "x", "--checkpoint", str(remote), "--image",
                        str(at("no.png"))]) == 2
  assert "--image gs://bucket/no.png: no such file" in capsys.readouterr().err
  assert commands.main(["generate", "x", "--checkpoint", str(remote), "--out",
                        "gs://elsewhere/x"]) == 2
  assert "cannot write into gs://elsewhere/x: no such object, or no such bucket" in (
      capsys.readouterr().err)


def test_a_local_command_never_imports_what_buckets_need():
  code = ("import sys; from irg_jax import commands, storage, weights\n"
          "weights.read_config(storage.SHIPPED)\n"
          "assert not {'gcsfs', 's3fs', 'aiohttp', 'irg_jax.buckets'} & set(sys.modules)")
  subprocess.run([sys.executable, "-c", code], check=True)
