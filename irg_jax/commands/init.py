"""`irg init`: a checkpoint of random weights."""


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  verbs.add_parser("init", run=_run, help="make a checkpoint of random weights")


def _run(args, overrides):
  from irg_jax import config, storage
  from irg_jax.weights import init
  model = config.read_model(args.config, overrides)
  storage.check_output_folder(args.out.parent)
  init.write_random_checkpoint(args.out, model, args.seed)
  print(f"wrote {args.out} (random weights)")
