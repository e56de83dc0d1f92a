"""`irg mini`: trains and measures the whole method in a small world of shapes, on two cores."""

import pathlib

from irg_jax.mini import STEPS


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("mini", help="the whole method in a small world")
  actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
  run = actions.add_parser("run", run=_run, help="train everything from nothing")
  report = actions.add_parser("report", run=_report, help="tables, plots and traces of a run")
  for action in (run, report):
    action.add_argument("--out", default=pathlib.Path("out", "mini"), metavar="DIR",
                        help="folder of the run (default out/mini)")
  run.add_argument("--config", default=pathlib.Path("configs", "mini.py"), metavar="FILE",
                   help="sizes and steps (default configs/mini.py); --config.FIELD=VALUE sets one")
  run.add_argument("--until", choices=STEPS, metavar="STEP",
                   help=f"stop after one of {', '.join(STEPS)}")


def _run(args, overrides):
  from absl import logging
  from irg_jax.mini import run
  logging.set_verbosity(logging.FATAL)  # Orbax raises its errors too
  return run.run(run.load(args.config, overrides), args.out, args.until)


def _report(args, _):
  from irg_jax.mini import report
  page = report.run(args.out)
  print(page.with_name("report.md").read_text(encoding="utf-8"))
  print(f"wrote {page}")
