"""Buckets of s3://: objects, locks, faults and a training run, against moto on loopback.

  pip install 'irg_jax[s3]' 'moto[server]'

The rules are those of gs://, which tests/test_buckets.py and its neighbours check in detail.
"""

import functools
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import test_judging
import train_runs
from judge_server import JudgeServer
from test_bucket_train import WEIGHTS
from train_runs import cache, data

from irg_jax import commands, leases, messages, runs, storage
from irg_jax.evaluate import score

pytest.importorskip("s3fs", reason="no s3fs: pip install 'irg_jax[s3]'")
apps = pytest.importorskip("moto.server", reason="no S3 on loopback: pip install 'moto[server]'")
serving = pytest.importorskip("werkzeug.serving")


class Server:
  """S3 on loopback; `fault(method, path)` gives the status of a refusal, or None."""

  def __init__(self):
    self.fault, self._app = lambda *_: None, apps.DomainDispatcherApplication(
        apps.create_backend_app)
    self._server = serving.make_server("127.0.0.1", 0, self._answer, threaded=True)
    self.url = f"http://127.0.0.1:{self._server.server_port}"
    threading.Thread(target=self._server.serve_forever, daemon=True).start()

  def _answer(self, environ, start):
    if status := self.fault(environ["REQUEST_METHOD"], environ["PATH_INFO"]):
      environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
      start(f"{status} fault", [("Content-Length", "0")])
      return [b""]
    return self._app(environ, start)

  def close(self):
    self._server.shutdown()
    self._server.server_close()


@pytest.fixture(scope="module")
def server():
  found = Server()
  with pytest.MonkeyPatch.context() as patch:
    for name, value in {"AWS_ENDPOINT_URL": found.url, "AWS_ACCESS_KEY_ID": "a",
                        "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}.items():
      patch.setenv(name, value)
    at("").fs.call_s3("create_bucket", Bucket="bucket")
    yield found
  found.close()


def at(name):
  return storage.path(f"s3://bucket/{name}")


@pytest.fixture
def faults(server):
  yield functools.partial(setattr, server, "fault")
  server.fault = lambda *_: None


def test_objects_are_written_read_listed_and_removed(server):
  content = os.urandom(3_000_000)
  at("a/b/x").write_bytes(content)
  at("a/y").write_text("text")
  assert at("a/b/x").read_range(5, 2_900_000) == content[5:2_900_000]
  assert sorted(p.name for p in at("a").iterdir()) == ["b", "y"]
  assert [p.name for p in at("a").rglob("x")] == ["x"]
  with pytest.raises(OSError, match="object is shorter"):
    at("a/y").read_range(0, 9)
  at("a").rmtree()
  assert not at("a").exists()


def test_a_write_succeeds_only_on_the_version_that_was_seen(server):
  first = at("v").put_if(b"1", None)
  assert first and at("v").put_if(b"2", None) is None
  assert at("v").put_if(b"3", first) and at("v").put_if(b"4", first) is None
  assert at("v").look().content == b"3"


def test_a_lock_has_one_holder(server):
  with runs.locked(at("run/.lock"), "busy"), pytest.raises(leases.Held, match="busy"):
    with runs.locked(at("run/.lock"), "busy"):
      pytest.fail("was let in twice")
  assert not at("run").exists()


@pytest.mark.parametrize("status", [503, 429, 500])
def test_a_fault_of_the_store_is_asked_again(faults, status):
  left = iter([status] * 2)
  faults(lambda *_: next(left, None))
  at("again").write_bytes(b"123")
  assert next(left, None) is None  # both faults were met
  left = iter([status] * 2)
  assert at("again").read_bytes() == b"123" and list(at("").glob("again"))


@pytest.mark.parametrize("status, error, message", [
    (403, PermissionError, "access denied by the store"), (400, OSError, "the store refuses"),
    (404, FileNotFoundError, "no such object")])
def test_denied_and_missing_objects_are_one_error_that_names_them(faults, status, error, message):
  faults(lambda *_: status)
  for action in (at("x/y").read_bytes, lambda: at("x/y").write_bytes(b"")):
    with pytest.raises(error) as caught:
      action()
    assert f"s3://bucket/x/y: {message}" in messages.message(caught.value)


def test_a_store_that_is_away_ends_in_an_error_that_names_the_object(faults, monkeypatch):
  monkeypatch.setattr(sys.modules["irg_jax.stores"], "PATIENCE", 1.0)
  faults(lambda *_: 503)
  for action in (lambda: at("x").write_bytes(b""), at("x").read_bytes,
                 lambda: list(at("x").iterdir())):
    with pytest.raises(OSError) as caught:
      action()
    assert "s3://bucket/x: the store did not answer" in messages.message(caught.value)


def test_an_endpoint_that_cannot_be_reached_is_asked_again_and_named(server):
  code = "from irg_jax import storage; storage.path('s3://bucket/x').read_bytes()"
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ
                        | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "IRG_BUCKET_PATIENCE": "1"})
  assert "did not answer for" in done.stderr and "'s3://bucket/x'" in done.stderr


def test_scores_and_paid_answers_in_a_bucket_are_those_of_disk(server, tmp_path):
  test_judging.make_wise(tmp_path)
  for path in filter(pathlib.Path.is_file, (tmp_path / "images").rglob("*")):
    at(f"wise/{path.relative_to(tmp_path / 'images').as_posix()}").upload(path)
  with JudgeServer(test_judging.answer) as endpoint:
    asked = []
    for out in (tmp_path / "images", at("wise"), at("wise")):
      assert commands.main(["eval", "score", "wise", "--out", str(out), "--prompts", str(
          tmp_path / "wise.json"), "--judge-url", endpoint.url, "--judge-model", "m"]) == 0
      asked.append(len(endpoint.bodies))
  assert asked[1:] == [2 * asked[0]] * 2  # the last one paid for nothing
  for name in (score.SCORES, score.ITEMS):
    here, there = (path.read_text() for path in (tmp_path / "images" / name, at(f"wise/{name}")))
    assert there.replace("s3://bucket/wise", str(tmp_path / "images")) == here


@pytest.mark.long
def test_a_training_run_ends_in_the_bytes_of_a_local_one(server, faults, data, cache, tmp_path):
  train = lambda out: commands.main(
      train_runs.flags(data, out, train_runs.MESH, run_stages="stage1"))
  assert train(tmp_path / "local") == 0
  away = lambda method, path: 503 if method == "PUT" and "checkpoints/4" in path else None
  faults(away)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sys.modules["irg_jax.stores"], "PATIENCE", 1.0)
    assert train("s3://bucket/run") == 2  # after the checkpoint of step 2
  faults(lambda *_: None)
  assert train("s3://bucket/run") == 0
  for file in (*(f"stage1/weights/{name}" for name in WEIGHTS),
               "stage1/checkpoints/4/run/metadata"):
    assert at(f"run/{file}").read_bytes() == (tmp_path / "local" / file).read_bytes(), file
  assert not [p for p in at("run").rglob("*") if p.name in (".lock", leases.UNFINISHED)]
