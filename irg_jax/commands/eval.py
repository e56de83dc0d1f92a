"""`irg eval`: generate a benchmark's images, score them, report. Flags and messages only.

The names, flags and examples come from the registered benchmarks, whose import takes time: a step's
parser is filled when it is used.
"""

import argparse
import contextlib
import importlib
import pathlib
import sys

from irg_jax.commands import flags

_EVAL = """\
Benchmarks by their official protocols: generates the images, scores them, and puts the figures into
the paper's table. Every round of the images is scored apart.

examples:
  irg eval generate geneval --checkpoint weights/irg-7b --out out/geneval
  irg eval score geneval --out out/geneval --detections detections.jsonl
  irg eval report out/geneval out/wise out/tiif out/genai_bench out/oneig --to out/report
"""

_GENERATE = """\
Generates images for every prompt of a benchmark, in the layout of its official scorer, each round
under a root of its own: OUT/round1, OUT/round2, ... Thoughts are in OUT/traces. Kill it at any
time: the same command continues, and nothing is done twice. An image's seed depends on the
benchmark, the prompt's id and the image's number alone.

the paper's setting (what is not given below is the default; --batch-size is yours to choose):
{paper}

  which is the same as --rounds 2 --size 1024 --steps 50 --think-limit 4096 --temperature 0.3 \\
      --text-scale 4.0 --image-scale 2.0 \\
      --config.first.interval="(0.4, 1.0)" --config.first.renorm=global \\
      --config.later.interval="(0.0, 1.0)" --config.later.renorm=text_channel

with the settings that the checkpoint comes with:
{others}

more examples:
{more}
"""

_GENERATE_END = """\
images of a prompt:
{images}

several hosts: each takes every N-th prompt into the common --out. Without a common folder, give
each a folder of its own and copy them into one afterwards: no file is in two of them, but for
run.json, which is the same.
"""

_SCORE = """\
Scores the images of irg eval generate by the benchmark's official protocol, each round apart.
Writes OUT/scores.json (the figures), and OUT/items.jsonl (each prompt's, with the judge's words).
What cannot be scored is counted by reason and never becomes a number.

the paper's setting:
{paper}

others:
{others}

more examples:
{more}
"""

_SCORE_END = """\
where the answers come from:
{sources}

the judge's key is read from the environment variable OPENAI_API_KEY and is written nowhere; an
endpoint of your own usually wants none. Answers are kept in OUT/judge_cache.sqlite by what was
asked, so that the same command, stopped or finished, pays for nothing twice. A judge_cache.jsonl of
an older version is imported once.
"""

_REPORT = """\
Puts scored runs, one of each benchmark at most, into the paper's table: all benchmarks, by
category, each round, with the settings, and BAGEL's and IRG's published rows beside it. Writes
TO/report.md, TO/report.json and TO/report.html with pages of every prompt's images, round
beside round, and the judge's words. The pages link the images where they are.

the paper's table:
  irg eval report out/geneval out/wise out/tiif out/genai_bench out/oneig --to out/report
"""

# Of the published evaluation; all else is as in irg generate. A checkpoint with a generate.json
# says itself how it is to be used.
_THINK_LIMIT = 4096
_JUDGE = ("judge_url", "judge_model", "temperature", "template", "concurrency", "timeout", "tries",
          "asks", "judge_cache")


class _StepParser(argparse.ArgumentParser):
  """A parser that calls `fill(self)` when it is first used."""

  fill = None

  def parse_known_args(self, args=None, namespace=None):
    if self.fill:
      fill, self.fill = self.fill, None
      fill(self)
    return super().parse_known_args(args, namespace)


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  parser = new_parser(verbs.add_parser, "eval", description=_EVAL, help="the benchmarks")
  steps = parser.add_subparsers(dest="step", required=True, metavar="STEP",
                                parser_class=_StepParser)
  for name, fill, text in (("generate", _fill_generate, "images for a benchmark's prompts"),
                           ("score", _fill_score, "score a benchmark's images"),
                           ("report", _fill_report, "the paper's table of scored runs")):
    new_parser(steps.add_parser, name, help=text).fill = fill


def benchmarks() -> dict:
  """All benchmarks by name, the mini world's included."""
  from irg_jax import evaluate
  importlib.import_module("irg_jax.mini.benchmark")  # registers itself
  return evaluate.BENCHMARKS


