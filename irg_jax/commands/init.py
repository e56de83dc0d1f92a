"""`irg init`: a checkpoint of random weights."""


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("init", run=_run, help="make a checkpoint of random weights")
  add = parser.add_argument
  add("--config", required=True, metavar="FILE",
      help="sizes, like configs/tiny.py; --config.FIELD=VALUE changes one")
  add("--out", required=True, metavar="DIR", help="folder to write")
  add("--seed", type=int, default=0, help="random seed of the weights (default 0)")


def _run(args, overrides):
  from irg_jax import config, storage
  from irg_jax.weights import init
  model = config.read_model(args.config, overrides)
  storage.check_output_folder(args.out.parent)
  init.write_random_checkpoint(args.out, model, args.seed)
  print(f"wrote {args.out} (random weights)")
