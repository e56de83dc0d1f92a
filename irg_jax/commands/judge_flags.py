"""The flags of `irg eval score` that say which judge is asked, and how."""

import pathlib

KEY_NOTE = """\
the judge's key is read from the environment variable OPENAI_API_KEY and is written nowhere; an
endpoint of your own usually wants none. Answers are kept in OUT/judge_cache.jsonl by what was
asked, so that the same command, stopped or finished, pays for nothing twice.
"""


def add(parser) -> None:
  """Adds the flags as a group of their own."""
  add_flag = parser.add_argument_group("judge (any endpoint in OpenAI's form)").add_argument
  add_flag("--judge-url", metavar="URL", help="base address, such as http://localhost:8000/v1")
  add_flag("--judge-model", metavar="NAME", help="its name at the endpoint")
  add_flag("--temperature", type=float, metavar="X",
           help="of the judge (default: the official script's: wise 0, tiif 1, oneig 0; "
                "genai_bench 1, as what counts there is a probability)")
  add_flag("--template", action="append", default=[], type=_template, metavar="[NAME=]FILE",
           help="your wording of the question, JSON with \"user\" and \"system\"; for oneig NAME "
                "is alignment or text")
  add_flag("--concurrency", type=int, default=8, metavar="N", help="requests at a time (8)")
  add_flag("--timeout", type=float, default=120.0, metavar="S", help="seconds of one try (120)")
  add_flag("--tries", type=int, default=8, metavar="N",
           help="of a request that fails (8), with growing waits or as Retry-After says")
  add_flag("--asks", type=int, default=3, metavar="N",
           help="answers asked for until one can be parsed (3)")
  add_flag("--judge-cache", type=pathlib.Path, metavar="FILE",
           help="where answers are kept (default OUT/judge_cache.jsonl)")


def settings(args, benchmark: str):
  """The `judge.Settings` of parsed flags.

  Raises:
    ValueError: no endpoint or model is named, or a value cannot be; names the flag.
  """
  from irg_jax.evaluate import judge_types, questions
  official = questions.OFFICIAL[benchmark]
  for flag in ("judge_url", "judge_model"):
    if not getattr(args, flag):
      raise ValueError(f"--{flag.replace('_', '-')}: say which judge to ask; the official one of "
                       f"{benchmark} is {official.judge}")
  temperature = official.temperature if args.temperature is None else args.temperature
  return judge_types.Settings(
      args.judge_url, args.judge_model, temperature=temperature, concurrency=args.concurrency,
      timeout=args.timeout, tries=args.tries, asks=args.asks)


def wording(args, benchmark: str) -> dict:
  """The templates that --template names, by their key in `templates.BUILT_IN`.

  Raises:
    ValueError: a file is unfit, or its name is none of this benchmark's.
  """
  from irg_jax.evaluate import templates
  mine = [name for name in templates.BUILT_IN if name.startswith(benchmark)]
  result = {}
  for name, path in args.template:
    full = benchmark if not name else f"{benchmark}_{name}"
    if full not in mine:
      known = ", ".join(n.removeprefix(benchmark).lstrip("_") or "no NAME=" for n in mine)
      raise ValueError(f"--template {name + '=' if name else ''}{path}: {benchmark} knows {known}")
    result[full] = templates.load(path, full)
  return result


def describe(judge_settings, benchmark: str, words: dict) -> dict:
  """What a result file says of the judge: all that decides an answer."""
  from irg_jax.evaluate import templates
  every = {name: built_in for name, (built_in, _) in templates.BUILT_IN.items()
           if name.startswith(benchmark)} | words
  return {"url": judge_settings.url, "model": judge_settings.model,
          "temperature": judge_settings.temperature, "asks": judge_settings.asks,
          "templates": {n: {"system": t.system, "user": t.user} for n, t in every.items()}}


def _template(text):
  name, equals, path = text.partition("=")
  named = equals and name in ("alignment", "text")  # else the = belongs to the file's name
  return (name, pathlib.Path(path)) if named else ("", pathlib.Path(text))
