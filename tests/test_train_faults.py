"""Training gives the same run when it is killed, moved to another mesh or split over processes."""

import errno
import filecmp
import json
import os
import pathlib
import re
import shutil
import signal
import threading
import time
import types

import numpy as np
import pytest
import train_runs
from train_runs import cache, data

from irg_jax import commands, runs, weights
from irg_jax.train import checkpoints
from irg_jax.train import run as train_run
from irg_jax.weights.lora import LoraSettings
from irg_jax.weights.names import flatten

PAIR = {"fsdp": 2, "tensor": 2}  # two devices in each of two processes
WORKER = pathlib.Path(__file__).with_name("train_worker.py")


@pytest.fixture(scope="module")
def whole(data, cache, tmp_path_factory):
  """The folder of a run of stage 1 that was never interrupted."""
  out = tmp_path_factory.mktemp("whole") / "out"
  assert commands.main(train_runs.flags(data, out, train_runs.MESH, run_stages="stage1")) == 0
  return out


def test_every_step_is_logged_once_with_its_samples(whole):
  steps = train_runs.steps(whole)
  assert list(steps) == [("stage1", i) for i in (1, 2, 3, 4)]
  for line in steps.values():
    assert np.isfinite([line["loss"], line["ce"], line["mse"], line["grad_norm"]]).all()
    assert line["samples"] and all(mode in (2, 5) and 0 <= i < train_runs.ROWS
                                   for mode, i in line["samples"])
    assert "ce/initial_thinking_generation_learning" not in line  # it had no target
  assert steps["stage1", 4]["tokens_per_second"] > 0
  assert "memory/host_peak_gib" in steps["stage1", 4]
  rejected = [line["rejected"] for line in train_runs.lines(whole) if "rejected" in line]
  assert rejected[0] == {mode: {"bad_json": 1} for mode in train_runs.MODES}


def test_curves_are_written_for_tensorboard(whole):
  events, = (whole / "tensorboard" / "stage1").iterdir()
  content = events.read_bytes()
  for name in (b"loss", b"mse/improving_full_learning", b"packing/und", b"tokens/latent"):
    assert name in content


def test_the_exported_weights_have_the_tokenizer_and_are_the_last_average(whole):
  exported = whole / "stage1" / "weights"
  assert filecmp.cmp(exported / "tokenizer.json", whole / "base" / "tokenizer.json", False)
  _, params = weights.load_checkpoint(exported)
  kept = json.loads((whole / "stage1" / "checkpoints" / "4" / "run" / "metadata").read_text())
  sums = checkpoints.checksums({"ema": params["transformer"]})
  assert sums == {name: x for name, x in kept["sums"].items() if name.startswith("ema/")}
  _, base = weights.load_checkpoint(whole / "base")
  moved = [name for name, x in flatten(base["transformer"]).items()
           if not np.array_equal(x, flatten(params["transformer"])[name])]
  assert len(moved) > 20


@pytest.mark.long
def test_a_run_killed_while_it_saves_ends_bit_for_bit_like_one_never_killed(
    whole, data, cache, tmp_path, capsys):
  out = tmp_path / "out"
  flags = lambda workers: train_runs.flags(
      data, out, train_runs.MESH, run_stages="stage1", data__workers=workers)
  first = train_runs.process(flags(1), cache, devices=8)
  saving = out / "stage1" / "checkpoints"
  while first.poll() is None and not list(saving.glob("4.orbax-checkpoint-tmp*")):
    time.sleep(0.001)
  first.send_signal(signal.SIGKILL)
  text, _ = first.communicate(timeout=60)  # reads until its worker has ended, too
  assert first.returncode == -signal.SIGKILL, text
  assert checkpoints.steps_in(saving) == [2]
  capsys.readouterr()
  assert commands.main(flags(0)) == 0
  assert f"from step 2 of {saving}" in "".join(capsys.readouterr())
  assert train_runs.samples(out) == train_runs.samples(whole)
  for folder in (out, whole):
    assert filecmp.cmp(folder / "stage1" / "weights" / "ema.safetensors",
                       whole / "stage1" / "weights" / "ema.safetensors", shallow=False)
  assert state_sums(out) == state_sums(whole)


def test_a_save_that_fails_ends_the_run_with_the_cause_and_the_last_good_checkpoint(
    whole, data, cache, tmp_path, capsys, monkeypatch):
  out, make = tmp_path / "out", os.mkdir

  def full(path, *args, **kwargs):
    if "checkpoints/4." in str(path):
      raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return make(path, *args, **kwargs)

  monkeypatch.setattr(os, "mkdir", full)
  flags = train_runs.flags(data, out, train_runs.MESH, run_stages="stage1")
  assert commands.main(flags) == 2
  for thread in threading.enumerate():  # none that the end of the process would wait for
    if not (thread.daemon or thread is threading.main_thread()
            or re.match("asyncio_|metadata_store|ThreadPool", thread.name)):  # idle pools
      thread.join(5)
      assert not thread.is_alive(), thread
  lines, checkpoint = capsys.readouterr().err.splitlines(), out / "stage1" / "checkpoints"
  assert len(lines) < 15 and "Traceback" not in "".join(lines)
  assert lines[-1].startswith("irg train: error: checkpoint of step 4 cannot be saved (")
  assert f"{checkpoint}/4.orbax-checkpoint-tmp: No space left on device" in lines[-1]
  assert lines[-1].endswith(f"the last good checkpoint is {checkpoint / '2'}")