def _fill_generate(parser):
  every = benchmarks().values()
  parser.description = _GENERATE.format(**_examples("generate"))
  parser.epilog = _GENERATE_END.format(images=_by_name("images_help"))
  parser.set_defaults(run=_generate)
  add = parser.add_argument
  _add_benchmark(parser)
  add("--checkpoint", type=pathlib.Path, required=True, metavar="DIR",
      help="weights, in the published layout or Orbax; a generate.json there has the defaults")
  add("--out", type=pathlib.Path, required=True, metavar="DIR",
      help="folder of the run, new or to be continued")
  add("--tasks", nargs="+", metavar="TASK",
      help=f"only these: {', '.join(b.tasks_help for b in every)}")
  add("--limit", type=flags.count, metavar="N", help="only the first N prompts (of --tasks)")
  add("--subset", action="store_true",
      help="the prompts need not be as many as published; the scores then compare with nothing")
  add("--batch-size", type=flags.count, default=1, metavar="N",
      help="images side by side (default 1)")
  add("--config", type=pathlib.Path, metavar="FILE", help="settings, like configs/generate.py")
  add("--system-prompt-file", type=pathlib.Path, metavar="FILE",
      help="replaces the system prompt; an empty file means none")
  add("--mesh", type=flags.mesh, metavar="AXIS=N,...",
      help="devices by axis, such as data=2,fsdp=2,tensor=2 (default: all on fsdp)")
  add("--dtype", choices=("bfloat16", "float32"), help="dtype of the arithmetic")
  flags.add_hosts(parser)
  flags.add_shorthands(parser.add_argument_group("settings, short"), think_limit=_THINK_LIMIT)


def _fill_score(parser):
  parser.description = _SCORE.format(**_examples("score"))
  parser.epilog = _SCORE_END.format(sources=_by_name("sources"))
  parser.set_defaults(run=lambda args, _: _score(args, parser))
  add = parser.add_argument
  _add_benchmark(parser)
  add("--out", type=pathlib.Path, required=True, metavar="DIR",
      help="folder of the images, as irg eval generate wrote it")
  for name, by_benchmark in _flags().items():
    help = "; ".join(f"{benchmark}: {flag.help}" for benchmark, flag in by_benchmark.items())
    add(name, help=help, **next(iter(by_benchmark.values())).options)
  _add_judge(parser.add_argument_group("judge (any endpoint in OpenAI's form)").add_argument)


def _fill_report(parser):
  parser.description = _REPORT
  parser.set_defaults(run=_report)
  parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="OUT",
                      help="folders that irg eval score has been through")
  parser.add_argument("--to", type=pathlib.Path, default=pathlib.Path("report"), metavar="DIR",
                      help="folder of the report (default report)")


def _add_benchmark(parser):
  packaged = [b.name for b in benchmarks().values() if b.packaged]
  parser.add_argument("benchmark", choices=benchmarks(), metavar="BENCH",
                      help=", ".join(benchmarks()))
  parser.add_argument("--prompts", type=pathlib.Path, metavar="PATH",
                      help="the official prompt file or folder; that of "
                           f"{' and '.join(packaged)} comes with this package")


def _add_judge(add):
  judged = [b for b in benchmarks().values() if b.official]
  temperatures = ", ".join(f"{b.name} {b.official.temperature:g}" for b in judged)
  parts = {b.name: [n.removeprefix(f"{b.name}_") for n in b.templates if n != b.name]
           for b in judged}
  named = "; ".join(f"for {name} NAME is {' or '.join(p)}" for name, p in parts.items() if p)
  add("--judge-url", metavar="URL", help="base address, such as http://localhost:8000/v1")
  add("--judge-model", metavar="NAME", help="its name at the endpoint")
  add("--temperature", type=float, metavar="X",
      help=f"of the judge (default: the official script's: {temperatures})")
  add("--template", action="append", default=[], metavar="[NAME=]FILE",
      help=f"your wording of the question, JSON with \"user\" and \"system\"; {named}")
  add("--concurrency", type=int, default=8, metavar="N", help="questions at a time (8)")
  add("--timeout", type=float, default=120.0, metavar="S", help="seconds of one try (120)")
  add("--tries", type=int, default=8, metavar="N",
      help="of a question that fails (8), with growing waits or as Retry-After says")
  add("--asks", type=int, default=3, metavar="N",
      help="answers asked for until one can be parsed (3)")
  add("--judge-cache", type=pathlib.Path, metavar="FILE",
      help="where answers are kept (default OUT/judge_cache.sqlite)")


def _by_name(attribute):
  """A text of each benchmark, beside its name."""
  return "\n".join(f"  {name:<12} " + getattr(b, attribute).replace("\n", "\n" + " " * 15)
                   for name, b in benchmarks().items())


def _examples(step):
  """Example command lines: the paper's, of other benchmarks, and further ones."""
  lines = {True: [], False: []}
  for b in benchmarks().values():
    prompts = f"--prompts {b.example_prompts} \\\n      " if b.example_prompts else ""
    out = f"out/{b.name}" if b.published else f"out/{b.name}-test"
    words = {"generate": f"{prompts}--checkpoint {b.example_checkpoint} --out {out}",
             "score": f"--out {out} {prompts}{b.example_score}"}[step]
    lines[bool(b.published)].append(f"  irg eval {step} {b.name} {words}".rstrip())
  more = [f"  irg eval {step} {b.name} {words}" for b in benchmarks().values()
          for words in b.more_examples.get(step, ())]
  return {"paper": "\n".join(lines[True]), "others": "\n".join(lines[False]),
          "more": "\n".join(more)}


