"""`irg eval score`: a benchmark's official protocol over the images of a run."""

import json
import pathlib

from irg_jax.commands import flags
from irg_jax.commands import judge_flags
from irg_jax.progress import counting

_SCORE = """\
Scores the images of irg eval generate by the benchmark's official protocol, each round apart.
Writes OUT/scores.json (the figures), and OUT/items.jsonl (each prompt's, with the judge's words).
What cannot be scored is counted by reason and never becomes a number.

the paper's setting:
  irg eval score geneval --out out/geneval --detections out/geneval/detections.jsonl
  irg eval score wise --out out/wise --prompts WISE/data \\
      --judge-url https://api.openai.com/v1 --judge-model gpt-4o-2024-11-20
  irg eval score tiif --out out/tiif --prompts TIIF-Bench/data/testmini_prompts \\
      --questions TIIF-Bench/data/testmini_eval_prompts \\
      --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-VL-72B-Instruct
  irg eval score genai_bench --out out/genai_bench \\
      --prompts GenAI-Bench-1600/genai_image.json --measurements vqascores.jsonl
  irg eval score oneig --out out/oneig --prompts OneIG-Benchmark/OneIG-Bench.csv \\
      --questions OneIG-Benchmark/scripts --measurements measured.jsonl \\
      --judge-url http://localhost:8000/v1 --judge-model Qwen/Qwen2.5-VL-7B-Instruct

the mini world's, whose verifier reads the images:
  irg eval score mini --out out/mini-test

more examples:
  irg eval score geneval --out out/geneval --detector my_models:detect --classifier my_models:color
  irg eval score genai_bench --out out/genai_bench --prompts genai_image.json \\
      --scorer my_models:vqascore
"""

_SCORE_END = """\
where the answers come from:
  geneval      --detections, records as irg_jax/evaluate/geneval.py documents them, or --detector
               and --classifier, functions of yours (see irg_jax/evaluate/detectors.py). Officially
               Mask2Former Swin-S (mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco) and CLIP ViT-L-14.
  wise, tiif   the judge.
  genai_bench  --measurements or --scorer (officially clip-flant5-xxl), or the judge's probability
               of Yes. Needs genai_skills.json beside the prompts, or --skills.
  oneig        the judge (alignment, text) and --measurements (reasoning, style, diversity); the
               overall needs all five. Without --judge-url the measured parts are scored alone.
  mini         the verifier of the mini world (irg_jax/mini/verifier.py).

""" + judge_flags.KEY_NOTE


def add(verbs, new_parser) -> None:
  """Adds the verb to the subparsers `verbs`."""
  from irg_jax.evaluate.prompts import BENCHMARKS
  parser = new_parser(verbs.add_parser, "score", description=_SCORE, epilog=_SCORE_END,
                      help="score a benchmark's pictures")
  parser.set_defaults(run=lambda args, _: _run(args, parser))
  add = parser.add_argument
  add("benchmark", choices=BENCHMARKS, metavar="BENCH", help=", ".join(BENCHMARKS))
  add("--out", type=pathlib.Path, required=True, metavar="DIR",
      help="folder of the images, as irg eval generate wrote it")
  add("--prompts", type=pathlib.Path, metavar="PATH",
      help="the official prompt file or folder; geneval's and mini's come with this package")
  add("--questions", type=pathlib.Path, metavar="DIR",
      help="tiif: testmini_eval_prompts; oneig: the folder scripts of its repository, or one "
           "with Q_D and text_content.csv")
  add("--skills", type=pathlib.Path, metavar="FILE",
      help="genai_skills.json (default: beside the prompts)")
  add("--measurements", type=pathlib.Path, metavar="FILE",
      help="figures of other models than a judge; see irg_jax/evaluate/measurements.py")
  add("--scorer", metavar="MODULE:FUNCTION",
      help="genai_bench: (path, prompt) -> score from 0 to 1")
  add("--grid", default="2,2", metavar="C,R", help="oneig: columns and rows of its images (2,2)")
  _add_geneval(parser.add_argument_group("geneval"))
  judge_flags.add(parser)


