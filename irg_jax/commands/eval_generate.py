"""`irg eval generate`: the images of a benchmark."""

import pathlib
import sys

from irg_jax.commands import flags

_GENERATE = """\
Draws every prompt of a benchmark, in the layout of its official scorer, each round under a root
of its own: OUT/round1, OUT/round2, ... Thoughts are in OUT/traces. Kill it at any time: the same
command goes on, and nothing is done twice. What an image gets as seed depends on the benchmark,
the prompt's id and the picture's number alone.

the paper's setting (what is not given below is the default; --batch-size is yours to choose):
  irg eval generate geneval --checkpoint weights/irg-7b --out out/geneval
  irg eval generate wise --prompts WISE/data --checkpoint weights/irg-7b --out out/wise
  irg eval generate tiif --prompts TIIF-Bench/data/testmini_prompts \\
      --checkpoint weights/irg-7b --out out/tiif
  irg eval generate genai_bench --prompts GenAI-Bench-1600/genai_image.json \\
      --checkpoint weights/irg-7b --out out/genai_bench
  irg eval generate oneig --prompts OneIG-Benchmark/OneIG-Bench.csv \\
      --checkpoint weights/irg-7b --out out/oneig

  which is the same as --rounds 2 --size 1024 --steps 50 --think-limit 4096 --temperature 0.3 \\
      --text-scale 4.0 --image-scale 2.0 \\
      --config.first.interval="(0.4, 1.0)" --config.first.renorm=global \\
      --config.later.interval="(0.0, 1.0)" --config.later.renorm=text_channel

the mini world's test, with the settings that its checkpoint comes with:
  irg eval generate mini --checkpoint out/mini/checkpoint --out out/mini-test

more examples:
  irg eval generate geneval --checkpoint weights/irg-7b --out out/some --tasks counting --limit 8
  irg eval generate geneval --checkpoint weights/bagel-7b --out out/bagel --rounds 1 --no-think \\
      --config.first.interval="(0.0, 1.0)"
  irg eval generate wise --prompts WISE/data --checkpoint weights/irg-7b --out out/wise \\
      --process-id 0 --num-processes 4              on the first of four hosts
"""

_GENERATE_END = """\
images of a prompt: 4 for geneval and mini, 4 for oneig (pasted into one grid), 1 for the others;
TIIF's short and long description of a prompt count as two.

several hosts: each draws every N-th prompt into the common --out. Without a common folder, give
each a folder of its own and copy them into one afterwards: no file is in two of them, but for
run.json, which is the same.
"""

# Of the published evaluation; all else is as in irg generate. A checkpoint with a generate.json
# says itself how it is to be used.
_THINK_LIMIT = 4096


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  from irg_jax.evaluate.prompts import BENCHMARKS
  parser = new_parser(verbs.add_parser, "generate", description=_GENERATE, epilog=_GENERATE_END,
                      help="draw a benchmark's prompts")
  parser.set_defaults(run=_run)
  add = parser.add_argument
  add("benchmark", choices=BENCHMARKS, metavar="BENCH", help=", ".join(BENCHMARKS))
  add("--prompts", type=pathlib.Path, metavar="PATH",
      help="the official prompt file or folder; geneval's and mini's come with this package")
  add("--checkpoint", type=pathlib.Path, required=True, metavar="DIR",
      help="weights, in the published layout or Orbax; a generate.json there has the defaults")
  add("--out", type=pathlib.Path, required=True, metavar="DIR",
      help="folder of the run, made or gone on with")
  add("--tasks", nargs="+", metavar="TASK",
      help="only these: GenEval's tags, WISE's categories (CULTURE, ...), TIIF's types, "
           "GenAI-Bench's tags (with genai_skills.json beside the prompts), OneIG's folders, "
           "mini's tags, seen, unseen")
  add("--limit", type=flags.count, metavar="N", help="only the first N prompts (of --tasks)")
  add("--subset", action="store_true",
      help="the prompts need not be as many as published; the scores then compare with nothing")
  add("--batch-size", type=flags.count, default=1, metavar="N",
      help="pictures side by side (default 1)")
  add("--config", type=pathlib.Path, metavar="FILE", help="settings, like configs/generate.py")
  add("--system-prompt-file", type=pathlib.Path, metavar="FILE",
      help="replaces the system prompt; an empty file means none")
  add("--mesh", type=flags.mesh, metavar="AXIS=N,...",
      help="devices by axis, such as data=2,fsdp=2,tensor=2 (default: all on fsdp)")
  add("--dtype", choices=("bfloat16", "float32"), help="dtype of the arithmetic")
  flags.add_hosts(parser)
  flags.add_shorthands(parser.add_argument_group("settings, short"), think_limit=_THINK_LIMIT)


def _run(args, overrides):
  if not args.checkpoint.is_dir():
    raise ValueError(f"--checkpoint {args.checkpoint}: no such folder")
  flags.check_hosts(args)
  from irg_jax.evaluate import prompts
  items = prompts.read(args.benchmark, args.prompts)
  if not args.subset:
    _check_counts(args, items)
  selected = _select(items, args.tasks, args.limit)
  from irg_jax import config
  from irg_jax.generate import defaults, request
  from irg_jax.generate.settings import Settings
  default, prompt = defaults.read(args.checkpoint, Settings(think_limit=_THINK_LIMIT))
  settings = config.read(default, args.config,
                         [*overrides, *request.shorthand_overrides(args)])
  from irg_jax.evaluate import runner
  asked = runner.Request(
      items=tuple(items), selected=tuple(selected), out=args.out, checkpoint=args.checkpoint,
      settings=settings,
      system_prompt=request.read_system_prompt(args.system_prompt_file, prompt),
      batch_size=args.batch_size, mesh=args.mesh, dtype=args.dtype, process_id=args.process_id,
      num_processes=args.num_processes)
  _report(asked, runner.run_generate(asked))


def _check_counts(args, items):
  from irg_jax.evaluate import prompts
  try:
    prompts.check_counts(items)
  except ValueError as e:
    raise ValueError(f"--prompts {args.prompts or 'of this package'}: {e}; is it complete? With "
                     "--subset it is taken as it is") from e


def _select(items, tasks, limit):
  from irg_jax.evaluate import prompts
  if tasks:
    known = prompts.known_tasks(items)
    if unknown := [task for task in tasks if task not in known]:
      raise ValueError(f"--tasks {unknown[0]}: no such task; there are "
                       f"{', '.join(known) or 'none: put genai_skills.json beside the prompts'}")
    items = [item for item in items if set(tasks) & set(prompts.tasks(item))]
  return items[:limit]


def _report(request, result):
  for name in result.failed[:20]:
    print(f"could not be drawn (its latents are not finite): {name}", file=sys.stderr)
  if len(result.failed) > 20:
    print(f"... {len(result.failed)} in all", file=sys.stderr)
  share = "" if request.num_processes == 1 else f" of process {request.process_id}"
  print(f"{request.benchmark}: {result.drawn} images drawn, {result.kept} were there already"
        f"{share}; {len(result.failed)} failed")
  roots = ", ".join(str(request.out / f"round{n + 1}") for n in range(request.settings.rounds))
  print(f"for the official scorer: {roots}; thoughts: {request.out / 'traces'}")
