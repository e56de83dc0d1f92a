"""`irg mini report`: the tables, the plots and the page of what was measured.

  OUT/report/report.json               every figure; a shipped checkpoint has it as scores.json
  OUT/report/report.md                 the tables
  OUT/report/index.html                tables, plots and traces, in one file
  OUT/report/scores.png, tasks.png     the plots
"""

import json
import pathlib

from irg_jax.evaluate import score
from irg_jax.storage import atomic_file
from irg_jax.generate import defaults
from irg_jax.mini import benchmark, card, evaluate, figures, plots, report_page, report_tables, world

FOLDER = "report"
# (name, (arm, round), less (arm, round))
_DIFFERENCES = (
    ("stage 2: round 2 less round 1", ("irg", "2"), ("irg", "1")),
    ("stage 2, round 2, less base, thinking", ("irg", "2"), ("base", "1")),
    ("stage 2, round 1, less base, thinking", ("irg", "1"), ("base", "1")),
    ("stage 2, round 2, less better images only", ("irg", "2"), ("quality", "1")),
    ("stage 2, round 2, less stage 1, round 2", ("irg", "2"), ("stage1", "2")),
)


def run(out) -> pathlib.Path:
  """Makes the report of a finished run, or else of the checkpoint that comes with the package.

  What is missing of the test's images is drawn first.

  Returns:
    the path of the page.

  Raises:
    ValueError: the run is not finished; there is no run and no such checkpoint.
  """
  out = pathlib.Path(out)
  if (out / evaluate.FINAL.weights).is_dir():
    settings = json.loads((out / "mini.json").read_text())
    evaluate.evaluate(out, evaluate.size_of(settings))
    return make(out, settings=settings)
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
    return {name: arm | {"measured": report_tables.ELSEWHERE} for name, arm in arms.items()
            if name != evaluate.FINAL.name}
  except FileNotFoundError:
    return {}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{path}: is not a report.json of irg mini report ({e})") from e


def make(out, others: dict | None = None, settings: dict | None = None) -> pathlib.Path:
  """Writes the report of the arms that are drawn and scored under `out`; returns the page's path.

  Args:
    others: figures of further arms, by name, as `build` has them.
    settings: of the run in `out`, as its mini.json has them: the run's checkpoint gets the
      figures and its model card.
  """
  out = pathlib.Path(out)
  drawn = {arm.name: figures.read(out / evaluate.FOLDER / arm.name) for arm in evaluate.ARMS
           if (out / evaluate.FOLDER / arm.name / score.ITEMS).is_file()}
  if not drawn:
    raise ValueError(f"--out {out}: nothing in there has been drawn and scored")
  report, folder = build(drawn, others), out / FOLDER
  if (alone := out / evaluate.FOLDER / evaluate.AUTOENCODER).is_file():
    report["autoencoder"] = json.loads(alone.read_text())
  folder.mkdir(parents=True, exist_ok=True)
  images = charts(report)
  examples = report_page.choose(drawn[evaluate.FINAL.name]) if evaluate.FINAL.name in drawn else []
  figures_json = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
  files = {folder / name: content for name, content in {
      "report.json": figures_json, "report.md": report_tables.markdown(report), **images,
      "index.html": report_page.page_html(report, images, examples)}.items()}
  if settings:
    checkpoint = out / evaluate.FINAL.weights
    files |= {checkpoint / score.SCORES: figures_json,
              checkpoint / "README.md": card.write(report, settings)}
  for path, content in files.items():
    with atomic_file(path) as aside:
      aside.write_bytes(content if isinstance(content, bytes) else content.encode())
  return folder / "index.html"


def build(drawn: dict, others: dict | None = None) -> dict:
  """All figures as JSON.

  {"arms": {name: {"title", "measured", "rounds", "cost"}}, in the order of `evaluate.ARMS`,
   "differences": {name: {split: interval}}, "intervals": how they were made, "test": ...}
  `make` adds "autoencoder": {"right", "pictures"}, see `evaluate.measure_autoencoder`.
  See `figures.arm_figures` for rounds and cost.
  """
  arms = {}
  for arm in evaluate.ARMS:
    if arm.name in drawn:
      arms[arm.name] = {"title": arm.title, "measured": report_tables.HERE,
                        **figures.arm_figures(drawn[arm.name])}
    elif arm.name in (others or {}):
      arms[arm.name] = others[arm.name]
  items = benchmark.MINI.read()
  values = {(name, number): entry["by_prompt"] for name, arm in arms.items()
            for number, entry in arm["rounds"].items()}
  return {
      "arms": arms,
      "differences": {name: figures.difference(values[after], values[before], items)
                      for name, after, before in _DIFFERENCES
                      if after in values and before in values},
      "intervals": f"95 %, bootstrap over the prompts of each task, {figures.RESAMPLES} resamples, "
                   f"seed {figures.SEED}",
      "test": {"prompts": len(items), **benchmark.SPLITS},
  }


def charts(report: dict) -> dict[str, bytes]:
  """The plots by file name."""
  rows = list(report_tables.rows_of(report))
  overall = lambda split: [entry["scores"][split]["overall"] for _, entry in rows]
  found = {"scores.png": plots.bar_chart(
      "Whole images right, mean over tasks, with 95 % intervals",
      [name.replace(", ", "\n") for name, _ in rows],
      [(f"{split} combinations", overall(split)) for split in ("seen", "unseen")])}
  wanted = ("base", "1"), (evaluate.FINAL.name, "1"), (evaluate.FINAL.name, "2")
  rounds = lambda arm: report["arms"].get(arm, {"rounds": {}})["rounds"]
  series = [(report_tables.row_name(report, arm, number), rounds(arm)[number]["scores"]["all"])
            for arm, number in wanted if number in rounds(arm)]
  if series:
    found["tasks.png"] = plots.bar_chart(
        "By task, seen and unseen together", list(world.TASKS),
        [(name, [scores["tasks"].get(t) for t in world.TASKS]) for name, scores in series])
  return found
