"""`irg eval`: generate a benchmark's images, score them, report. Flags and messages only.

Names, flags and examples come from the registered benchmarks, whose import takes time: the parser
of a step is filled when it is used.
"""

import collections
import contextlib
import dataclasses
import importlib
import os
import pathlib
import sys
import tomllib

from irg_jax.commands import flags

_TEXTS = tomllib.loads(pathlib.Path(__file__).with_name("eval.toml").read_text(encoding="utf-8"))
# Of the published evaluation; all else is as in irg generate. A checkpoint with a generate.json
# says itself how it is to be used.
_THINK_LIMIT = 4096
_COUNTS = ("concurrency", "timeout", "tries", "asks")  # flags of `questions.JudgeSettings`


class _StepParser(flags.Parser):
  """A parser that calls `fill(self)` when it is first used."""

  fill = None

  def parse_known_args(self, args=None, namespace=None):
    self.make_complete()
    return super().parse_known_args(args, namespace)

  def make_complete(self):
    if self.fill:
      fill, self.fill = self.fill, None
      fill(self)


def add(verbs) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = verbs.add_parser("eval", description=_TEXTS["description"], help="the benchmarks")
  steps = parser.add_subparsers(dest="step", metavar="STEP", parser_class=_StepParser)
  for name, fill, text in (("generate", _fill_generate, "images for a benchmark's prompts"),
                           ("score", _fill_score, "score a benchmark's images"),
                           ("report", _fill_report, "the paper's table of scored runs")):
    step = steps.add_parser(name, help=text)
    step.fill = fill
    if f" eval {name} " in os.environ.get("COMP_LINE", ""):  # argcomplete looks at it unused
      step.make_complete()


def benchmarks() -> dict:
  """All benchmarks by name, the mini world's included."""
  from irg_jax import evaluate
  importlib.import_module("irg_jax.mini.benchmark")  # registers itself
  return evaluate.BENCHMARKS


def _fill_generate(parser):
  _fill(parser, "generate", _generate)
  tasks = ", ".join(b.tasks_help for b in benchmarks().values())
  parser.add_table(_TEXTS["generate"]["flags"], tasks=tasks)
  parser.add_shared("hosts")
  flags.add_generation(parser, think_limit=_THINK_LIMIT)


def _fill_score(parser):
  _fill(parser, "score", lambda args, _: _score(args, parser))
  for name, by_benchmark in _flags().items():
    help = "; ".join(f"{benchmark}: {flag['help']}" for benchmark, flag in by_benchmark.items())
    options = next(iter(by_benchmark.values())) | {"help": help}
    if kind := {"N": flags.count, "X": float}.get(options["metavar"]):
      options["type"] = kind
    parser.add_argument(name, **options)
  _add_judge(parser.add_argument_group("judge (any endpoint in OpenAI's form)").add_argument)


def _fill_report(parser):
  parser.description = _TEXTS["report"]["description"].format(
      folders=" ".join(f"out/{b.name}" for b in benchmarks().values() if b.published))
  parser.set_defaults(run=lambda args, _: _report(args))
  parser.add_table(_TEXTS["report"]["flags"])


def _fill(parser, step, run):
  """Texts and common flags of `generate` and `score`."""
  by_name = lambda attribute: "\n".join(
      f"  {name:<12} " + getattr(b, attribute).replace("\n", "\n" + " " * 15)
      for name, b in benchmarks().items())
  parser.description = _TEXTS[step]["description"].format(**_examples(step))
  parser.epilog = _TEXTS[step]["epilog"].format(
      images_help=by_name("images_help"), sources=by_name("sources"))
  parser.set_defaults(run=run)
  packaged = " and ".join(b.name for b in benchmarks().values() if b.packaged)
  add = parser.add_argument
  add("benchmark", choices=benchmarks(), metavar="BENCH", help=", ".join(benchmarks()))
  add("--prompts", metavar="PATH",
      help=f"the official prompt file or folder; that of {packaged} comes with this package")
  add("--out", required=True, metavar="DIR",
      help="folder of the run, which irg eval generate makes or continues")


def _examples(step):
  """Example command lines: the paper's, of other benchmarks, and further ones."""
  lines = {"paper": [], "others": [], "more": []}
  for name, b in benchmarks().items():
    prompts = f"--prompts {b.example_prompts} \\\n      " if b.example_prompts else ""
    out = f"out/{name}" if b.published else f"out/{name}-test"
    weights = f"--checkpoint {b.example_checkpoint} " if b.example_checkpoint else ""
    words = {"generate": f"{prompts}{weights}--out {out}",
             "score": f"--out {out} {prompts}{b.example_score}"}[step]
    lines["paper" if b.published else "others"].append(f"{name} {words}")
    lines["more"] += [f"{name} {words}" for words in b.more_examples.get(step, ())]
  return {kind: "\n".join(f"  irg eval {step} {line}".rstrip() for line in found)
          for kind, found in lines.items()}


def _flags():
  """{flag: {benchmark: its arguments of `add_argument`}}."""
  found = collections.defaultdict(dict)
  for benchmark in benchmarks().values():
    for name, options in benchmark.flags.items():
      found[name][benchmark.name] = options
  return found


