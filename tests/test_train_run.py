"""A training run around the train step: stages, logs, SIGTERM and resume, refused settings.

The train step itself is replaced by a trivial one.
"""

import dataclasses
import json
import os
import shutil
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_runs
from train_runs import cache, data

from irg_jax import commands, sharding, weights
from irg_jax.data import sources
from irg_jax.train import checkpoints, logs, watch
from irg_jax.train import run as train_run
from irg_jax.train.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("on_one_device")
METRICS = {"loss": 2.0, "ce": 1.0, "mse": 1.0, "grad_norm": 0.5, "learning_rate": 1e-3,
           "tokens/text": 100.0, "tokens/latent": 10.0, "tokens/vit": 10.0, "packing/und": 0.5,
           "packing/gen": 0.5, "packing/vit": 0.5, "packing/text": 0.5, "packing/pairs": 0.2,
           "packing/vit_pairs": 0.2}


def train(data, out, **fields) -> int:
  return commands.main(train_runs.flags(data, out, **fields))


@pytest.fixture(scope="module")
def trivial(cache):
  """Replaces the train step. Returns {step: function}, called for metrics that differ."""
  hooks = {}

  def make(model, optimizer, settings, mesh, state, batch):
    @jax.jit
    def update(state, latents):
      params = jax.tree.map(lambda x: x + 1e-3 * jnp.mean(latents), state.params)
      return dataclasses.replace(state, step=state.step + 1, params=params, ema=params)

    def step(switches, state, batch, key):
      metrics, number = {k: jnp.float32(v) for k, v in METRICS.items()}, int(state.step) + 1
      state = update(state, batch.latents)
      return state, metrics | hooks.get(number, lambda: {})()

    return step

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_run, "make_train_step", make)
    yield hooks


@pytest.fixture(scope="module")
def both(trivial, data, tmp_path_factory):
  """(folder of a finished run of both stages of trivial steps, first state of each stage)."""
  starts, first_state = {}, train_run.first_state

  def spy(run, kept, optimizer, params):
    found = first_state(run, kept, optimizer, params)
    starts[kept.folder.parent.name] = jax.tree.map(np.asarray, found[1])
    return found

  out = tmp_path_factory.mktemp("both") / "out"
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train_run, "first_state", spy)
    assert train(data, out) == 0
  return out, starts


@pytest.fixture
def copy(both, tmp_path):
  """A copy of the folder of `both`, which a test may damage."""
  shutil.copytree(both[0], tmp_path / "copy")
  return tmp_path / "copy"


def test_stage_two_starts_from_the_average_of_stage_one_with_a_fresh_optimizer(both):
  out, starts = both
  _, first = weights.load_checkpoint(out / "stage1" / "weights")
  state = starts["stage2"]
  for tree in (state.params, state.ema):
    jax.tree.map(np.testing.assert_array_equal, tree, first["transformer"])
  assert state.step == 0 and not any(x.any() for x in jax.tree.leaves(state.opt_state))


def test_steps_after_the_checkpoint_and_a_truncated_log_line_are_made_again(copy, data):
  whole = train_runs.samples(copy)
  shutil.rmtree(copy / "stage2" / "checkpoints" / "4")
  shutil.rmtree(copy / "stage2" / "weights")
  log = copy / "log.jsonl"
  log.write_bytes(log.read_bytes()[:-30])
  assert train(data, copy) == 0
  assert train_runs.samples(copy) == whole
  assert checkpoints.steps_in(copy / "stage2" / "checkpoints") == [2, 4]
  before = train_runs.steps(copy)
  assert train(data, copy) == 0  # finished already
  assert train_runs.steps(copy) == before


def test_a_log_that_cannot_be_written_is_named_with_the_last_good_checkpoint(copy, data, capsys):
  shutil.rmtree(copy / "stage2" / "checkpoints" / "4")
  (copy / "log.jsonl").unlink()
  (copy / "log.jsonl").symlink_to("/dev/full")
  assert train(data, copy) == 2
  error = capsys.readouterr().err
  assert "No space left" in error and f"{copy / 'stage2' / 'checkpoints' / '2'}" in error


def test_sigterm_saves_the_step_and_the_same_command_continues(trivial, data, tmp_path, capsys):
  out, handler = tmp_path / "out", signal.getsignal(signal.SIGTERM)
  trivial[3] = lambda: os.kill(os.getpid(), signal.SIGTERM) or {}
  assert train(data, out, run_stages="stage1") == 143
  trivial.clear()
  assert "step 3 is saved, the same command continues" in capsys.readouterr().err
  assert checkpoints.steps_in(out / "stage1" / "checkpoints") == [2, 3]
  assert signal.getsignal(signal.SIGTERM) is handler
  assert train(data, out, run_stages="stage1") == 0
  assert [step for _, step in train_runs.steps(out)] == [1, 2, 3, 4]


