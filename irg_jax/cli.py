"""The console command `irg`: parses flags, then calls the library.

JAX is imported inside the verbs, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import os
import pathlib
import re
import sys

from irg_jax.commands import data
from irg_jax.commands import eval as eval_verb
from irg_jax.commands import flags
from irg_jax.commands import mini
from irg_jax.commands import plan
from irg_jax.commands import train

_DTYPES = ("bfloat16", "float16", "float32")

_MAIN = """\
Interleaving reasoning generation: think, draw, look, think again, draw better.

examples:
  irg generate "a red cube on a blue sphere" --checkpoint weights/irg-7b
  irg convert weights/irg-7b weights/irg-7b-orbax --to orbax --dtype bfloat16
  irg init --config configs/tiny.py --out out/tiny
  irg data build IRG-Toy-Dataset --out irgl
  irg eval generate geneval --checkpoint weights/irg-7b --out out/geneval
"""

_GENERATE = """\
Writes, for each prompt, an image a round, trace.json and a trace.html to read, under --out.

examples:
  irg generate "a red cube on a blue sphere" --checkpoint weights/irg-7b
  irg generate --prompts-file prompts.txt --checkpoint weights/irg-7b --batch-size 4 --seed 7
  irg generate "make the sky stormy" --image photo.png --checkpoint weights/irg-7b --rounds 1
  irg generate "a fox" --checkpoint weights/irg-7b --no-think --rounds 1 --size 768x1024
  irg generate "a fox" --checkpoint weights/irg-7b --config configs/generate.py \\
      --config.later.text_scale=2.0 --config.first.interval="(0.2, 1.0)"
"""

_GENERATE_END = """\
where a setting comes from, the later one wins:
  1. the checkpoint's generate.json, if it has one, else the defaults of configs/generate.py
  2. --config FILE; a file may set some of the fields only
  3. --config.FIELD=VALUE, any field of the configuration, in order
  4. the short flags above (--rounds, --size, ...)
"""

_CONVERT = """\
Copies a checkpoint between the published layout and Orbax; the same dtype round-trips bit
for bit. Keys, shapes and tables are checked before anything is written.

examples:
  irg convert weights/irg-7b weights/irg-7b-orbax --to orbax --dtype bfloat16
  irg convert weights/irg-7b-orbax weights/irg-7b-again --to published
  irg convert out/irg/stage2/checkpoints/5000 weights/irg-5000 --to published --dtype bfloat16
"""

_INIT = """\
Writes a checkpoint of random weights in the published layout: to try the commands, to test.

examples:
  irg init --config configs/tiny.py --out out/tiny
  irg init --config configs/tiny.py --config.model.llm.num_layers=4 --out out/tiny4 --seed 1
