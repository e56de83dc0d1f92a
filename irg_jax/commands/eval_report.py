"""`irg eval report`: the paper's table of what has been scored."""

import pathlib

_REPORT = """\
Puts scored runs, one of each benchmark at most, into the paper's table: all benchmarks, by
category, each round, with the settings, and BAGEL's and IRG's published rows beside it. Writes
TO/report.md, TO/report.json and TO/report.html with pages of every prompt's images, round
beside round, and the judge's words. The pages link the images where they are.

the paper's table:
  irg eval report out/geneval out/wise out/tiif out/genai_bench out/oneig --to out/report
"""


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "report", description=_REPORT,
                      help="the paper's table of scored runs")
  parser.set_defaults(run=_run)
  parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="OUT",
                      help="folders that irg eval score has been through")
  parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("report"), metavar="DIR",
                      help="folder of the report (default report)")


def _run(args, _):
  from irg_jax.reports import trace
  from irg_jax.evaluate import report
  runs = report.load(args.runs)
  trace.check_output_folder(args.to)
  page = report.write(runs, args.to)
  print(report.table_text(report.build(runs)))
  print(f"wrote {page}")
