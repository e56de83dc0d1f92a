"""`irg convert`: checkpoints between the published layout and Orbax."""

from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  verbs.add_parser("convert", run=_run, help="a checkpoint to the published layout or Orbax")


def _run(args, _):
  args.source = flags.weights_folder("SRC", args.source)
  if args.card and args.to != "published":
    raise ValueError("--card: a model card is for --to published")
  from irg_jax import storage, weights
  storage.check_output_folder(args.destination.parent)
  weights.convert(args.source, args.destination, to=args.to, dtype=args.dtype, card=args.card)
  print(f"wrote {args.destination}")
