"""`irg plan`: memory and time of the compiled programs on a TPU slice or GPUs, without them."""

import argparse
import dataclasses
import functools
import re
import sys

from irg_jax import chips
from irg_jax.commands import flags
from irg_jax.messages import guess

_STEPS = ("append_text", "append_image", "think", "denoise", "decode_pixels", "encode_pixels")
_OLD = {"read_text": "append_text", "read_picture": "append_image", "draw": "denoise"}


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  add = verbs.add_parser(
      "plan", run=_run, help="memory and time on TPUs or GPUs, without them").add_argument
  add("--topology", required=True, metavar="CHIP:AxB",
      help="the slice or node, such as v5p:4x4x4 (Cloud's v5p-128) or h100:8")
  add("--slices", type=flags.count, default=1, metavar="N",
      help="slices of this topology that train together, each with its rows (1)")
  add("--config", required=True, metavar="FILE",
      help="recipe like configs/irgl.py; for generation alone, model sizes like configs/tiny.py")
  add("--programs", type=_names, default=("train", "generate"), metavar="NAME,...",
      help="what to compile (default train,generate)")
  add("--stage", choices=("stage1", "stage2"), default="stage2", help="of training (stage2)")
  add("--mesh", type=_mesh, metavar="AXIS=N,...|auto",
      help="devices by axis (default: the configuration's; for generation tensor first); auto: "
      "compiles for the most promising meshes and reports the best that fits")
  add("--visible", type=flags.share, metavar="X",
      help="share of pairs of blocks of attention that are visible to a kernel, in training of a "
      "row, in generation of the cache (default: measured for data like IRGL-300K)")
  add("--batch", type=flags.count, metavar="N", help="prompts side by side (default: one a chip)")
  add("--cache", type=flags.count, default=16384, metavar="N", help="slots a row (16384)")
  add("--size", type=flags.count, default=1024, metavar="S", help="pixels of a side (1024)")
  add("--fast", action="store_true", help="forecasts between updates, as of irg generate --fast")
  add("--weights", choices=("int8",), help="of generation, as of irg generate --weights")
  add("--headroom", type=_share, default=0.1, metavar="X", help="share of memory left free (0.1)")


def _run(args, overrides) -> int:
  chips.prepare_to_compile()  # before JAX is imported
  from irg_jax import plan
  from irg_jax.plan import meshes
  from irg_jax.progress import Progress
  slice_, estimates, notes = plan.open_slice(args.topology, args.slices), [], []
  with Progress() as progress:
    def compiled(make, shape):
      found = []
      for program in make(shape):
        progress(f"compiling {program.name} for {slice_.name}")
        found.append(plan.estimate(program, slice_))
      return found

    for candidates, make in _kinds(args, overrides, slice_):
      if args.mesh != "auto":
        estimates += compiled(make, args.mesh)
        continue
      found, tried = meshes.best(candidates(), functools.partial(compiled, make), slice_,
                                 args.headroom)
      estimates += found
      notes += [_tried(*one) for one in tried]
  print("\n\n".join([plan.report(estimates, slice_, args.headroom), *notes]))
  return int(any(e.headroom(slice_) < args.headroom for e in estimates))


def _tried(shape, seconds) -> str:
  mesh = ",".join(f"{axis}={n}" for axis, n in shape.items() if n > 1) or "fsdp=1"
  return f"tried --mesh {mesh}: " + ("does not fit" if seconds is None
                                     else f"at least {seconds:.3g} s for all of its programs")


def _kinds(args, overrides, slice_) -> list:
  """Training and generation if wanted: (function () -> meshes to try, (shape) -> programs)."""
  from irg_jax import config, sharding
  from irg_jax.generate.settings import Forecast, Settings
  from irg_jax.plan import meshes, programs
  from irg_jax.train import settings as train_settings
  kinds = []
  if "train" in args.programs:
    loaded = config.load(args.config, overrides)
    if "stage2" not in loaded:
      raise ValueError(f"--config {args.config}: says nothing about training; give one like "
                       "configs/irgl.py, or --programs generate")
    path = [] if loaded.data.path else ["data.path=-"]  # a plan reads no data
    training = train_settings.load(args.config, [*path, *overrides])

    training = config.update(training, {"mesh": {"slice": args.slices}})

    def train(shape):
      shape = {"slice": args.slices} | (shape or training.mesh.shape(slice_.chips))
      mesh = sharding.make_mesh(shape, slice_.devices)
      return [programs.train_program(training, args.stage, mesh, args.visible)]

    kinds.append((lambda: meshes.training_meshes(training, args.stage, slice_), train))
  if "rl" in args.programs:
    kinds.append((_no_meshes, functools.partial(_rl, args, overrides, slice_)))
  if args.slices > 1 and set(args.programs) != {"train"}:
    raise ValueError(f"--slices {args.slices}: is for --programs train; generation on several "
                     "slices is several commands")
  if names := set(_STEPS if "generate" in args.programs else args.programs) - {"train", "rl"}:
    # Generation has no backward pass to recompute anything for.
    model = dataclasses.replace(config.read_model(args.config, overrides), remat="none")
    forecast = Forecast(interval=flags.FAST if args.fast else 1)
    settings = Settings(height=args.size, width=args.size, forecast=forecast)
    rows = args.batch or slice_.chips
    settings.validate(model)

    def generate(shape):
      mesh = sharding.generation_mesh(shape, model.llm, slice_.devices)
      made = programs.generation_programs(model, settings, rows, args.cache, mesh, args.visible,
                                          args.weights)
      return [program for program in made if program.name.removesuffix("_forecast") in names]

    kinds.append((lambda: meshes.generation_meshes(model.llm, rows, slice_), generate))
  return kinds


def _rl(args, overrides, slice_, shape) -> list:
  """The update of `irg rl`, of a configuration like configs/rl.py."""
  from irg_jax import sharding
  from irg_jax.generate.settings import Settings
  from irg_jax.rl import programs
  from irg_jax.rl import settings as rl_settings
  unread = ["prompts=-", "reward=-"]  # a plan reads no prompts and asks nobody
  settings = rl_settings.load(args.config, [*unread, *overrides])
  generation = settings.rollout.settings(Settings())
  generation.validate(settings.model)
  settings.check_generation(generation)
  mesh = sharding.make_mesh(shape or settings.mesh.shape(slice_.chips), slice_.devices)
  return [programs.rl_program(settings, generation, mesh)]


def _no_meshes():
  raise ValueError("--mesh auto knows the programs of training and generation; give axes for rl")


def _mesh(text: str):
  """Parses --mesh."""
  return text if text == "auto" else flags.mesh(text)


def _names(text: str) -> tuple[str, ...]:
  """Parses --programs."""
  names, known = text.split(","), ("train", "generate", "rl", *_STEPS)
  for old in set(names) & set(_OLD):
    print(f"note: program {old} is now called {_OLD[old]}", file=sys.stderr)
  names = tuple(_OLD.get(name, name) for name in names)
  if unknown := set(names) - set(known):
    name = min(unknown)
    raise argparse.ArgumentTypeError(f"{name!r} is no program{guess(name, known)}; known: "
                                     f"{', '.join(known)}")
  return names


def _share(text: str) -> float:
  if not re.fullmatch(r"0|0?\.\d+", text):
    raise argparse.ArgumentTypeError(f"{text!r} is not a share of the memory, such as 0.1")
  return float(text)
