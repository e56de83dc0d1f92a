"""`irg convert`: checkpoints between the published layout and Orbax."""

_TEXT = """\
Copies a checkpoint between the published layout and Orbax. Without a change of dtype the round trip
is exact. Keys, shapes and dtypes are checked before anything is written.

examples:
  irg convert weights/irg-7b weights/irg-7b-orbax --to orbax --dtype bfloat16
  irg convert weights/irg-7b-orbax weights/irg-7b-again --to published
  irg convert out/irg/stage2/checkpoints/5000 weights/irg-5000 --to published --dtype bfloat16
"""


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  add = verbs.add_parser("convert", run=_run, description=_TEXT,
                         help="convert a checkpoint to the published layout or Orbax").add_argument
  add("source", metavar="SRC", help="folder to read")
  add("destination", metavar="DST", help="folder to write")
  add("--to", choices=("published", "orbax"), required=True, help="layout of DST")
  add("--dtype", choices=("bfloat16", "float16", "float32"),
      help="dtype of DST (default: that of SRC)")


def _run(args, _):
  if not args.source.exists():
    raise ValueError(f"SRC {args.source}: no such folder")
  from irg_jax import storage, weights
  storage.check_output_folder(args.destination.parent)
  weights.convert(args.source, args.destination, to=args.to, dtype=args.dtype)
  print(f"wrote {args.destination}")