def _add_geneval(group):
  add = group.add_argument
  add("--detections", type=pathlib.Path, nargs="+", default=[], metavar="FILE",
      help="records of boxes, a JSON line a picture")
  add("--round", type=flags.count, metavar="N",
      help="of the records whose file name does not say it")
  add("--detector", metavar="MODULE:FUNCTION", help="(image, classes) -> boxes by class")
  add("--classifier", metavar="MODULE:FUNCTION", help="(crop, class) -> colour")
  add("--object-names", type=pathlib.Path, metavar="FILE",
      help="the 80 classes (default: those that come with this package)")
  for name, value in (("threshold", 0.3), ("counting-threshold", 0.9), ("max-overlap", 1.0),
                      ("position-threshold", 0.1)):
    add(f"--{name}", type=float, default=value, metavar="X", help=f"official option ({value})")
  add("--max-objects", type=flags.count, default=16, metavar="N", help="official option (16)")


def _run(args, parser):
  _check_flags(args, parser)
  from irg_jax.evaluate import score
  run = score.open_run(args.benchmark, args.out, args.prompts)
  steps = {"geneval": _geneval, "wise": _wise, "tiif": _tiif, "genai_bench": _genai_bench,
           "oneig": _oneig, "mini": _mini}
  result = steps[args.benchmark](args, run)
  _report(result, run.out / score.SCORES)


# A flag that another benchmark would use, and that would do nothing here, is a mistake.
_JUDGED = ("wise", "tiif", "genai_bench", "oneig")
_ONLY_FOR = {
    "questions": ("tiif", "oneig"), "skills": ("genai_bench",), "scorer": ("genai_bench",),
    "measurements": ("genai_bench", "oneig"), "grid": ("oneig",),
    **dict.fromkeys(("detections", "round", "detector", "classifier", "object_names", "threshold",
                     "counting_threshold", "max_overlap", "position_threshold", "max_objects"),
                    ("geneval",)),
    **dict.fromkeys(("judge_url", "judge_model", "temperature", "template", "concurrency",
                     "timeout", "tries", "asks", "judge_cache"), _JUDGED)}


def _check_flags(args, parser):
  for name, benchmarks in _ONLY_FOR.items():
    if getattr(args, name) != parser.get_default(name) and args.benchmark not in benchmarks:
      raise ValueError(f"--{name.replace('_', '-')} is for {', '.join(benchmarks)} only")
  for path in (args.measurements, args.skills, *args.detections):
    if path and not path.is_file():
      raise ValueError(f"{path}: no such file")


def _geneval(args, run):
  from irg_jax.evaluate import geneval, score
  options = geneval.Options(
      threshold=args.threshold, counting_threshold=args.counting_threshold,
      max_objects=args.max_objects, max_overlap=args.max_overlap,
      position_threshold=args.position_threshold)
  if bool(args.detections) == bool(args.detector):
    raise ValueError("geneval needs either --detections or --detector")
  sources = {"detector": args.detector, "classifier": args.classifier,
             "detections": ", ".join(map(str, args.detections)) or None}
  protocol = {"protocol": vars(options) | sources}
  if args.detections:
    with counting("scoring", None) as count:
      records = count(score.read_detections(args.detections))
      return score.score_detections(run, records, options, protocol, args.round)
  with counting("detecting", sum(i.images for i in run.items) * len(run.rounds)) as count:
    records = count(_detected(args, run))
    return score.score_detections(run, records, options, protocol)


def _detected(args, run):
  """(where, record) of every image that is there, by the functions of the flags."""
  from irg_jax.evaluate import detectors, layout, plugins, prompts, score
  detect = plugins.load(args.detector, "--detector")
  classify = plugins.load(args.classifier, "--classifier") if args.classifier else None
  names = args.object_names or prompts.GENEVAL_FILES / "object_names.txt"
  paths = ((item, layout.image_path("geneval", item, image, number))
           for item, number, image in score.images_there(run))
  images = ((run.out / path, str(path), item.extra) for item, path in paths)
  found = detectors.records(images, detectors.class_names(names), detect, classify,
                            run.out / detectors.CACHE, f"{args.detector} {args.classifier}")
  return ((record["filename"], record) for record in found)


def _wise(args, run):
  from irg_jax.evaluate import scorers
  return _judged(args, run, scorers.Wise)


def _tiif(args, run):
  from irg_jax.evaluate import questions, scorers
  if not args.questions:
    raise ValueError("--questions: give the folder testmini_eval_prompts (or the one that belongs "
                     "to your prompts)")
  references = questions.read_tiif_questions(args.questions, run.items)
  return _judged(args, run, lambda: scorers.Tiif(references), references)


