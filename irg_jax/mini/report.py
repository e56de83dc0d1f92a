"""`irg mini report`: the tables, the plots and the page of what was measured.

  OUT/report/report.json               every figure; a shipped checkpoint has it as scores.json
  OUT/report/report.md                 the tables
  OUT/report/index.html                tables, plots and traces, in one file
  OUT/report/scores.png, tasks.png     the plots
"""

import json
import pathlib

from irg_jax.evaluate import prompts, score
from irg_jax.files import whole_file
from irg_jax.generate import defaults
from irg_jax.mini import evaluate, figures, plots, tasks

FOLDER = "report"
HERE, ELSEWHERE = "here", "in the run that made the checkpoint"
_TEXTS = {
    "readable": "reflections that can be read",
    "faults_named": "reflections that name exactly the actual faults (none, if there is none)",
    "wrong_faults_named": "wrong pictures, all faults named exactly",
    "wrong_noticed": "wrong pictures of which the reflection says that something falls short",
    "right_doubted": "right pictures of which it says so",
    "seen_rightly": "reflections that see in each cell what is there",
    "right_to_wrong": "right pictures made wrong",
    "wrong_to_right": "wrong pictures made right",
}
# (name, (arm, round), less (arm, round))
_DIFFERENCES = (
    ("stage 2: round 2 less round 1", ("irg", "2"), ("irg", "1")),
    ("stage 2, round 2, less base, thinking", ("irg", "2"), ("base", "1")),
    ("stage 2, round 1, less base, thinking", ("irg", "1"), ("base", "1")),
    ("stage 2, round 2, less better pictures only", ("irg", "2"), ("quality", "1")),
    ("stage 2, round 2, less stage 1, round 2", ("irg", "2"), ("stage1", "2")),
)


def run(out) -> pathlib.Path:
  """Makes the report of a finished run, or else of the checkpoint that comes with the package.

  What is missing of the test's pictures is drawn first.

  Returns:
    the path of the page.

  Raises:
    ValueError: the run is not finished; there is no run and no such checkpoint.
  """
  out = pathlib.Path(out)
  if (out / evaluate.FINAL.weights).is_dir():
    evaluate.evaluate(out, evaluate.size_of(json.loads((out / "mini.json").read_text())))
    return make(out)
  if (out / "mini.json").is_file():
    raise ValueError(f"--out {out}: the run in there is not finished; go on with irg mini run "
                     f"--out {out}, or give another folder to measure the package's checkpoint")
  return _of_package(out)


def _of_package(out):
  if not defaults.CHECKPOINT.is_dir():
    raise ValueError(f"--out {out}: no run of irg mini run in there, and this copy of the package "
                     "comes without a checkpoint to measure; make a run first")
  others = _shipped_arms(defaults.CHECKPOINT / score.SCORES)
  evaluate.evaluate(out, evaluate.Size(), [evaluate.FINAL], defaults.CHECKPOINT)
  return make(out, others)


def _shipped_arms(path):
  """The other arms' figures that come with a checkpoint, marked as such."""
  try:
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    return {name: arm | {"measured": ELSEWHERE} for name, arm in arms.items()
            if name != evaluate.FINAL.name}
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{path}: is not a report.json of irg mini report ({e})") from e


def make(out, others: dict | None = None) -> pathlib.Path:
  """Writes the report of the arms that are drawn and scored under `out`; returns the page's path.

  Args:
    others: figures of further arms, by name, as `build` has them.
  """
  from irg_jax.mini import report_page
  out = pathlib.Path(out)
  drawn = {arm.name: figures.read(out / evaluate.FOLDER / arm.name) for arm in evaluate.ARMS
           if (out / evaluate.FOLDER / arm.name / score.ITEMS).is_file()}
  if not drawn:
    raise ValueError(f"--out {out}: nothing in there has been drawn and scored")
  report, folder = build(drawn, others), out / FOLDER
  folder.mkdir(parents=True, exist_ok=True)
  pictures = charts(report)
  examples = report_page.choose(drawn[evaluate.FINAL.name]) if evaluate.FINAL.name in drawn else []
  for name, content in {
      "report.json": json.dumps(report, indent=1, ensure_ascii=False) + "\n",
      "report.md": markdown(report), **pictures,
      "index.html": report_page.page_html(report, pictures, examples)}.items():
    with whole_file(folder / name) as aside:
      aside.write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder / "index.html"


def build(drawn: dict, others: dict | None = None) -> dict:
  """All figures as JSON.

  {"arms": {name: {"title", "measured", "rounds", "cost"}}, in the order of `evaluate.ARMS`,
   "differences": {name: {split: interval}}, "intervals": how they were made, "test": ...}
  See `figures.arm_figures` for rounds and cost.
  """
  arms = {}
  for arm in evaluate.ARMS:
    if arm.name in drawn:
      arms[arm.name] = {"title": arm.title, "measured": HERE,
                        **figures.arm_figures(drawn[arm.name])}
    elif arm.name in (others or {}):
      arms[arm.name] = others[arm.name]
  items = prompts.read("mini")
  values = {(name, number): entry["by_prompt"] for name, arm in arms.items()
            for number, entry in arm["rounds"].items()}
  return {
      "arms": arms,
      "differences": {name: figures.difference(values[after], values[before], items)
                      for name, after, before in _DIFFERENCES
                      if after in values and before in values},
      "intervals": f"95 %, bootstrap over the prompts of each task, {figures.RESAMPLES} resamples, "
                   f"seed {figures.SEED}",
      "test": {"prompts": len(items), **prompts.MINI_SPLITS},
  }