def _flags():
  """{flag: {benchmark: base.Flag}}."""
  found = {}
  for benchmark in benchmarks().values():
    for flag in benchmark.flags:
      found.setdefault(flag.name, {})[benchmark.name] = flag
  return found


def _generate(args, overrides):
  if not args.checkpoint.is_dir():
    raise ValueError(f"--checkpoint {args.checkpoint}: no such folder")
  flags.check_hosts(args)
  benchmark = benchmarks()[args.benchmark]
  items = benchmark.read(args.prompts)
  if not args.subset:
    _check_counts(benchmark, args, items)
  selected = benchmark.select(items, args.tasks, args.limit)
  from irg_jax import config
  from irg_jax.generate.settings import Settings
  settings, system_prompt = flags.read_settings(
      args, overrides, args.checkpoint, Settings(think_limit=_THINK_LIMIT))
  from irg_jax.evaluate import generate
  asked = generate.Request(
      benchmark=benchmark, items=tuple(items), selected=tuple(selected), out=args.out,
      checkpoint=args.checkpoint, settings=settings,
      system_prompt=system_prompt,
      batch_size=args.batch_size, mesh=args.mesh, dtype=args.dtype, process_id=args.process_id,
      num_processes=args.num_processes)
  _print_result(asked, generate.generate_images(asked))


def _check_counts(benchmark, args, items):
  try:
    benchmark.check_counts(items)
  except ValueError as e:
    raise ValueError(f"--prompts {args.prompts or 'of this package'}: {e}; is it complete? With "
                     "--subset it is taken as it is") from e


def _print_result(request, result):
  for name in result.failed[:20]:
    print(f"no image (its latents are not finite): {name}", file=sys.stderr)
  if len(result.failed) > 20:
    print(f"... {len(result.failed)} in all", file=sys.stderr)
  share = "" if request.num_processes == 1 else f" of process {request.process_id}"
  print(f"{request.benchmark.name}: {result.drawn} images drawn, {result.kept} were there already"
        f"{share}; {len(result.failed)} failed")
  roots = ", ".join(str(request.out / f"round{n + 1}") for n in range(request.settings.rounds))
  print(f"for the official scorer: {roots}; thoughts: {request.out / 'traces'}")


def _score(args, parser):
  _check_flags(args, parser)
  benchmark = benchmarks()[args.benchmark]
  from irg_jax.evaluate import report, score
  folder = score.open_folder(benchmark, args.out, args.prompts)
  result = benchmark.score(folder, args, lambda: _open_judge(args, benchmark))
  print(*report.round_lines(report.Scored(folder.out, result)), sep="\n")
  print(f"wrote {folder.out / score.SCORES}")


def _check_flags(args, parser):
  """A flag that another benchmark would use, and that would do nothing here, is a mistake."""
  users = {name[2:].replace("-", "_"): list(by) for name, by in _flags().items()}
  users |= dict.fromkeys(_JUDGE, [b.name for b in benchmarks().values() if b.official])
  for name, names in users.items():
    value = getattr(args, name)
    if value != parser.get_default(name) and args.benchmark not in names:
      raise ValueError(f"--{name.replace('_', '-')} is for {', '.join(names)} only")
  for flag in benchmarks()[args.benchmark].flags:
    value = getattr(args, flag.name[2:].replace("-", "_"))
    for path in value if isinstance(value, list) else [value]:
      if flag.options["metavar"] == "FILE" and path and not path.is_file():
        raise ValueError(f"{path}: no such file")


@contextlib.contextmanager
def _open_judge(args, benchmark):
  for flag in ("judge_url", "judge_model"):
    if not getattr(args, flag):
      raise ValueError(f"--{flag.replace('_', '-')}: say which judge to ask; the official one of "
                       f"{benchmark.name} is {benchmark.official.judge}")
  from irg_jax.evaluate import judge, questions
  official = benchmark.official.temperature
  settings = questions.JudgeSettings(
      args.judge_url, args.judge_model, concurrency=args.concurrency, timeout=args.timeout,
      temperature=official if args.temperature is None else args.temperature, tries=args.tries,
      asks=args.asks)
  templates = questions.chosen_templates(benchmark, args.template)
  with judge.Judge(settings, args.judge_cache or args.out / judge.CACHE) as opened:
    if opened.lost:
      print(f"{opened.lost} lines of the judge's old cache were cut short; they are asked again")
    yield questions.OpenJudge(opened.ask, templates,
                              questions.judge_record(settings, benchmark, templates))
    print(f"judge: {opened.account}")


def _report(args, _):
  from irg_jax.evaluate import report
  from irg_jax.storage import check_output_folder
  benchmarks()
  runs = report.load(args.runs)
  check_output_folder(args.to)
  page = report.write(runs, args.to)
  print(report.table_text(report.build(runs)))
  print(f"wrote {page}")