def test_a_loss_that_is_not_finite_stops_the_run_with_its_samples(
    trivial, data, tmp_path, capsys):
  out = tmp_path / "out"
  trivial[3] = lambda: {"loss": jnp.float32("nan")}
  assert train(data, out, checkpoint_every=1) == 2
  trivial.clear()
  error = capsys.readouterr().err
  assert "step 3: loss is nan; samples of the batch: " in error
  line = train_runs.steps(out)["stage1", 3]
  assert line["loss"] == "nan"
  for mode, record in line["samples"]:
    assert str(record) in error and f"{train_runs.MODES[mode == 5]} " in error
  assert checkpoints.steps_in(out / "stage1" / "checkpoints") == [1, 2]  # not the diverged state
  assert f"the last good checkpoint is {out / 'stage1' / 'checkpoints' / '2'}" in error


class Recorder(logs.Log):
  """A log that keeps its steps."""

  def __init__(self):
    super().__init__(None, "stage1", sharding.make_mesh(), start=0, total=2, every=1,
                     step_flops=None, peak_flops=0)
    self.steps = []

  def step(self, step, values, samples):
    self.steps.append((step, values, samples))


def ids(*rows):
  """The fields of a batch that the log reads; -1 is padding."""
  return types.SimpleNamespace(sample_mode=jnp.full((len(rows), 2), -1).at[:, 0].set(5),
                               sample_index=jnp.asarray([[row, -1] for row in rows]))


def test_metrics_are_read_one_step_late_and_a_gradient_that_is_not_finite_is_named():
  log = Recorder()
  metrics = {"loss": jnp.float32(1), "grad_norm": jnp.float32(2), "ce/m": jnp.float32(0),
             "weight/ce/m": jnp.float32(0)}
  log.push(1, metrics, ids(7, 8))
  assert not log.steps
  log.push(2, metrics | {"grad_norm": jnp.float32("inf")}, ids(3, 4))
  assert log.steps == [(1, {"loss": 1.0, "grad_norm": 2.0}, [[5, 7], [5, 8]])]
  with pytest.raises(ValueError, match="step 2: grad_norm is inf; samples of the batch: "
                                       "improving_full_learning 3, 4$"):
    log.flush()
  log.close()


def test_the_log_says_where_curves_and_traces_are(tmp_path):
  s = TrainSettings()
  line = watch.places(s, tmp_path, 3)
  assert line.startswith(f"curves: tensorboard --logdir {tmp_path}/tensor")
  assert "--config.profile_at=N makes one of 3 steps" in line
  line = watch.places(dataclasses.replace(s, profile_at=30, eval_every=5), tmp_path, 3)
  assert line.startswith(f"images: {tmp_path}/samples.html; ")
  assert f"profiler trace from step 30 on: {tmp_path}/STAGE/profile" in line


@pytest.mark.parametrize("first, count, total, traced", [
    (2, 2, 9, [2, 3]), (3, 5, 4, [3, 4]), (0, 2, 3, [])])
def test_a_profiler_trace_covers_the_requested_steps(monkeypatch, first, count, total, traced):
  seen, on = [], []
  monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: on.append(folder))
  monkeypatch.setattr(jax.profiler, "stop_trace", on.clear)
  for step in logs.traced(range(1, total + 1), "folder", first, count, lambda: None):
    if on:
      seen.append(step)
  assert seen == traced and not on


@pytest.mark.parametrize("fields, message", [
    ({"seed": 1}, "started with seed=0, not 1"),
    ({"stage2__mixture__initial_full_learning": 0.5}, "stage2.mixture.initial_full_learning=1.0"),
    ({"data__rows": 8}, "data.rows=4, not 8"),
    ({"run_stages": "stage2"}, "has a stage 1"),
])
def test_a_run_is_not_continued_with_other_settings(both, data, capsys, fields, message):
  assert train(data, both[0], **fields) == 2
  assert message in capsys.readouterr().err


def test_data_of_another_size_is_refused(both, tmp_path, capsys):
  other = train_runs.write_data(tmp_path / "other")
  train_runs.irgl_rows.write_mode(other, [train_runs.irgl_rows.good(0)], train_runs.MODES[0],
                                  "part-1.parquet")
  assert train(other, both[0]) == 2
  assert (f"--data {other}: the run was started with records.{train_runs.MODES[0]}="
          f"{train_runs.ROWS}, not {train_runs.ROWS + 1}") in capsys.readouterr().err


