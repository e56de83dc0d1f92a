"""`irg demo`: a web page on which the model thinks, draws, looks and draws again."""

from irg_jax.commands import serve


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  serve.add_flags(verbs.add_parser("demo", run=_run, help="show it on a web page"))


def _run(args, overrides):
  serve.check_installed("demo", "gradio")
  inputs = serve.make_inputs(args, overrides)
  from irg_jax import compiled
  from irg_jax.serve import demo, run
  compiled.keep_programs()
  run.run_serve(inputs, demo.page)
