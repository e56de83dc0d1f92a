"""`irg eval`: the benchmarks, from prompts to the paper's table. A verb for each step."""

from irg_jax.commands import eval_generate
from irg_jax.commands import eval_report
from irg_jax.commands import eval_score

_EVAL = """\
GenEval, WISE, TIIF-Bench, GenAI-Bench and OneIG-Bench (English), by their official protocols:
draws the images, scores them, and puts the figures into the paper's table. Both rounds of the
images, each apart. The mini world's own test ("mini") goes the same way.

examples:
  irg eval generate geneval --checkpoint weights/irg-7b --out out/geneval
  irg eval score geneval --out out/geneval --detections detections.jsonl
  irg eval report out/geneval out/wise out/tiif out/genai_bench out/oneig --to out/report
"""


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "eval", description=_EVAL, help="the five benchmarks")
  steps = parser.add_subparsers(dest="step", required=True, metavar="STEP")
  eval_generate.add(steps, new_parser)
  eval_score.add(steps, new_parser)
  eval_report.add(steps, new_parser)
