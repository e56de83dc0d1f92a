"""`irg init`: a checkpoint of random weights."""

import pathlib

_TEXT = """\
Writes a checkpoint of random weights in the published layout, for tests and first steps.

examples:
  irg init --config configs/tiny.py --out out/tiny
  irg init --config configs/tiny.py --config.model.llm.num_layers=4 --out out/tiny4 --seed 1
"""


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "init", description=_TEXT,
                      help="make a checkpoint of random weights")
  parser.set_defaults(run=_run)
  add = parser.add_argument
  add("--config", type=pathlib.Path, required=True, metavar="FILE",
      help="sizes, like configs/tiny.py; --config.FIELD=VALUE changes one")
  add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write")
  add("--seed", type=int, default=0, help="random seed of the weights (default 0)")


def _run(args, overrides):
  from irg_jax import config, storage
  model = config.read_model(args.config, overrides)
  from irg_jax.weights import init
  storage.check_output_folder(args.out.parent)
  init.write_random_checkpoint(args.out, model, args.seed)
  print(f"wrote {args.out} (random weights)")
