"""Repeated kills, changing meshes, several processes: `pytest -m long tests/test_train_long.py`."""

import filecmp
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import train_runs
from train_runs import cache, data

from irg_jax import runs
from irg_jax.train.checkpoints import steps_in

pytestmark = pytest.mark.long

STEPS = 20
SMALL = {"stage1__steps": STEPS, "stage2__steps": 4, "log_every": 5}
OTHER_MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2})


@pytest.fixture(scope="module")
def uncut(data, cache, tmp_path_factory):
  """The folder of a run of both stages that was never killed."""
  out = tmp_path_factory.mktemp("uncut") / "out"
  assert finish(data, out, cache, train_runs.MESH) == 0
  return out


def start(data, out, cache, mesh):
  return train_runs.process(train_runs.flags(data, out, mesh, **SMALL), cache, devices=8)


def finish(data, out, cache, mesh) -> int:
  running = start(data, out, cache, mesh)
  text, _ = running.communicate()
  print(text)
  return running.returncode


def made(out) -> int:
  """Number of steps in the log."""
  log = out / "log.jsonl"
  return log.read_bytes().count(b'"loss"') if log.exists() else 0


def saving(out) -> bool:
  return any(out.glob("*/checkpoints/*.orbax-checkpoint-tmp*"))


def kill_in(data, out, cache, mesh, due) -> bool:
  """Starts the run and kills it as soon as `due()`. Returns False if it ended before."""
  running = start(data, out, cache, mesh)
  while running.poll() is None and not due():
    time.sleep(0.0005)
  running.kill()
  text, _ = running.communicate()
  assert running.returncode in (0, -signal.SIGKILL), text
  return running.returncode != 0


def kill_often(data, out, cache, meshes, kills):
  """Kills a run `kills` times, every other time while it saves. Returns (kills, during saves)."""
  rng, during_saves, count = random.Random(0), 0, 0
  while count < kills:
    mesh = meshes[count % len(meshes)]
    first = sum(max(steps_in(out / s / "checkpoints"), default=0) for s in ("stage1", "stage2"))
    if count % 2:
      due = lambda: saving(out)
    else:
      wanted = first + rng.randint(1, 3)
      delay = rng.random() / 10
      due = lambda: made(out) >= wanted and time.sleep(delay) is None
    if not kill_in(data, out, cache, mesh, due):
      break
    count += 1
    during_saves += saving(out)
  return count, during_saves


def assert_same_numbers(out, uncut):
  parts, whole = train_runs.steps(out), train_runs.steps(uncut)
  assert parts.keys() == whole.keys()
  for place, line in whole.items():
    assert parts[place]["samples"] == line["samples"], place
    np.testing.assert_allclose(parts[place]["loss"], line["loss"], rtol=1e-5, err_msg=str(place))


def test_ten_kills_leave_no_trace(uncut, data, cache, tmp_path):
  out = tmp_path / "out"
  count, during_saves = kill_often(data, out, cache, [train_runs.MESH], 10)
  assert count == 10 and during_saves >= 3
  assert finish(data, out, cache, train_runs.MESH) == 0
  assert train_runs.samples(out) == train_runs.samples(uncut)
  for stage in ("stage1", "stage2"):
    for name in ("ema.safetensors", "ae.safetensors"):
      assert filecmp.cmp(out / stage / "weights" / name, uncut / stage / "weights" / name, False)
    last = str(steps_in(uncut / stage / "checkpoints")[-1])
    run = lambda folder: (folder / stage / "checkpoints" / last / "run" / "metadata").read_text()
    assert run(out) == run(uncut)  # data state and checksums of the training state


def test_kills_between_other_meshes_keep_samples_and_losses(uncut, data, cache, tmp_path):
  out = tmp_path / "out"
  kill_often(data, out, cache, OTHER_MESHES, 4)
  assert finish(data, out, cache, OTHER_MESHES[0]) == 0
  assert_same_numbers(out, uncut)


def test_two_processes_stop_together_and_continue(uncut, data, cache, tmp_path):
  out = tmp_path / "out"
  flags = train_runs.flags(data, out, {"data": 2, "fsdp": 2, "tensor": 2}, **SMALL)

  def start_both():
    return train_runs.two_processes(flags, cache)

  def end(workers, status):
    for worker in workers:
      text, _ = worker.communicate(timeout=400)
      print(text)
      assert worker.returncode == status, text

  def wait_for(steps, workers):
    while made(out) < steps and all(w.poll() is None for w in workers):
      time.sleep(0.01)

  workers = start_both()
  wait_for(3, workers)
  workers[1].terminate()  # SIGTERM to one stops both
  end(workers, 128 + signal.SIGTERM)
  stopped = steps_in(out / "stage1" / "checkpoints")[-1]
  assert stopped >= 3
  workers = start_both()
  wait_for(stopped + 3, workers)
  workers[1].kill()
  workers[1].communicate()
  workers[0].kill()  # it would end by itself once heartbeats fail
  workers[0].communicate()
  end(start_both(), 0)
  assert_same_numbers(out, uncut)


def test_two_processes_end_together_where_the_folder_is_in_use(data, cache, tmp_path):
  flags = train_runs.flags(data, tmp_path / "out", {"data": 2, "fsdp": 2, "tensor": 2}, **SMALL)
  with runs.locked(tmp_path / "out" / ".lock", "x"):
    for worker in train_runs.two_processes(flags, cache):
      text, _ = worker.communicate(timeout=100)
      assert worker.returncode == 2 and f"in it: process {os.getpid()} on " in text, text


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_on_a_full_disk_a_run_ends_in_seconds_with_one_line_and_goes_on_when_there_is_space(
    data, cache, tmp_path, size):
  # A file system in memory for the process alone; its folder goes with it.
  flags = train_runs.flags(data, tmp_path / "disk" / "out", train_runs.MESH, run_stages="stage1")
  (tmp_path / "disk").mkdir()
  disk = f"mount -t tmpfs -o size={size}000k tmpfs {tmp_path / 'disk'}"
  again = f"mount -o remount,size=20m {tmp_path / 'disk'}"
  if subprocess.run(["unshare", "-Urm", "sh", "-c", f"{disk} && {again}"]).returncode:
    pytest.skip("no file systems of one's own on this machine")
  code = ("import subprocess, sys; run = [sys.executable, '-m', 'irg_jax', *sys.argv[3:]]; "
          "mount = lambda text: subprocess.run(text.split(), check=True); "
          "mount(sys.argv[1]); print('status', subprocess.run(run).returncode, flush=True); "
          "mount(sys.argv[2]); sys.exit(subprocess.run(run).returncode)")
  running = subprocess.Popen(
      ["unshare", "-Urm", sys.executable, "-u", "-c", code, disk, again, *flags],
      env=train_runs.environment(cache, devices=8), stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True)
  lines, failed = [], None
  for line in running.stdout:
    lines.append(line)
    if "irg train: error: " in line:
      failed = time.monotonic()
    if line == "status 2\n":
      assert time.monotonic() - failed < 5
      assert "No space left on device" in lines[-2] and str(tmp_path / "disk") in lines[-2]
      assert len(lines) < 20, lines
  assert running.wait() == 0 and (failed or "status 0\n" in lines), lines
