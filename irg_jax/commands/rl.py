"""`irg rl`: learning from rewards on whole trajectories."""

import pathlib

from irg_jax import hub
from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  verbs.add_parser("rl", run=_run, help="learn from rewards on thoughts and images")


def _run(args, overrides):
  from irg_jax import compiled
  from irg_jax.mini import benchmark, rewards  # they register themselves
  from irg_jax.rl import run, settings
  del benchmark, rewards
  fields = [f"{name}={value}" for name, value in (
      ("prompts", args.prompts), ("reward", args.reward)) if value is not None]
  if args.checkpoint is not None:
    fields.append(f"checkpoint={flags.weights_folder('--checkpoint', args.checkpoint)}")
  fields += [f"mesh.{axis}={size}" for axis, size in (args.mesh or {}).items()]
  read = settings.load(args.config, [*fields, *overrides])
  if hub.is_name(read.checkpoint):
    folder = flags.weights_folder("checkpoint", read.checkpoint)
    read = settings.load(args.config, [*fields, *overrides, f"checkpoint={folder}"])
  compiled.keep_programs()
  return run.run_rl(read, args.out or pathlib.Path("out", "rl"))
