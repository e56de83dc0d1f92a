"""`irg fetch`: the files of a checkpoint or a dataset on the Hugging Face hub."""

import argparse

from irg_jax import hub, storage


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("fetch", run=_run, help="a checkpoint or dataset from the hub")
  parser.add_argument("name", metavar="OWNER/NAME[@REVISION]", type=_name, help="repository")


def _name(text):
  if not hub.is_name(text):
    raise argparse.ArgumentTypeError(
        f"{text!r}: a name such as ByteDance-Seed/BAGEL-7B-MoT is wanted, and no folder of it here")
  return text


def _run(args, _):
  if args.to is not None:
    storage.check_output_folder(args.to)
  if args.dataset:
    from irg_jax.data.sources import needed
  else:
    from irg_jax.weights import needed
  print(hub.fetch(args.name, needed, "dataset" if args.dataset else "model", args.to))
