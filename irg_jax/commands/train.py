"""`irg train`: both stages of training on IRGL data, or one of them."""

import inspect
import os
import pathlib
import runpy
import sys

from irg_jax import hub
from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("train", run=_run, help="train in two stages on IRGL data")
  # argparse parses a default that is a string, and names the flag if it is no number.
  add = parser.add_argument_group("several hosts, one process on each").add_argument
  add("--distributed", action="store_true",
      help="find the other processes through the TPU slice, SLURM or MPI")
  for flag, kind, metavar, variable, text in (
      ("--coordinator", flags.address, "HOST:PORT", "COORDINATOR_ADDRESS", "address of process 0"),
      ("--num-processes", int, "N", "NUM_PROCESSES", "number of processes"),
      ("--process-id", int, "I", "PROCESS_ID", "number of this process, from 0")):
    add(flag, type=kind, metavar=metavar, default=os.environ.get(f"JAX_{variable}"),
        help=f"{text} (default: $JAX_{variable})")


def _run(args, overrides):
  from irg_jax import compiled, config
  from irg_jax.train import distributed, run, settings
  _connect(args)
  with distributed.fail_together("irg train"):
    file, preset, overrides = config.locate(args.config, overrides)
    read = settings.load(f"{file}:{preset}" if preset else file, [*_fields(args), *overrides])
    if hub.is_name(read.checkpoint):  # of the file, or of --config.checkpoint
      folder = flags.weights_folder("checkpoint", read.checkpoint)
      read = config.update(read, {"checkpoint": str(folder)})
    if hub.is_name(read.data.path):
      folder = flags.data_folder("data.path", read.data.path)
      read = config.update(read, {"data": {"path": str(folder)}})
    if not (args.out or preset):
      made = inspect.signature(runpy.run_path(str(file))["get_config"]).parameters.values()
      preset = next((argument.default for argument in made), file.stem)
    compiled.keep_programs()
    return run.run_train(read, args.out or pathlib.Path("out", f"train-{preset}"), _open_exam)


def _open_exam(name: str, limit: int):
  """The `watch.Exam` of the first prompts of a benchmark; ValueError for one with a judge."""
  from irg_jax.commands import eval
  from irg_jax.evaluate import base
  from irg_jax.messages import guess
  from irg_jax.train import watch
  known = {b.name: b for b in eval.benchmarks().values() if b.right}
  if name not in known:
    raise ValueError(f"benchmarks that need no judge and no detector are {', '.join(known)}"
                     f"{guess(name, known)}")
  benchmark = known[name]
  items = benchmark.read()[:limit]
  return watch.Exam(
      prompts=tuple(item.prompt for item in items),
      seeds=tuple(base.seed(name, item.id, 0) for item in items),
      right=lambda number, image: benchmark.right(items[number], image))


def _fields(args) -> list[str]:
  """Overrides by the flags that stand for fields; --config.FIELD=VALUE wins over them."""
  from irg_jax.sharding import MESH_AXES
  sizes = dict.fromkeys(MESH_AXES, 1) | args.mesh if args.mesh else {}
  fields = {f"mesh.{axis}": size for axis, size in sizes.items()}
  if args.data is not None:
    fields["data.path"] = flags.data_folder("--data", args.data).absolute()  # not the name of a set
  if args.checkpoint is not None:
    fields["checkpoint"] = flags.weights_folder("--checkpoint", args.checkpoint)
  return [f"{field}={value}" for field, value in fields.items()]


def _connect(args):
  """Joins the other processes, if there are any. Runs before anything touches a device."""
  by_hand = {"--coordinator": args.coordinator, "--num-processes": args.num_processes,
             "--process-id": args.process_id}
  missing = [flag for flag, value in by_hand.items() if value is None]
  if not args.distributed and len(missing) == len(by_hand):
    return
  if not args.distributed and missing:
    raise ValueError(f"{', '.join(missing)} missing: give all of {', '.join(by_hand)}, or "
                     "--distributed to find them")
  import jax
  print("waiting for the other processes", file=sys.stderr, flush=True)
  how = {} if args.distributed else {"cluster_detection_method": "deactivate"}
  try:
    jax.distributed.initialize(*by_hand.values(), **how)
  except Exception as e:  # of any kind
    given = [f"{flag} {value}" for flag, value in by_hand.items() if flag not in missing]
    raise ValueError(f"{' '.join(['--distributed'] * args.distributed + given)}: the processes "
                     f"cannot connect: {e}") from e
