"""`irg data`: sample, check, build and encode IRGL data, before training."""

import pathlib
import tomllib

from irg_jax.commands import flags
from irg_jax.messages import guess

_TEXTS = tomllib.loads(pathlib.Path(__file__).with_name("data.toml").read_text(encoding="utf-8"))


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("data", description=_TEXTS["description"],
                            help="sample, check, build and encode training data")
  steps = parser.add_subparsers(dest="step", metavar="STEP")
  runs = {"sample": _sample, "build": _build, "check": _check, "encode-latents": _encode}
  for step, run in runs.items():
    parser = steps.add_parser(step, run=run, **_TEXTS["steps"][step])
    if step == "encode-latents":
      parser.add_shared("hosts")


def _sample(args, _):
  from irg_jax.data import sample_set
  sample_set.write(args.out)
  print(f"wrote {args.out}: six modes of {sample_set.ROWS} usable rows and one unusable row each")


def _build(args, _):
  args.source = flags.data_folder("SRC", args.source)
  modes = _modes(args.mode, args.source)
  from irg_jax import progress, storage
  from irg_jax.data import parquet, sources
  storage.check_output_folder(args.out)
  with progress.Progress() as bar:
    reports = sources.build(args.source, args.out, modes, max_rejected=args.max_rejected,
                            workers=args.workers, progress=bar)
  for mode, report in reports.items():
    print(parquet.summary(mode, report))
    for file, row, reason, detail in report["offenders"]:
      print(f"  {file} row {row}: {reason}: {detail}")
  print(f"wrote {args.out / 'irgl'}")


def _check(args, _):
  args.path = flags.data_folder("PATH", args.path)
  modes = _modes(args.mode, args.path)
  if args.out.is_dir():
    raise ValueError(f"--out {args.out}: is a folder; name a file")
  from irg_jax import progress, storage
  storage.check_output_folder(args.out.parent)
  count_text = None
  if args.tokenizer:
    from irg_jax.tokenizer import load_tokenizer
    tokenizer = load_tokenizer(flags.folder("--tokenizer", args.tokenizer), 2**31)
    count_text = lambda words: len(tokenizer.encode(words))
  from irg_jax.data import check, parquet
  with progress.Progress() as bar:
    reports = check.check(args.path, modes, count_text=count_text, samples=args.samples,
                          workers=args.workers, progress=bar)
  args.out.parent.mkdir(parents=True, exist_ok=True)
  check.write_page(args.out, args.path, reports, "tokens" if count_text else "bytes")
  for report in reports:
    print(parquet.summary(report.mode, report.metadata))
  print(f"wrote {args.out}")


def _encode(args, _):
  args.path = flags.data_folder("PATH", args.path)
  modes = _modes(args.mode, args.path)
  args.checkpoint = flags.weights_folder("--checkpoint", args.checkpoint)
  flags.check_hosts(args)
  if args.out.resolve() == args.path.resolve():
    raise ValueError("--out: must be another folder than PATH")
  from irg_jax import images, progress, storage, weights
  from irg_jax.data import latents, sources
  from irg_jax.model.vae import encode_levels
  low, high, stride = args.size
  transform = images.ImageTransform(max_size=high, min_size=low, stride=stride)
  storage.check_output_folder(args.out)
  model = weights.read_config(args.checkpoint)
  if stride % model.pixel_stride:
    raise ValueError(f"--size: stride {stride} is not a multiple of the {model.pixel_stride} "
                     "pixels of a latent token's side")
  with progress.Progress() as bar:
    opened = sources.open_sources(args.path, modes, max_rejected=args.max_rejected, progress=bar)
    _, params = weights.load_checkpoint(args.checkpoint, part="vae")
    encoder = latents.Encoder(model, params["vae"], encode_levels)
    result = latents.encode_dataset(
        opened, args.out, encoder, transform, dtype=args.dtype, process_index=args.process_id,
        process_count=args.num_processes, progress=bar)
  for mode, state in result.items():
    print(f"{mode}: {'files of other hosts are missing yet' if state == 'waiting' else state}")


def _modes(names, folder):
  """The modes that are named, all of which must exist; default: all six."""
  from irg_jax.data.records import MODES
  if unknown := sorted(set(names or ()) - set(MODES)):
    raise ValueError(f"--mode {unknown[0]}: unknown{guess(unknown[0], MODES)}; the modes are "
                     f"{', '.join(MODES)}")
  modes = [mode for mode in MODES if not names or mode in names]
  homes = (folder, folder / "irgl")
  if missing := [m for m in modes if not any((home / m).is_dir() for home in homes)]:
    raise ValueError(f"{folder} has no {missing[0]}; choose among the modes that it has with "
                     "--mode")
  return modes
