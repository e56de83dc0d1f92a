"""`irg eval`: the five benchmarks, from prompts to the paper's table. A verb for each step."""

from irg_jax.commands import eval_generate

_EVAL = """\
Generates for GenEval, WISE, TIIF-Bench, GenAI-Bench and OneIG-Bench (English), by their official
protocols: both rounds of the pictures, each apart.

examples:
  irg eval generate geneval --checkpoint weights/irg-7b --out out/geneval
"""


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "eval", description=_EVAL, help="the five benchmarks")
  steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
  eval_generate.add(steps, new_parser)
