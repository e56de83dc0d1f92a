# PYTHON_ARGCOMPLETE_OK
"""The console command `irg`: parses flags, then calls the library.

JAX is imported inside the verbs, so that `--help`, completion and a mistyped flag answer at once.
"""

import os
import sys

import argcomplete

import irg_jax
from irg_jax.commands import (
    ask, convert, data, demo, fetch, generate, init, mini, plan, rl, serve, train)
from irg_jax.commands import eval as eval_verb
from irg_jax.commands.flags import Parser
from irg_jax.messages import message

VERBS = (generate, ask, serve, demo, fetch, convert, init, train, rl, data, eval_verb, mini, plan)


def main(argv=None) -> int:
  """Runs the command line `argv` (default: the process's) and returns the exit status."""
  argv = sys.argv[1:] if argv is None else argv
  end = argv.index("--") if "--" in argv else len(argv)
  fields = [a for a in argv[:end] if a.startswith("--config.")]  # argparse knows no such names
  overrides = [field.removeprefix("--config.") for field in fields]
  parser = make_parser()
  argcomplete.autocomplete(parser, always_complete_options=False)  # if a shell asks for it
  args = parser.parse_args([a for a in argv[:end] if a not in fields] + argv[end:])
  try:
    if overrides and not hasattr(args, "config"):
      raise ValueError(f"has no configuration, so {fields[0]} means nothing")
    return args.run(args, overrides) or 0
  except (ValueError, OSError) as e:
    if os.environ.get("IRG_DEBUG") == "1":
      raise
    print(f"irg {args.verb}: error: {message(e)}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f"irg {args.verb}: interrupted", file=sys.stderr)
    return 130


def make_parser() -> Parser:
  """Parser of all verbs; the parsed `run(args, overrides)` is the verb's function."""
  parser = Parser(prog="irg")
  parser.add_argument("--version", action="version", version=f"irg_jax {irg_jax.__version__}")
  verbs = parser.add_subparsers(dest="verb", metavar="VERB")
  for verb in VERBS:
    verb.add(verbs)
  return parser
