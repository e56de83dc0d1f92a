"""Weights & Biases as a second place for the curves, images and texts of a run."""

import contextlib
import dataclasses
import html
import importlib
import uuid

from irg_jax import storage
from irg_jax.train import logs

FILE = "wandb.json"  # in the folder of the run: the id, so that a restart goes on with it


def check(options) -> None:
  """ValueError if `WandbSettings` name a project, but the package is not installed."""
  if options.project:
    client()


def client():
  """The package `wandb`; ValueError where it is not installed."""
  try:
    return importlib.import_module("wandb")
  except ImportError as e:
    raise ValueError(f"config field 'wandb.project' needs the package wandb ({e}): "
                     'pip install "irg_jax[wandb]", or leave the field empty') from e


def sink(run, stage: str, folder):
  """A context manager for `logs.Log`, or None without a project, or without a folder."""
  if not run.settings.wandb.project or folder is None:
    return None
  return _run(run.settings, stage, folder, run.out, logs.made(folder, stage)[0])


@contextlib.contextmanager
def _run(settings, stage, folder, out, reached):
  """Yields add(step, values) as `logs.curves` does; no step is logged twice after a kill.

  Steps up to `reached` were logged before, and are the same when they are made again.
  """
  wandb, options = client(), settings.wandb
  wandb_run = wandb.init(
      project=options.project, entity=options.entity or None, mode=options.mode, dir=str(folder),
      id=_id(out), name=out.absolute().name, resume="allow",
      config=dataclasses.asdict(settings), settings=wandb.Settings(silent=True))
  wandb_run.define_metric(f"{stage}/step")
  wandb_run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")

  def add(step, values):
    if step > reached:
      wandb_run.log({f"{stage}/step": step} | {
          f"{stage}/{name}": _value(wandb, x) for name, x in values.items()})

  try:
    yield add
  finally:
    wandb_run.finish()


def _value(wandb, value):
  if isinstance(value, str):
    return wandb.Html(f"<pre style='white-space: pre-wrap'>{html.escape(value)}</pre>")
  return wandb.Image(value) if hasattr(value, "shape") else value


def _id(folder) -> str:
  """The id of the run, chosen once."""
  path = folder / FILE
  if not path.is_file():
    storage.write_json(path, {"id": uuid.uuid4().hex[:12]})
  return str(storage.read_json(path)["id"])