def _genai_bench(args, run):
  from irg_jax.evaluate import judging, measurements, plugins, score, scorers
  skills = _skills(args, run)
  make = lambda: scorers.GenAIBench(skills)
  if sum(map(bool, (args.measurements, args.scorer, args.judge_url))) > 1:
    raise ValueError("--measurements, --scorer, --judge-url: genai_bench is scored by one of them")
  if args.measurements:
    table = measurements.read(args.measurements, "genai_bench")
    extra = {"protocol": {"measurements": str(args.measurements)}}
    return score.score_answers(run, make, measurements.vqascores(run, table), extra)
  if args.scorer:
    function = plugins.load(args.scorer, "--scorer")
    with counting("scoring", len(run.items) * len(run.rounds)) as count:
      groups = count(judging.measured(run, function, args.scorer, run.out / judging.SCORE_CACHE))
      return score.score_answers(run, make, groups, {"protocol": {"scorer": args.scorer}})
  return _judged(args, run, make)


def _oneig(args, run):
  from irg_jax.evaluate import measurements, oneig, questions, score, scorers
  oneig.parse_grid(args.grid)
  table = measurements.read(args.measurements, "oneig") if args.measurements else {}
  extra = {"protocol": {"grid": args.grid, "measurements": str(args.measurements or "none")}}
  if not args.judge_url:
    if not args.measurements:
      raise ValueError("oneig needs --judge-url (alignment, text), --measurements (reasoning, "
                       "style, diversity), or both")
    make = lambda: scorers.OneIG(None)
    groups = measurements.merged(measurements.nothing_asked(run), table)
    return score.score_answers(run, make, groups, extra)
  if not args.questions:
    raise ValueError("--questions: give the folder scripts of a copy of OneIG-Benchmark")
  references = {
      "questions": {name: oneig.read_questions(_find(args.questions, f"Q_D/{name}.json"))
                    for name in oneig.ALIGNED},
      "texts": questions.read_oneig_texts(_find(args.questions, "text_content.csv"))}
  return _judged(args, run, lambda: scorers.OneIG(references), references, extra, table)


def _mini(_, run):
  from irg_jax.evaluate import mini, score
  with counting("scoring", sum(i.images for i in run.items) * len(run.rounds)) as count:
    return score.score_images(run, mini.Verified, count(score.images_there(run)),
                                {"protocol": mini.protocol()})


def _judged(args, run, make_scorer, references=None, extra=None, table=None):
  """Asks the judge and scores what it says."""
  from irg_jax.evaluate import judge, judging, measurements, oneig, score
  settings, words = (judge_flags.settings(args, run.benchmark),
                     judge_flags.wording(args, run.benchmark))
  with judge.Judge(settings, args.judge_cache or run.out / judge.CACHE) as asked:
    if asked.lost:
      print(f"{asked.lost} lines of the judge's cache were cut short; they are asked again")
    with counting("asking the judge", len(run.items) * len(run.rounds)) as count:
      groups = count(judging.judged(run, asked, references, words, oneig.parse_grid(args.grid)))
      groups = measurements.merged(groups, table) if table else groups
      result = score.score_answers(run, make_scorer, groups, {
          "judge": judge_flags.describe(settings, run.benchmark, words), **(extra or {})})
    print(f"judge: {asked.account}")
    return result


def _skills(args, run):
  from irg_jax.evaluate import genai_bench, prompts
  beside = args.prompts.parent if args.prompts.is_file() else args.prompts
  path = args.skills or beside / "genai_skills.json"
  if not path.is_file():
    raise ValueError(f"--skills {path}: no such file; genai_bench needs its genai_skills.json")
  try:
    skills = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as e:
    raise ValueError(f"{path}: not JSON ({e})") from e
  known = [item.id for item in prompts.read("genai_bench", args.prompts)]
  genai_bench.check_skills(skills, known, path)
  return skills


def _find(folder, name):
  """A file of OneIG's scripts, by the names under which they lie there or side by side."""
  places = [folder / part / name for part in ("alignment", "text", ".")]
  for path in places:
    if path.is_file():
      return path
  raise ValueError(f"--questions {folder}: no {name} in there, nor in alignment or text below it")


def _report(result, path):
  from irg_jax.evaluate import report
  run = report.Run(path.parent, result)
  for number in run.rounds:
    summary = result["rounds"][str(number)]
    values = report.headline(run.benchmark, summary)
    figures = ", ".join(f"{name} {report.show(value, name)}" for name, value in values.items())
    print(f"round {number}: {figures} ({report.scored(run, summary)} scored, "
          f"{summary['missing']} not there, {summary['unscored']['total']} without a score)")
    for reason, count in summary["unscored"]["by_reason"].items():
      print(f"  no score: {reason}: {count}")
  print(f"wrote {path}")