"""


def main(argv=None) -> int:
  """Runs the command line `argv` (default: the process's) and returns the exit status."""
  overrides, argv = _split_overrides(sys.argv[1:] if argv is None else argv)
  parser = _parser()
  args = parser.parse_args(argv)
  if overrides and not hasattr(args, "config"):
    parser.error(f"irg {args.verb} has no configuration, so --config.{overrides[0]} means nothing")
  try:
    return args.run(args, overrides) or 0
  except (ValueError, OSError) as e:
    if os.environ.get("IRG_DEBUG") == "1":
      raise
    print(f"irg {args.verb}: error: {e}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"irg {args.verb}: interrupted", file=sys.stderr)
    return 130


def _generate(args, overrides):
  from irg_jax.generate import request
  asked = request.from_args(args, overrides)
  from irg_jax.generate import run
  run.run_generate(asked)


def _convert(args, _):
  if not args.source.exists():
    raise ValueError(f"SRC {args.source}: no such folder")
  from irg_jax import weights
  from irg_jax.reports import trace
  trace.check_output_folder(args.destination.parent)
  weights.convert(args.source, args.destination, to=args.to, dtype=args.dtype)
  print(f"wrote {args.destination}")


def _init(args, overrides):
  from irg_jax import config as config_lib
  model = config_lib.read_model(args.config, overrides)
  from irg_jax.reports import trace
  from irg_jax.weights import init
  trace.check_output_folder(args.out.parent)
  init.write_random_checkpoint(args.out, model, args.seed)
  print(f"wrote {args.out} (random weights)")


def _split_overrides(argv):
  """Takes `--config.field=value` out of `argv`: argparse knows no flags of unknown name."""
  end = argv.index("--") if "--" in argv else len(argv)
  is_override = [i < end and re.match(r"--config\.", a) is not None for i, a in enumerate(argv)]
  taken = [a.removeprefix("--config.") for a, o in zip(argv, is_override) if o]
  return taken, [a for a, o in zip(argv, is_override) if not o]


def _parser() -> argparse.ArgumentParser:
  parser = _new_parser(argparse.ArgumentParser, prog="irg", description=_MAIN)
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  add = lambda name, text, **kw: _new_parser(verbs.add_parser, name, description=text, **kw)
  _add_generate(add("generate", _GENERATE, help="prompt to thoughts and pictures",
                    epilog=_GENERATE_END))
  _add_convert(add("convert", _CONVERT, help="checkpoints in and out"))
  _add_init(add("init", _INIT, help="a checkpoint of random weights"))
  data.add(verbs, _new_parser)
  eval_verb.add(verbs, _new_parser)
  mini.add(verbs, _new_parser)
  plan.add(verbs, _new_parser)
  train.add(verbs, _new_parser)
  return parser


def _new_parser(make, *args, **kwargs):
  raw = argparse.RawDescriptionHelpFormatter
  return make(*args, formatter_class=raw, allow_abbrev=False, **kwargs)


def _add_generate(parser):
  parser.set_defaults(run=_generate)
  add = parser.add_argument
  add("prompts", nargs="*", metavar="PROMPT", help="what to draw; several make several traces")
  add("--checkpoint", type=pathlib.Path, metavar="DIR",
      help="weights, in the published layout or Orbax (default: the mini world's, which come with "
           "the package)")
  add("--prompts-file", type=pathlib.Path, metavar="FILE", help="more prompts, one a line, UTF-8")
  add("--image", type=pathlib.Path, metavar="FILE",
      help="edit this image as the prompts say; the result has --size")
  add("--out", type=pathlib.Path, metavar="DIR", help="results (default out/DATE-TIME)")
  add("--config", type=pathlib.Path, metavar="FILE", help="settings, like configs/generate.py")
  add("--system-prompt-file", type=pathlib.Path, metavar="FILE",
      help="replaces the system prompt; an empty file means none")
  add("--seed", type=int, default=0, help="prompt number i (from 0) uses SEED + i (default 0)")
  add("--batch-size", type=int, default=1, metavar="N", help="prompts side by side (default 1)")
  add("--mesh", type=flags.mesh, metavar="AXIS=N,...",
      help="devices by axis, such as data=2,fsdp=2,tensor=2 (default: all on fsdp)")
  add("--dtype", choices=("bfloat16", "float32"), help="dtype of the arithmetic")
  flags.add_shorthands(parser.add_argument_group("settings, short (see the end)"))


def _add_convert(parser):
  parser.set_defaults(run=_convert)
  add = parser.add_argument
  add("source", type=pathlib.Path, metavar="SRC", help="folder to read")
  add("destination", type=pathlib.Path, metavar="DST", help="folder to write")
  add("--to", choices=("published", "orbax"), required=True, help="layout of DST")
  add("--dtype", choices=_DTYPES, help="dtype of DST (default: that of SRC)")


def _add_init(parser):
  parser.set_defaults(run=_init)
  add = parser.add_argument
  add("--config", type=pathlib.Path, required=True, metavar="FILE",
      help="sizes, like configs/tiny.py; --config.FIELD=VALUE changes one")
  add("--out", type=pathlib.Path, required=True, metavar="DIR", help="folder to write")
  add("--seed", type=int, default=0, help="of the weights (default 0)")
