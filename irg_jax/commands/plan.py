"""`irg plan`: memory and time of the compiled programs on a TPU slice, without a TPU."""

import argparse
import dataclasses
import pathlib
import re
import sys

from irg_jax import chips
from irg_jax.commands import flags

_STEPS = ("append_text", "append_image", "think", "denoise", "decode_pixels", "encode_pixels")
_OLD = {"read_text": "append_text", "read_picture": "append_image", "draw": "denoise"}


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  add = verbs.add_parser(
      "plan", run=_run, help="memory and time on a TPU slice, without a TPU").add_argument
  add("--topology", required=True, metavar="CHIP:AxB", help="the slice, such as v5p:4x4x4")
  add("--config", type=pathlib.Path, required=True, metavar="FILE",
      help="recipe like configs/irgl.py; for generation alone, model sizes like configs/tiny.py")
  add("--programs", type=_names, default=("train", "generate"), metavar="NAME,...",
      help="what to compile (default train,generate)")
  add("--stage", choices=("stage1", "stage2"), default="stage2", help="of training (stage2)")
  add("--mesh", type=flags.mesh, metavar="AXIS=N,...",
      help="devices by axis (default: the configuration's; for generation tensor first)")
  add("--batch", type=flags.count, metavar="N", help="prompts side by side (default: one a chip)")
  add("--cache", type=flags.count, default=16384, metavar="N", help="slots a row (16384)")
  add("--size", type=flags.count, default=1024, metavar="S", help="pixels of a side (1024)")
  add("--headroom", type=_share, default=0.1, metavar="X", help="share of memory left free (0.1)")


def _run(args, overrides) -> int:
  chips.prepare_to_compile()  # before JAX is imported
  from irg_jax import plan
  from irg_jax.progress import Progress
  slice_, estimates = plan.open_slice(args.topology), []
  programs = _programs(args, overrides, slice_)
  with Progress() as progress:
    for program in programs:
      progress(f"compiling {program.name} for {slice_.name}")
      estimates.append(plan.estimate(program, slice_))
  print(plan.report(estimates, slice_, args.headroom))
  return int(any(e.headroom(slice_) < args.headroom for e in estimates))


def _programs(args, overrides, slice_) -> list:
  """The programs that are wanted."""
  from irg_jax import config, sharding
  from irg_jax.generate.settings import Settings
  from irg_jax.plan import programs
  from irg_jax.train import settings as train_settings
  found = []
  if "train" in args.programs:
    loaded = config.load(args.config, overrides)
    if "stage2" not in loaded:
      raise ValueError(f"--config {args.config}: says nothing about training; give one like "
                       "configs/irgl.py, or --programs generate")
    path = [] if loaded.data.path else ["data.path=-"]  # a plan reads no data
    settings = train_settings.load(args.config, [*path, *overrides])
    mesh = sharding.make_mesh(args.mesh or settings.mesh.shape(slice_.chips), slice_.devices)
    found.append(programs.train_program(settings, args.stage, mesh))
  if names := set(_STEPS if "generate" in args.programs else args.programs) - {"train"}:
    # Generation has no backward pass to recompute anything for.
    model = dataclasses.replace(config.read_model(args.config, overrides), remat="none")
    mesh = sharding.generation_mesh(args.mesh, model.llm, slice_.devices)
    settings = Settings(height=args.size, width=args.size)
    settings.validate(model)
    made = programs.generation_programs(
        model, settings, args.batch or slice_.chips, args.cache, mesh)
    found += [program for program in made if program.name in names]
  return found


def _names(text: str) -> tuple[str, ...]:
  """Parses --programs."""
  names, known = text.split(","), ("train", "generate", *_STEPS)
  for old in set(names) & set(_OLD):
    print(f"note: program {old} is now called {_OLD[old]}", file=sys.stderr)
  names = tuple(_OLD.get(name, name) for name in names)
  if unknown := set(names) - set(known):
    raise argparse.ArgumentTypeError(f"{min(unknown)!r} is no program; known: {', '.join(known)}")
  return names


def _share(text: str) -> float:
  if not re.fullmatch(r"0|0?\.\d+", text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a share of the memory, such as 0.1")
  return float(text)
