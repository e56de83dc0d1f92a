"""`irg train`: both stages of training on IRGL data, or one of them."""

import os
import pathlib
import sys

from irg_jax.commands import flags

_TEXT = """\
Trains on IRGL data in two stages and writes checkpoints, logs and the exported weights of each
stage under --out. Run it again with the same --out to continue from the newest good checkpoint,
on any mesh and any number of hosts.

examples:
  irg train --config configs/irgl.py:tiny                       minutes on a CPU, makes its data
  irg train --config configs/irgl.py --data irgl --checkpoint weights/bagel-7b --out out/irg
  irg train --config configs/irgl.py --data irgl --checkpoint out/irg/stage1/weights \\
      --out out/stage2 --config.run_stages=stage2
  irg train ... --mesh data=2,fsdp=8 --config.data.rows=16 --config.checkpoint_every=100
  irg train ... --distributed                       on every host of a TPU slice, or under SLURM
  irg train ... --coordinator host0:1234 --num-processes 2 --process-id 0     anywhere else
"""

_END = """\
exit status:
  0    trained to the end
  2    stopped by an error; the message names the last good checkpoint
  143  stopped by SIGTERM, everything saved: run the same command to continue
"""


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "train", description=_TEXT, epilog=_END,
                      help="train in two stages on IRGL data")
  parser.set_defaults(run=_run)
  add = parser.add_argument
  add("--config", type=pathlib.Path, required=True, metavar="FILE[:PRESET]",
      help="the recipe, like configs/irgl.py; --config.FIELD=VALUE changes a field, and "
           "docs/settings.md lists them")
  add("--out", type=pathlib.Path, metavar="DIR",
      help="folder of the run, new or to continue (default out/train-PRESET)")
  add("--data", type=pathlib.Path, metavar="DIR", help="same as --config.data.path=DIR")
  add("--checkpoint", type=pathlib.Path, metavar="DIR",
      help="weights to start from, same as --config.checkpoint=DIR")
  add("--mesh", type=flags.mesh, metavar="AXIS=N,...",
      help="devices by axis, such as data=2,fsdp=4; same as --config.mesh.AXIS=N")
  _add_hosts(parser.add_argument_group("several hosts, one process on each"))


def _add_hosts(group):
  # argparse parses a default that is a string, and names the flag if it is no number.
  add = group.add_argument
  add("--distributed", action="store_true",
      help="find the other processes through the TPU slice, SLURM or MPI")
  add("--coordinator", type=flags.address, metavar="HOST:PORT",
      default=os.environ.get("JAX_COORDINATOR_ADDRESS"),
      help="address of process 0 (default: $JAX_COORDINATOR_ADDRESS)")
  add("--num-processes", type=int, metavar="N", default=os.environ.get("JAX_NUM_PROCESSES"),
      help="number of processes (default: $JAX_NUM_PROCESSES)")
  add("--process-id", type=int, metavar="I", default=os.environ.get("JAX_PROCESS_ID"),
      help="number of this process, from 0 (default: $JAX_PROCESS_ID)")


def _run(args, overrides):
  from absl import logging
  logging.set_verbosity(logging.FATAL)  # what Orbax logs as an error, it also raises
  from irg_jax.train import distributed, run
  _connect(args)
  with distributed.FailTogether("irg train"):
    return run.run_train(*_read(args, overrides))


def _read(args, overrides):
  """Returns (settings, folder of the run)."""
  from irg_jax.config import locate
  from irg_jax.train import settings
  file, preset, overrides = locate(args.config, overrides)
  out = args.out or pathlib.Path("out", f"train-{preset or file.stem}")
  config = f"{file}:{preset}" if preset else file
  return settings.load(config, [*_shorthands(args), *overrides]), out


def _shorthands(args) -> list[str]:
  """Overrides by the flags that stand for fields; --config.FIELD=VALUE wins over them."""
  fields = {f"mesh.{axis}": size for axis, size in (args.mesh or {}).items()}
  if args.mesh is not None:
    fields = dict.fromkeys(("mesh.data", "mesh.fsdp", "mesh.sequence", "mesh.tensor"), 1) | fields
  for field, path in (("data.path", args.data), ("checkpoint", args.checkpoint)):
    if path is not None:
      if not path.is_dir():
        raise ValueError(f"--{field.split('.')[0]} {path}: no such folder")
      fields[field] = path if field == "checkpoint" else path.absolute()  # no name of a set
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