def _add_judge(add):
  judged = [b for b in benchmarks().values() if b.official]
  temperatures = ", ".join(f"{b.name} {b.official.temperature:g}" for b in judged)
  parts = {b.name: [n.removeprefix(f"{b.name}_") for n in b.templates if n != b.name]
           for b in judged}
  named = "; ".join(f"for {name} NAME is {' or '.join(p)}" for name, p in parts.items() if p)
  from irg_jax.evaluate.questions import JudgeSettings
  settings = {field.name: field for field in dataclasses.fields(JudgeSettings)}
  add("--judge-url", metavar="URL", help=settings["url"].metadata["doc"])
  add("--judge-model", metavar="NAME", help=settings["model"].metadata["doc"])
  add("--temperature", type=float, metavar="X",
      help=f"of the judge (default: the official script's: {temperatures})")
  add("--template", action="append", default=[], metavar="[NAME=]FILE",
      help=f"your wording of the question, JSON with \"user\" and \"system\"; {named}")
  for name in _COUNTS:
    default = settings[name].default
    add(f"--{name}", type=type(default), default=default, metavar="N",
        help=f"{settings[name].metadata['doc']} ({default:g})")
  add("--answer-limit", type=flags.count, metavar="N",
      help=settings["answer_limit"].metadata["doc"])
  add("--max-completion-tokens", action="store_true",
      help=settings["completion_tokens"].metadata["doc"])
  add("--no-temperature", action="store_true", help="send no temperature")
  add("--strict-official", action="store_true", help=settings["strict"].metadata["doc"])
  add("--judge-cache", metavar="FILE", type=flags.path,
      help="where answers are kept (default OUT/judge_cache.sqlite)")


def _generate(args, overrides):
  checkpoint = flags.checkpoint(args.checkpoint)
  if args.checkpoint is None:
    print("no --checkpoint: the mini world's, in the package, is used", file=sys.stderr)
  flags.check_hosts(args)
  benchmark = benchmarks()[args.benchmark]
  items = benchmark.read(args.prompts)
  if not args.subset:
    benchmark.check_counts(items)
  selected = benchmark.select(items, args.tasks, args.limit)
  from irg_jax import compiled
  from irg_jax.evaluate import generate
  from irg_jax.generate.settings import Settings
  settings, system_prompt = flags.read_settings(
      args, overrides, checkpoint, Settings(think_limit=_THINK_LIMIT))
  asked = generate.Request(
      benchmark=benchmark, items=tuple(items), selected=tuple(selected), out=args.out,
      checkpoint=checkpoint, settings=settings, system_prompt=system_prompt,
      batch_size=args.batch_size, process_id=args.process_id, num_processes=args.num_processes,
      **flags.model_options(args))
  compiled.keep_programs()
  result = generate.generate_images(asked)
  for name in result.failed[:20]:
    print(f"no image (its latents are not finite): {name}", file=sys.stderr)
  share = "" if args.num_processes == 1 else f" of process {args.process_id}"
  print(f"{benchmark.name}: {result.generated} images drawn, {result.kept} were there already"
        f"{share}; {len(result.failed)} failed")
  roots = ", ".join(str(args.out / f"round{n + 1}") for n in range(settings.rounds))
  print(f"for the official scorer: {roots}; thoughts: {args.out / 'traces'}")


def _score(args, parser):
  _check_flags(args, parser)
  benchmark = benchmarks()[args.benchmark]
  from irg_jax.evaluate import report, score
  folder = score.open_folder(benchmark, args.out, args.prompts)
  result = benchmark.score(folder, args, lambda: _open_judge(args, benchmark))
  print(*report.round_lines(report.Scored(folder.out, result)), sep="\n")
  print(f"wrote {folder.out / score.SCORES}")


def _check_flags(args, parser):
  """Refuses flags of other benchmarks, which would do nothing, and files that are not there."""
  users = {name: list(by_benchmark) for name, by_benchmark in _flags().items()}
  judged = [b.name for b in benchmarks().values() if b.official]
  _add_judge(lambda name, **_: users.update({name: judged}))
  for name, names in users.items():
    attribute = name[2:].replace("-", "_")
    value = getattr(args, attribute)
    if value != parser.get_default(attribute) and args.benchmark not in names:
      raise ValueError(f"{name} is for {', '.join(names)} only")
    for path in value if isinstance(value, list) else [value]:
      if (isinstance(path, pathlib.PurePath) and name not in ("--questions", "--judge-cache")
          and not path.is_file()):
        raise ValueError(f"{path}: no such file")


@contextlib.contextmanager
def _open_judge(args, benchmark):
  for flag in ("judge_url", "judge_model"):
    if not getattr(args, flag):
      raise ValueError(f"--{flag.replace('_', '-')}: say which judge to ask; the official one of "
                       f"{benchmark.name} is {benchmark.official.judge}")
  from irg_jax.evaluate import judge, questions
  warmth = benchmark.official.temperature if args.temperature is None else args.temperature
  if args.no_temperature and args.temperature is not None:
    raise ValueError("--no-temperature, --temperature: give one of them")
  settings = questions.JudgeSettings(
      args.judge_url, args.judge_model, None if args.no_temperature else warmth,
      answer_limit=args.answer_limit, completion_tokens=args.max_completion_tokens,
      strict=args.strict_official, **{name: getattr(args, name) for name in _COUNTS})
  templates = questions.chosen_templates(benchmark, args.template)
  with judge.Judge(settings, args.judge_cache or args.out / judge.CACHE) as opened:
    if opened.lost:
      print(f"{opened.lost} lines of the judge's old cache were cut short; they are asked again")
    yield questions.OpenJudge(opened.ask, templates,
                              questions.judge_record(settings, benchmark, templates))
    print(f"judge: {opened.account}")


def _report(args):
  from irg_jax.evaluate import report
  from irg_jax.storage import check_output_folder
  benchmarks()
  runs = report.load(args.runs)
  check_output_folder(args.to)
  print(report.table_text(report.write(runs, args.to)))
  print(f"wrote {args.to / 'report.html'}")
