"""The console command `irg`: parses flags, then calls the library.

JAX is imported inside the verbs, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import os
import re
import sys

from irg_jax.commands import convert, data, flags, generate, init, mini, plan, train
from irg_jax.commands import eval as eval_verb

VERBS = (generate, convert, init, train, data, eval_verb, mini, plan)

_MAIN = """\
Interleaved reasoning generation: think, draw, look, think again, draw better.

examples:
  irg generate "two red circles and a blue star"
  irg generate "a red cube on a blue sphere" --checkpoint weights/irg-7b
  irg convert weights/irg-7b weights/irg-7b-orbax --to orbax --dtype bfloat16
  irg train --config configs/irgl.py:tiny
  irg eval generate BENCH --checkpoint weights/irg-7b --out out/BENCH
"""


def main(argv=None) -> int:
  """Runs the command line `argv` (default: the process's) and returns the exit status."""
  overrides, argv = _split_overrides(sys.argv[1:] if argv is None else argv)
  parser = make_parser()
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


def make_parser() -> argparse.ArgumentParser:
  """Parser of all verbs; the parsed `run(args, overrides)` is the verb's function."""
  parser = flags.new_parser(argparse.ArgumentParser, prog="irg", description=_MAIN)
  verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
  for verb in VERBS:
    verb.add(verbs, flags.new_parser)
  return parser


def _split_overrides(argv):
  """Takes `--config.field=value` out of `argv`: argparse has no flags of unknown name."""
  end = argv.index("--") if "--" in argv else len(argv)
  is_override = [i < end and re.match(r"--config\.", a) is not None for i, a in enumerate(argv)]
  taken = [a.removeprefix("--config.") for a, o in zip(argv, is_override) if o]
  return taken, [a for a, o in zip(argv, is_override) if not o]