def charts(report: dict) -> dict[str, bytes]:
  """The plots by file name."""
  rows = list(_rows(report))
  overall = lambda split: [entry["scores"][split]["overall"] for _, entry in rows]
  found = {"scores.png": plots.bar_chart(
      "Whole pictures right, mean over tasks, with 95 % intervals",
      [name.replace(", ", "\n") for name, _ in rows],
      [(f"{split} combinations", overall(split)) for split in ("seen", "unseen")])}
  wanted = ("base", "1"), (evaluate.FINAL.name, "1"), (evaluate.FINAL.name, "2")
  series = [(row_name(report, *key), report["arms"][key[0]]["rounds"][key[1]]["scores"]["all"])
            for key in wanted if key[1] in report["arms"].get(key[0], {"rounds": ()})["rounds"]]
  if series:
    found["tasks.png"] = plots.bar_chart(
        "By task, seen and unseen together", list(tasks.TASKS),
        [(name, [scores["tasks"].get(t) for t in tasks.TASKS]) for name, scores in series])
  return found


def row_name(report: dict, arm: str, number: str) -> str:
  """"stage 2, round 1"; the title alone where an arm has one round."""
  entry = report["arms"][arm]
  return entry["title"] + (f", round {number}" if len(entry["rounds"]) > 1 else "")


def _rows(report):
  """(name, figures) of every round of every arm."""
  for name, arm in report["arms"].items():
    for number, entry in arm["rounds"].items():
      yield row_name(report, name, number), entry


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, head, rows) of every table, as text; Markdown and page show these."""
  return [_overall_table(report), *(_task_table(report, split) for split in ("seen", "unseen")),
          _difference_table(report), _talk_table(report), _cost_table(report)]


def notes(report: dict) -> list[str]:
  """What has to be known of the figures."""
  found = [f"Intervals: {report['intervals']}; where all prompts of a task came out alike, it has "
           "no width.",
           "A picture is right if the verifier sees exactly what was asked for in it. \"Unseen\" "
           "are prompts with a shape in a colour, or a relation of two shapes, that no training "
           "picture or prompt has; single_object, two_object and counting cannot be unseen.",
           "Seconds are those of a whole batch; memory is the process's peak up to the end of "
           "that arm, so what ran before in the same process counts."]
  there = [arm["title"] for arm in report["arms"].values() if arm["measured"] != HERE]
  if there:
    found.append(f"Measured {ELSEWHERE}: {', '.join(there)}.")
  missing = [f"{name}: {entry['missing']}" for name, entry in _rows(report) if entry["missing"]]
  if missing:
    found.append(f"Pictures that could not be drawn or scored, and count nowhere: "
                 f"{'; '.join(missing)}.")
  return found


def markdown(report: dict) -> str:
  """The tables and notes."""
  parts = ["# The mini world, measured"]
  for title, head, rows in tables(report):
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    parts += [f"## {title}", "\n".join("| " + " | ".join(cells) + " |" for cells in lines)]
  parts += ["## Notes", "\n".join(f"- {note}" for note in notes(report))]
  return "\n\n".join(parts) + "\n"


def show(value: dict | None) -> str:
  """An interval as text: "0.912 [0.880, 0.940]"."""
  return "–" if value is None else (
      f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")


def _overall_table(report):
  head = ["", "seen", "unseen", "all", "pictures"]
  return "Overall, mean over tasks", head, [
      [name, *(show(entry["scores"][split]["overall"]) for split in ("seen", "unseen", "all")),
       str(entry["pictures"])] for name, entry in _rows(report)]


def _task_table(report, split):
  found = [t for t in tasks.TASKS
           if any(t in entry["scores"][split]["tasks"] for _, entry in _rows(report))]
  rows = [[name, *(show(entry["scores"][split]["tasks"].get(t)) for t in found)]
          for name, entry in _rows(report)]
  return f"By task, {split} combinations", ["", *found], rows


def _difference_table(report):
  return "Paired differences", ["", "seen", "unseen", "all"], [
      [name, *(show(found[split]) for split in ("seen", "unseen", "all"))]
      for name, found in report["differences"].items()]


def _talk_table(report):
  """A column for each pair of rounds, a row for what happened between them."""
  pairs = [(name, entry) for name, entry in _rows(report) if "changes" in entry]
  rows = [[text, *(_share((entry["reflections"] | entry["changes"])[key]) for _, entry in pairs)]
          for key, text in _TEXTS.items()]
  return "From the picture before to this round", ["", *(name for name, _ in pairs)], rows


def _cost_table(report):
  rows = []
  for name, arm in report["arms"].items():
    cost = arm["cost"]
    for number, entry in arm["rounds"].items():
      rows.append([
          row_name(report, name, number), _share(entry["plan_drawn"]),
          "–" if entry["seconds"] is None else f"{entry['seconds']:.1f}",
          str(cost.get("batch_size", "–")),
          f"{cost['peak_bytes'] / 2**30:.2f}" if "peak_bytes" in cost else "–"])
  return "Plans, seconds, memory", ["", "pictures as planned, cell by cell", "seconds a batch",
                                    "pictures a batch", "peak GiB"], rows


def _share(value):
  return "–" if value is None or value["share"] is None else (
      f"{value['share']:.3f} ({value['count']} of {value['of']})")