def test_an_export_that_fails_names_the_full_path_and_where_the_trained_state_is(
    tmp_path, monkeypatch):
  path = tmp_path / "stage1" / "weights" / "ema.safetensors"

  def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", str(path))

  monkeypatch.setattr(train_run.published, "save", full)
  run = types.SimpleNamespace(out=tmp_path, vae=None, base=None,
                              settings=types.SimpleNamespace(model=None, lora=LoraSettings()))
  with pytest.raises(ValueError) as caught:
    train_run.export(run, "stage1", None)
  assert str(caught.value).startswith(f"{path}: No space left on device")
  assert f"{tmp_path / 'stage1' / 'checkpoints'}, and the same command exports it" in str(
      caught.value)


def test_a_second_run_in_the_same_folder_is_refused_and_changes_nothing(data, tmp_path, capsys):
  for name in ("new", "old"):
    out = tmp_path / name
    if name == "old":
      (out / "stage1").mkdir(parents=True)
      (out / "run.json").write_text("{}")
    with runs.locked(out / ".lock", "x"):
      before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
      assert commands.main(train_runs.flags(data, out, train_runs.MESH)) == 2
      assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    error = capsys.readouterr().err
    assert f"--out {out}: another irg train is at work in it: process {os.getpid()} on" in error


def state_sums(out, step=4):
  return json.loads((out / "stage1" / "checkpoints" / str(step) / "run" / "metadata").read_text())[
      "sums"]


@pytest.mark.long
def test_two_processes_continue_the_run_of_one_and_each_reads_its_own_records(
    whole, data, cache, tmp_path):
  # One process on another mesh wrote the checkpoint.
  out = tmp_path / "out"
  shutil.copytree(whole, out)
  shutil.rmtree(out / "stage1" / "weights")
  newest = out / "stage1" / "checkpoints" / "4"
  (newest / "run" / "metadata").write_text("{")
  flags = train_runs.flags(data, out, PAIR, run_stages="stage1")
  texts = []
  for worker in train_runs.two_processes(
      flags, cache, devices=2,
      programs=[(str(WORKER), str(tmp_path / f"{i}.json")) for i in range(2)]):
    texts.append(worker.communicate(timeout=300)[0])
    assert worker.returncode == 0, texts[-1]
  assert f"{newest} is damaged" in texts[0] and "step 2 is used" in texts[0]
  assert "damaged" not in texts[1]  # only the first process reports it
  parts, uncut = train_runs.steps(out), train_runs.steps(whole)
  assert parts.keys() == uncut.keys()
  for place, line in uncut.items():
    assert parts[place]["samples"] == line["samples"]
    for name in ("loss", "ce", "mse", "grad_norm"):
      np.testing.assert_allclose(parts[place][name], line[name], rtol=1e-5)
  check_reports([json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2)])
  assert checkpoints.steps_in(out / "stage1" / "checkpoints") == [2, 4]
  _, written = weights.load_checkpoint(out / "stage1" / "weights")
  _, expected = weights.load_checkpoint(whole / "stage1" / "weights")
  for name, x in flatten(expected).items():
    np.testing.assert_allclose(flatten(written)[name], x, atol=1e-4, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("mesh, attention", [
    ({"data": 2, "fsdp": 2, "tensor": 2}, "kernel"), ({"slice": 2, "fsdp": 2, "tensor": 2}, "auto")])
def test_two_processes_with_kernels_or_slices_make_the_losses_of_one(
    whole, data, cache, tmp_path, mesh, attention):
  out = tmp_path / "out"
  flags = train_runs.flags(data, out, mesh, run_stages="stage1", model__attention=attention)
  for worker in train_runs.two_processes(flags, cache):
    text, _ = worker.communicate(timeout=500)
    assert worker.returncode == 0, text
  got, uncut = train_runs.steps(out), train_runs.steps(whole)
  assert got.keys() == uncut.keys()
  for place, line in uncut.items():
    assert got[place]["samples"] == line["samples"]
    np.testing.assert_allclose(got[place]["loss"], line["loss"], rtol=1e-5)


def check_reports(reports):
  """Checks the reports of the two processes, see train_worker.py."""
  for process, report in enumerate(reports):
    assert report["kernels split"] == report["kernels"] > 10
    assert not report["not as declared"]
    for mode, records in report["read"].items():
      # There are four streams, one for each row, and two rows in each process.
      assert records and {i % 4 // 2 for i in records} == {process}, mode


UNREADABLE = """
import sys
from irg_jax import commands
from irg_jax.data import parquet
from irg_jax.train import run

def fail(source, i):
  raise ValueError(f"record {i} cannot be read")

def fail_from_now_on(*args, check_data=run.check_data):
  found = check_data(*args)
  parquet.PublishedSource.__getitem__ = fail
  return found

run.check_data = fail_from_now_on
sys.exit(commands.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_record_that_one_process_cannot_read_ends_both_with_a_message(
    whole, data, cache, tmp_path):
  out = tmp_path / "out"
  shutil.copytree(whole, out)
  shutil.rmtree(out / "stage1" / "weights")
  shutil.rmtree(out / "stage1" / "checkpoints" / "4")
  flags = train_runs.flags(data, out, PAIR, run_stages="stage1")
  first, second = train_runs.two_processes(
      flags, cache, devices=2, programs=[("-m", "irg_jax"), ("-c", UNREADABLE)])
  text, _ = second.communicate(timeout=300)
  assert second.returncode == 2, text
  error = text[text.index("irg train: error: record"):].strip()
  assert f"the last good checkpoint is {out / 'stage1' / 'checkpoints' / '2'}" in error
  text, _ = first.communicate(timeout=300)
  assert first.returncode == 2, text
  assert error.replace("error: ", "error: process 1 has stopped: ", 1) in text
