"""`irg mini`: trains and measures the whole method in a small world of shapes, on two cores."""

from irg_jax.mini import STEPS


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("mini", help="the whole method in a small world")
  actions = parser.add_subparsers(dest="action", metavar="ACTION")
  run = actions.add_parser("run", run=_run, help="train everything from nothing")
  controls = actions.add_parser("controls", run=_controls,
                                help="arms that lack something, and other seeds")
  controls.add_argument("--seeds", type=int, choices=range(1, 100), default=3, metavar="N",
                        help="seeds of training, with that of the run (default 3)")
  actions.add_parser("report", run=_report, help="tables, plots and traces of a run")
  run.add_argument("--until", choices=STEPS, metavar="STEP",
                   help=f"stop after one of {', '.join(STEPS)}")


def _run(args, overrides):
  from irg_jax import compiled
  from irg_jax.mini import run
  compiled.keep_programs()
  return run.run(run.load(args.config, overrides), args.out, args.until)


def _controls(args, overrides):
  from irg_jax import compiled
  from irg_jax.mini import controls, run
  compiled.keep_programs()
  return controls.run_controls(run.load(args.config, overrides), args.out, args.seeds)


def _report(args, _):
  from irg_jax import compiled
  from irg_jax.mini import report
  compiled.keep_programs()
  page = report.run(args.out)
  print(page.with_name("report.md").read_text(encoding="utf-8"))
  print(f"wrote {page}")
