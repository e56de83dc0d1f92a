"""`irg serve`: an HTTP server in the form of OpenAI's API."""

import importlib.util

from irg_jax.commands import flags


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  add_flags(verbs.add_parser("serve", run=_run, help="serve images and chat over HTTP"))


def add_flags(parser) -> None:
  """Adds the flags of a server, and of what it accepts."""
  flags.add_generation(parser)
  parser.add_argument("--also-size", action="append", type=flags.size, metavar="S or WxH",
                      help="another size of images, beside --size; several are possible")
  parser.add_shared("serve")


def _run(args, overrides):
  inputs = make_inputs(args, overrides)
  from irg_jax import compiled
  from irg_jax.serve import run
  compiled.keep_programs()
  run.run_serve(inputs)


def make_inputs(args, overrides):
  """Checks the parsed flags and returns them as `serve.run.Inputs`.

  Raises:
    ValueError: names the flag, the file, or the extra that is not installed.
  """
  check_installed("serve", "uvicorn", "starlette", "prometheus_client", "python_multipart")
  checkpoint = flags.checkpoint(args.checkpoint)
  settings, system_prompt = flags.read_settings(args, overrides, checkpoint)
  if not 0 <= args.port < 2**16:
    raise ValueError(f"--port {args.port}: must be from 0 (any free one) to 65535")
  if args.workers < 0:
    raise ValueError(f"--workers {args.workers}: must be 0 (as many as pay) or more")
  from irg_jax.serve.run import Inputs
  from irg_jax.serve.work import Limits
  limits = Limits(
      sizes=tuple(dict.fromkeys([(settings.width, settings.height), *(args.also_size or ())])),
      batch_size=args.batch_size, rounds=max(args.max_rounds or 0, settings.rounds),
      steps=args.max_steps or 2 * settings.steps, images=args.max_images, n=args.max_n,
      queue=args.queue, workers=args.workers, seconds=args.timeout)
  if limits.steps < settings.steps:
    raise ValueError(f"--max-steps {args.max_steps}: fewer than the {settings.steps} of --steps")
  return Inputs(
      checkpoint=checkpoint, settings=settings, system_prompt=system_prompt, limits=limits,
      host=args.host, port=args.port, name=args.name or checkpoint.name,
      load=flags.model_options(args))


def check_installed(extra, *modules):
  """Raises ValueError if a module of an extra is not installed."""
  if missing := [name for name in modules if importlib.util.find_spec(name) is None]:
    raise ValueError(f"{missing[0]} is not installed; pip install 'irg_jax[{extra}]'")