def test_data_with_other_rows_of_the_same_number_are_refused(both, data, tmp_path, capsys):
  rows = [train_runs.irgl_rows.good(i) for i in range(train_runs.ROWS)]
  other = train_runs.write_data(tmp_path / "other")
  train_runs.irgl_rows.write_mode(other, [*rows, "[{"], train_runs.MODES[1])
  before = (both[0] / "run.json").read_bytes()
  assert train(other, both[0]) == 2
  assert (f"--data {other}: {train_runs.MODES[1]} holds other rows than those that the run was "
          "started with") in capsys.readouterr().err
  assert (both[0] / "run.json").read_bytes() == before


def test_a_record_without_fingerprints_gets_them_with_a_note(data, capsys):
  found = sources.open_sources(data, train_runs.MODES, max_rejected=0.1)
  new = train_run.check_data(data, found, {})
  assert not capsys.readouterr().err
  assert train_run.check_data(data, found, {"records": new["records"]}) == new
  assert "older than the check that its data stay the same" in capsys.readouterr().err
  assert train_run.check_data(data, found, new) == new and not capsys.readouterr().err


def test_a_folder_that_is_no_run_is_refused_and_left_alone(data, tmp_path, capsys):
  (tmp_path / "thesis.txt").write_text("years of work")
  assert train(data, tmp_path) == 2
  assert "holds thesis.txt, but no run.json" in capsys.readouterr().err
  assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("fields, message", [
    ({"random_weights": False, "data__path": "unused"}, "starts from trained weights"),
    ({"mesh": {"fsdp": 3, "tensor": 2}}, "needs 6 devices, but there are 1"),
    ({"data__path": "nowhere"}, "nowhere"),
])
def test_invalid_settings_are_refused_before_anything_is_written(data, tmp_path, capsys, fields,
                                                                 message):
  assert train(data, tmp_path / "out", **fields) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_weights_of_another_model_are_refused(both, data, tmp_path, capsys):
  assert train(data, tmp_path / "out", checkpoint=both[0] / "base", model__llm__num_layers=2) == 2
  assert "'model.llm' is" in capsys.readouterr().err


def test_the_moving_average_of_any_checkpoint_can_be_exported(both, tmp_path, capsys):
  out, target = both[0], tmp_path / "weights"
  assert commands.main(["convert", str(out / "stage1" / "checkpoints" / "2"), str(target), "--to",
                   "published"]) == 0
  assert (target / "tokenizer.json").is_file()
  config, params = weights.load_checkpoint(target)
  kept = json.loads((out / "stage1" / "checkpoints" / "2" / "run" / "metadata").read_text())
  assert checkpoints.checksums({"ema": params["transformer"]}) == {
      name: x for name, x in kept["sums"].items() if name.startswith("ema/")}
  last = weights.load_checkpoint(out / "stage1" / "weights")
  assert config == last[0]
  jax.tree.map(np.testing.assert_array_equal, params["vae"], last[1]["vae"])


def test_a_training_checkpoint_outside_its_run_is_refused(both, tmp_path, capsys):
  shutil.copytree(both[0] / "stage1" / "checkpoints" / "2", tmp_path / "a" / "b" / "2")
  assert commands.main(["convert", str(tmp_path / "a" / "b" / "2"), str(tmp_path / "weights"), "--to",
                   "published"]) == 2
  assert "is read inside its run's folder" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--data", "nowhere"], "--data nowhere: no such folder"),
    (["--checkpoint", "nowhere"], "--checkpoint nowhere: no such folder"),
    (["--coordinator", "host:1", "--process-id", "0"], "--num-processes missing"),
    (["--coordinator", "host:1", "--process-id", "2", "--num-processes", "2"],
     "--coordinator host:1 --num-processes 2 --process-id 2: the processes cannot connect: "),
    (["--mesh", "data=2,pipe=4"], "no field 'pipe' in mesh"),
])
def test_invalid_flags_are_named(data, tmp_path, capsys, argv, message):
  assert commands.main([*train_runs.flags(data, tmp_path / "out"), *argv]) == 2
  assert message in capsys.readouterr().err
  assert not (tmp_path / "out").exists()


def test_a_coordinator_without_a_port_is_named(data, tmp_path, capsys):
  with pytest.raises(SystemExit):
    commands.main([*train_runs.flags(data, tmp_path / "out"), "--coordinator", "host"])
  assert "'host' is not an address" in capsys.readouterr().err


def test_the_mesh_flag_sets_every_axis_and_a_field_override_wins(data, tmp_path, capsys):
  flags = train_runs.flags(data, tmp_path / "out", {"data": 2})
  assert commands.main([*flags, "--mesh", "tensor=3"]) == 2
  assert "'data': 1, 'fsdp': 1, 'sequence': 1, 'tensor': 3" in capsys.readouterr().err
  assert commands.main([*flags, "--mesh", "tensor=3", "--config.mesh.tensor=5"]) == 2
  assert "'tensor': 5" in capsys.readouterr().err
