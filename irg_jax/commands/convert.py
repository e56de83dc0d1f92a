"""`irg convert`: checkpoints between the published layout and Orbax; adapters."""

from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("convert", run=_run,
                            help="a checkpoint to the published layout or Orbax")
  flags.add_lora(parser.add_argument)


def _run(args, _):
  args.source = flags.weights_folder("SRC", args.source)
  adapters = flags.lora_folder(args)
  if args.card and args.to != "published":
    raise ValueError("--card: a model card is for --to published")
  if args.to == "peft" and (adapters or args.dtype):
    raise ValueError("--to peft: writes the adapters of SRC in float32, without --lora or --dtype")
  from irg_jax import storage, weights
  storage.check_output_folder(args.destination.parent)
  weights.convert(args.source, args.destination, to=args.to, dtype=args.dtype, card=args.card,
                  adapters=adapters and weights.peft.Source(adapters, args.lora_scale))
  print(f"wrote {args.destination}")
