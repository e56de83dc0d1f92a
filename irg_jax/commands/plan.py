"""`irg plan`: memory and time of the compiled programs on a TPU slice, without a TPU."""

import argparse
import dataclasses
import pathlib
import sys

from irg_jax import chips
from irg_jax.commands import flags

_PLAN = """\
Compiles the programs of training and generation for a TPU slice on this machine, which needs no
TPU, and prints what each needs of a chip: memory, FLOPs, collectives, and a roofline estimate of
its time. Takes minutes and some gigabytes for a large model. Needs libtpu:
pip install 'irg_jax[tpu]'.

examples:
  irg plan --topology v5p:4x4x4 --config configs/irgl.py
  irg plan --topology v5e:16x16 --config configs/irgl.py --programs train --mesh fsdp=64,sequence=4
  irg plan --topology v5e:2x4 --config configs/irgl.py --programs generate --batch 8 --cache 16384
  irg plan --topology v5e:2x4 --config configs/tiny.py --programs think,denoise --size 128
  irg plan --topology v6e:8x8 --config configs/irgl.py --config.data.rows=128
"""

_PLAN_END = """\
topologies are CHIP:SIDExSIDE with chips v4, v5e, v5p, v6e. programs are "train" (the step of
--stage), "generate" (all steps of generation), or single steps: append_text, append_image, think,
denoise, decode_pixels, encode_pixels.

exit status:
  0  everything fits, with --headroom to spare
  1  something does not fit; the report says by how much and what to try
  2  an error: a flag, the configuration, libtpu is missing
"""

_STEPS = ("append_text", "append_image", "think", "denoise", "decode_pixels", "encode_pixels")
_OLD = {"read_text": "append_text", "read_picture": "append_image", "draw": "denoise"}


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "plan", description=_PLAN, epilog=_PLAN_END,
                      help="memory and time on a TPU slice, without a TPU")
  parser.set_defaults(run=_run)
  add = parser.add_argument
  add("--topology", required=True, metavar="CHIP:AxB", help="the slice, such as v5p:4x4x4")
  add("--config", type=pathlib.Path, required=True, metavar="FILE",
      help="recipe like configs/irgl.py; for generation alone, model sizes like configs/tiny.py")
  add("--programs", type=_programs, default=("train", "generate"), metavar="NAME,...",
      help="what to compile (default train,generate)")
  add("--stage", choices=("stage1", "stage2"), default="stage2", help="of training (stage2)")
  add("--mesh", type=flags.mesh, metavar="AXIS=N,...",
      help="devices by axis (default: the configuration's; for generation all on fsdp)")
  add("--batch", type=flags.count, metavar="N",
      help="prompts generated together (default: one per chip)")
  add("--cache", type=flags.count, default=16384, metavar="N",
      help="slots of each row's cache (16384)")
  add("--size", type=flags.count, default=1024, metavar="S",
      help="pixels of generated images (1024)")
  add("--headroom", type=_share, default=0.1, metavar="X",
      help="share of a chip's memory that must stay free (0.1)")


def _run(args, overrides) -> int:
  chips.prepare_to_compile()  # before JAX is imported
  from irg_jax import plan
  from irg_jax.plan import report
  from irg_jax.progress import Progress
  slice_ = plan.open_slice(args.topology)
  programs, estimates = _make_programs(args, overrides, slice_), []
  with Progress() as progress:
    for program in programs:
      progress(f"compiling {program.name} for {slice_.name}")
      estimates.append(plan.estimate(program, slice_))
  print(report.report(estimates, slice_, args.headroom))
  return int(any(e.headroom(slice_) < args.headroom for e in estimates))


def _make_programs(args, overrides, slice_):
  from irg_jax import sharding
  from irg_jax.plan import programs
  model, settings = _load(args, overrides)
  made, wanted = [], args.programs
  if "train" in wanted:
    shape = args.mesh or settings.mesh.shape(slice_.chips)
    mesh = sharding.make_mesh(shape, slice_.devices)
    made.append(programs.train_program(settings, args.stage, mesh))
  names = programs.GENERATION if "generate" in wanted else wanted
  if any(name in programs.GENERATION for name in names):
    from irg_jax.generate.settings import Settings
    mesh = sharding.make_mesh(args.mesh, slice_.devices)
    asked = Settings(height=args.size, width=args.size)
    asked.validate(model)
    made += [p for p in programs.generation_programs(
        model, asked, args.batch or slice_.chips, args.cache, mesh) if p.name in names]
  return made


def _load(args, overrides):
  """(model config for generation, training settings or None)."""
  from irg_jax import config as config_lib
  config = config_lib.load(args.config, overrides)
  model = config_lib.read_model(args.config, overrides)
  # Generation has no backward pass to recompute anything for.
  model = dataclasses.replace(model, remat="none")
  if "train" not in args.programs:
    return model, None
  if "stage2" not in config:
    raise ValueError(f"--config {args.config}: says nothing about training; give one like "
                     "configs/irgl.py, or --programs generate")
  from irg_jax.train import settings
  if not config.data.path:  # a plan reads no data
    overrides = ["data.path=-", *overrides]
  return model, settings.load(args.config, overrides)


def _programs(text: str) -> tuple[str, ...]:
  names, known = [], ("train", "generate", *_STEPS)
  for name in text.split(","):
    if name in _OLD:
      print(f"note: program {name} is now called {_OLD[name]}", file=sys.stderr)
    names.append(_OLD.get(name, name))
    if names[-1] not in known:
      raise argparse.ArgumentTypeError(f"{name!r} is no program; known: {', '.join(known)}")
  return tuple(names)


def _share(text: str) -> float:
  try:
    share = float(text)
  except ValueError:
    share = -1.0
  if not 0 <= share < 1:
    raise argparse.ArgumentTypeError(f"{text!r} is not a share of the memory, such as 0.1")
  return share
