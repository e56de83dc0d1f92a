"""`irg fetch`: the files of a checkpoint or a dataset on the Hugging Face hub."""

import argparse

from irg_jax import hub, leases, storage


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
  kind = "dataset" if args.dataset else "model"
  if args.to is None or storage.is_local(args.to):
    print(hub.fetch(args.name, needed, kind, args.to))
    return
  aside = storage.cache_folder("scratch")
  with leases.new_folder(args.to) as folder, storage.scratch_folder(aside) as scratch:
    hub.fetch(args.name, needed, kind, scratch)
    for path in sorted(scratch.rglob("*")):
      name = path.relative_to(scratch)
      if path.is_file() and not name.parts[0].startswith("."):  # the client's notes
        (folder / name.as_posix()).upload(path)
  print(args.to)
