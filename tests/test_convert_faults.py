"""Kills, leftovers of killed commands, full disks: nothing is half-written, a rerun works."""

import errno
import fcntl
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from conftest import ROOT
from test_weights import CONFIG
from irg_jax import commands, runs, storage, weights
from irg_jax.weights import init

LEFT = (".0123abcd.partial", ".irg-abc_1234", ".x.partial-1", ".weights.partial-17")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
  folder = tmp_path_factory.mktemp("source") / "in"
  init.write_random_checkpoint(folder, CONFIG, seed=0)
  return folder


def content(folder):
  return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def leave(folder):
  """Makes the leftovers of killed commands, of this and earlier versions."""
  for name in LEFT:
    (folder / name / "below").mkdir(parents=True)
    (folder / name / "below" / "file").write_text("half")
  (folder / ".fedcba98.partial").write_text("half a fi")


@pytest.mark.parametrize("verb", ["convert", "init"])
@pytest.mark.parametrize("where", ["beside", "inside"])
def test_what_killed_commands_left_neither_blocks_nor_stays(source, tmp_path, verb, where):
  out = tmp_path / "a" / "out"
  out.mkdir(parents=True)
  leave(out if where == "inside" else out.parent)
  (out.parent / ".mine.partial").write_text("of a user")
  arguments = {"convert": [source, out, "--to", "published"],
               "init": ["--config", ROOT / "configs" / "tiny.py", "--out", out]}[verb]
  assert commands.main([verb, *map(str, arguments)]) == 0
  assert sorted(p.name for p in out.parent.iterdir()) == [".mine.partial", "out"]
  assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_what_a_living_process_writes_is_left_alone(tmp_path):
  with storage.atomic_file(tmp_path / "a") as file, storage.scratch_folder(tmp_path) as folder:
    file.write_text("half")
    storage.remove_partials(tmp_path)
    storage.check_output_folder(tmp_path)
    assert file.exists() and folder.exists()
    script = f"from irg_jax import storage; storage.remove_partials({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
    assert file.exists() and folder.exists()
  assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_file_system_without_locks_loses_no_file(tmp_path, monkeypatch):
  def no_locks(*_):
    raise OSError(errno.ENOTSUP, "no locks")
  monkeypatch.setattr(fcntl, "flock", no_locks)
  leave(tmp_path)
  before = content(tmp_path)
  storage.remove_partials(tmp_path)
  assert content(tmp_path) == before
  storage.write_json(tmp_path / "a", {})
  with storage.atomic_folder(tmp_path / "b") as partial:
    (partial / "x").write_text("x")
  assert (tmp_path / "a").read_text() == "{}\n" and content(tmp_path / "b") == {"x": b"x"}


def test_a_record_is_created_once_and_leaves_nothing(tmp_path):
  runs.create(tmp_path / "run.json", {"a": 1})
  runs.create(tmp_path / "run.json", {"a": 2})
  assert runs.read(tmp_path / "run.json") == {"a": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


# Converts in forked children of one process, which has imported JAX but not started it. A child's
# alarm ends it as a kill does: without any cleaning up.
FORKS = textwrap.dedent("""
    import os, random, shutil, signal, sys, time
    from irg_jax import weights
    source, out, seed, kills = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    def child(destination, seconds=0):
      pid = os.fork()
      if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        weights.convert(source, destination, to="published")
        os._exit(0)
      return os.waitpid(pid, 0)[1]
    start = time.monotonic()
    assert child(out + "/whole") == 0
    took = time.monotonic() - start
    rng = random.Random(seed)
    for i in range(kills):
      while (status := child(f"{out}/killed{i}", took * rng.uniform(0.1, 1))) == 0:
        took *= 0.9  # it ended before it was killed
        shutil.rmtree(f"{out}/killed{i}")
      print(status, flush=True)
      if not os.path.exists(f"{out}/killed{i}"):
        assert child(f"{out}/killed{i}") == 0
    """)


def check_forks(source, out, seed, kills):
  said = subprocess.run([sys.executable, "-c", FORKS, source, out, str(seed), str(kills)],
                        check=True, cwd=ROOT, capture_output=True, text=True).stdout
  lines = said.splitlines()
  assert lines == [str(int(signal.SIGALRM))] * kills
  want = content(out / "whole")
  assert set(want) == set(content(source))
  for i in range(kills):
    assert content(out / f"killed{i}") == want
  # Only complete folders are left: the reruns removed what the kills left.
  assert sorted(p.name for p in out.iterdir()) == [*(f"killed{i}" for i in range(kills)), "whole"]


def test_conversions_killed_at_random_moments_leave_nothing_half(source, tmp_path):
  check_forks(source, tmp_path, seed=0, kills=3)


@pytest.mark.long
@pytest.mark.parametrize("to", ["published", "orbax"])
def test_ten_commands_killed_at_random_moments(source, tmp_path, to):
  """`irg convert` as a user runs it, with SIGKILL."""
  rng, out = random.Random(to), tmp_path / "out"
  run = [sys.executable, "-m", "irg_jax", "convert", source, out, "--to", to]
  back = tmp_path / "back"

  def check_whole():
    weights.convert(out, back, to="published")
    got, want = content(back), content(source)
    assert got == want
    subprocess.run(["rm", "-r", out, back], check=True)

  start = time.monotonic()
  subprocess.run(run, check=True, cwd=ROOT)
  took = time.monotonic() - start
  check_whole()
  for _ in range(10):
    process = subprocess.Popen(run, cwd=ROOT, stderr=subprocess.DEVNULL)
    time.sleep(took * rng.uniform(0.3, 1.05))
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not out.exists():
      assert all(storage.is_partial(p.name) for p in tmp_path.iterdir())
      subprocess.run(run, check=True, cwd=ROOT)
    check_whole()
  assert not list(tmp_path.iterdir())


# Files may have 30,000 bytes, fewer than the weights: each writer fails as on a full disk.
FULL = textwrap.dedent("""
    import resource, sys
    from irg_jax import commands
    source, out, config = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, resource.RLIM_INFINITY))
    for arguments in (["init", "--config", config, "--out", out + "/a b"],
                      ["convert", source, out + "/a b", "--to", "published"],
                      ["convert", source, out + "/a b", "--to", "orbax"]):
      print(arguments[0], file=sys.stderr)
      assert commands.main(arguments) == 2
    """)


def test_a_full_disk_is_named_in_one_line_and_nothing_stays(source, tmp_path):
  (tmp_path / "o").mkdir()
  said = subprocess.run([sys.executable, "-c", FULL, source, tmp_path / "o",
                         ROOT / "configs" / "tiny.py"], cwd=ROOT, capture_output=True, text=True)
  assert said.returncode == 0, said.stderr
  lines = [line for line in said.stderr.splitlines() if not line.startswith(("init", "convert"))]
  assert len(lines) == 3, said.stderr
  for line in lines:
    assert "error: " in line and str(tmp_path / "o" / "a b") in line and "large" in line, line
  assert not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
def test_writers_name_the_target_where_the_system_does_not(tmp_path, number):
  for write, target in (
      (storage.atomic_file, tmp_path / "a"), (storage.atomic_folder, tmp_path / "b"),
      (storage.atomic_files, tmp_path)):
    with pytest.raises(OSError) as caught, write(target):
      raise OSError(number, os.strerror(number))
    assert caught.value.filename == str(target) and caught.value.errno == number
  assert not list(tmp_path.iterdir())
