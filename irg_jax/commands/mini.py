"""`irg mini`: trains and measures the whole method in a small world of shapes, on two cores."""

import pathlib

from irg_jax.mini import STEPS

_MINI = "The paper in miniature: from nothing to a trained model and its tables, on two cores."

_RUN = """\
Runs all steps in order: the autoencoder, the base model, its first images and the verifier's
verdicts on them, the trajectories, both stages of training, and the report. Stop it at any time:
the same command continues it.

examples:
  irg mini run --out out/mini
  irg mini run --out out/mini --until base
  irg mini run --out out/mini7 --config.seed=7 --config.trajectories=20000
  irg mini run --out out/long --config.train="('stage2.steps=8000',)"
"""

_REPORT = """\
Writes tables, plots and a page for a finished run, from the images of its last step:
OUT/report/index.html, report.md, report.json, scores.png, tasks.png. If there is no run in --out,
the package's checkpoint is tested there; the other rows are then those of the run that made it,
and marked so.

examples:
  irg mini report --out out/mini
  irg mini report --out out/shipped              no run there: the package's checkpoint
"""


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("mini", description=_MINI, help="the whole method in a small world")
  actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
  run = actions.add_parser("run", run=_run, description=_RUN, help="train everything from nothing")
  report = actions.add_parser("report", run=_report, description=_REPORT,
                              help="tables, plots and traces of a run")
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
