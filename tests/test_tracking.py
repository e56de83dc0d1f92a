"""Weights & Biases as a second place for the curves; offline, skipped where it is not installed."""

import importlib.util
import json
import types

import numpy as np
import pytest

from irg_jax.train import tracking
from irg_jax.train.settings import TrainSettings, WandbSettings

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason='wandb is not installed: irg_jax[wandb]')


def run(out=None, **options):
  settings = TrainSettings(wandb=WandbSettings(**options))
  return types.SimpleNamespace(settings=settings, out=out)


def test_without_a_project_or_in_other_processes_nothing_is_tracked(tmp_path):
  assert tracking.sink(run(), "stage1", tmp_path) is None
  assert tracking.sink(run(project="p"), "stage1", None) is None


def test_a_project_without_the_package_is_refused_with_the_way_to_get_it(monkeypatch):
  monkeypatch.setitem(tracking.importlib.import_module("sys").modules, "wandb", None)
  with pytest.raises(ValueError, match=r"config field 'wandb.project' needs .*irg_jax\[wandb\]"):
    tracking.check(WandbSettings(project="p"))
  tracking.check(WandbSettings())


class Client:
  """Keeps what it is told."""

  def __init__(self):
    self.logged, self.started = [], []

  def init(self, **options):
    self.started.append(options)
    return self

  def define_metric(self, *_, **__):
    pass

  def log(self, values):
    self.logged.append(values)

  def finish(self):
    self.logged.append("finished")

  Settings = Image = Html = staticmethod(lambda *x, **_: x)


def test_a_restart_goes_on_with_the_same_run_and_logs_no_step_twice(tmp_path, monkeypatch):
  client = Client()
  monkeypatch.setattr(tracking, "client", lambda: client)
  for reached in (0, 7):
    (tmp_path / "log.jsonl").write_text(json.dumps({"stage": "stage1", "step": reached, "loss": 1}))
    with tracking.sink(run(tmp_path, project="p"), "stage1", tmp_path) as add:
      add(5, {"loss": 1.0})
      add(9, {"loss": 0.5})
  assert client.started[0]["id"] == client.started[1]["id"]
  assert [x["stage1/step"] for x in client.logged if x != "finished"] == [5, 9, 9]
  assert client.logged[-1] == "finished"


@needs_wandb
def test_offline_numbers_images_and_texts_are_written_into_the_folder(tmp_path, monkeypatch):
  for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
    monkeypatch.setenv(name, str(tmp_path / "aside"))
  with tracking.sink(run(tmp_path, project="p", mode="offline"), "stage1", tmp_path) as add:
    add(1, {"loss": 0.5, "samples/1/round1": np.zeros((8, 8, 3), np.uint8),
            "samples/1/thoughts": "a <b> thought"})
  folder, = (tmp_path / "wandb").glob("offline-run-*")
  content = next(folder.glob("*.wandb")).read_bytes()
  assert b"stage1/loss" in content and b"stage1/samples/1/round1" in content
  assert list(folder.glob("files/media/images/**/*.png"))
  assert "a &lt;b&gt; thought" in next(folder.glob("files/media/html/**/*.html")).read_text()
