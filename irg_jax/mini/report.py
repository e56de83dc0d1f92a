"""Evaluation of a run, and its report.

  OUT/evaluation/ARM/...            as `irg eval generate mini` and `irg eval score mini` write it
  OUT/evaluation/ARM/cost.json      peak memory and batch size
  OUT/evaluation/autoencoder.json   painted images that are correct after the autoencoder
  OUT/report/report.json            every figure; a shipped checkpoint has it as scores.json
  OUT/report/report.md, index.html  the tables; a page with tables, plots and traces
  OUT/report/scores.png, tasks.png  the plots
"""

import dataclasses
import json
import pathlib
import resource
import sys

from irg_jax import runs, storage
from irg_jax.evaluate import generate, score
from irg_jax.generate import settings as generate_settings
from irg_jax.mini import benchmark, vae, world
from irg_jax.reports import pages, plots
from irg_jax.reports.tables import table

HERE, ELSEWHERE = "here", "in the run that made the checkpoint"
_SPLITS = ("seen", "unseen", "all")


@dataclasses.dataclass(frozen=True)
class Arm:
  """A checkpoint on the test.

  Attributes:
    weights: folder of the checkpoint in that of the run.
    rounds: images of a prompt, each after a thought of its own.
    think: whether to think; if not, there is no system prompt either.
  """

  name: str
  title: str
  weights: str
  rounds: int
  think: bool = True


ARMS = (
    Arm("base_direct", "base, no thinking", "base/stage2/weights", 1, think=False),
    Arm("base", "base, thinking", "base/stage2/weights", 1),
    Arm("quality", "better pictures only", "quality/stage2/weights", 1),
    Arm("stage1", "stage 1", "irgl/stage1/weights", 2),
    Arm("irg", "stage 2", "checkpoint", 4),
)
FINAL = ARMS[-1]
# (name, (arm, round), (arm, round) to subtract)
_DIFFERENCES = (
    ("stage 2: round 2 less round 1", ("irg", "2"), ("irg", "1")),
    ("stage 2, round 2, less base, thinking", ("irg", "2"), ("base", "1")),
    ("stage 2, round 1, less base, thinking", ("irg", "1"), ("base", "1")),
    ("stage 2, round 2, less better pictures only", ("irg", "2"), ("quality", "1")),
    ("stage 2, round 2, less stage 1, round 2", ("irg", "2"), ("stage1", "2")),
)
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


def run(out) -> pathlib.Path:
  """Reports on a finished run, or else on the package's checkpoint; returns the page's path.

  Missing images of the test are generated first.

  Raises:
    ValueError: the run is not finished; there is no run and no checkpoint in the package.
  """
  out, checkpoint = pathlib.Path(out), generate_settings.SHIPPED
  if (out / FINAL.weights).is_dir():
    settings = runs.read(out / "mini.json")
    images = settings.get("test_images") or settings["test_pictures"]  # the name in version 0.1
    items = select(settings["test_seen"], settings["test_unseen"], images)
    evaluate(out, items, settings["sample_batch"])
    return make(out, settings=settings)
  if (out / "mini.json").is_file():
    raise ValueError(f"--out {out}: the run in there is not finished; go on with irg mini run "
                     f"--out {out}, or give another folder to measure the package's checkpoint")
  if not checkpoint.is_dir():
    raise ValueError(f"--out {out}: no run of irg mini run in there, and this copy of the package "
                     "comes without a checkpoint to measure; make a run first")
  others = _shipped_arms(checkpoint / score.SCORES)
  evaluate(out, select(), arms=[FINAL], checkpoint=checkpoint)
  return make(out, others)


def make(out, others: dict | None = None, settings: dict | None = None) -> pathlib.Path:
  """Writes the report of the arms that are scored under `out`; returns the page's path.

  Args:
    others: see `build`.
    settings: the run's mini.json; with it the run's checkpoint gets the figures and its card.
  """
  out = pathlib.Path(out)
  drawn = {arm.name: benchmark.read(out / "evaluation" / arm.name) for arm in ARMS
           if (out / "evaluation" / arm.name / score.ITEMS).is_file()}
  if not drawn:
    raise ValueError(f"--out {out}: nothing in there has been drawn and scored")
  report, folder = build(drawn, others), out / "report"
  if (alone := out / "evaluation" / "autoencoder.json").is_file():
    report["autoencoder"] = json.loads(alone.read_text())
  folder.mkdir(parents=True, exist_ok=True)
  images, text = charts(report), json.dumps(report, indent=1, ensure_ascii=False) + "\n"
  examples = benchmark.choose(drawn[FINAL.name]) if FINAL.name in drawn else []
  texts = {folder / "report.json": text, folder / "report.md": markdown(report),
           folder / "index.html": page(report, images, examples)}
  if settings:
    checkpoint = out / FINAL.weights
    texts |= {checkpoint / score.SCORES: text, checkpoint / "README.md": card(report, settings)}
  for path, content in texts.items():
    storage.write_text(path, content)
  for name, content in images.items():
    storage.write_bytes(folder / name, content)
  return folder / "index.html"


def build(drawn: dict, others: dict | None = None) -> dict:
  """All figures as JSON values.

  {"arms": {name: {"title", "measured", "rounds", "cost"}}, in the order of `ARMS`,
   "differences": {name: {split: interval}}, "intervals": their method, "test": numbers of prompts}
  `make` adds "autoencoder": {"right", "pictures"}. See `benchmark.arm_figures` for rounds and cost.

  Args:
    drawn, others: by arm, from `benchmark.read`, and figures of arms that are not in `drawn`.
  """
  arms = {}
  for arm in ARMS:
    if arm.name in drawn:
      figures = benchmark.arm_figures(drawn[arm.name])
      arms[arm.name] = {"title": arm.title, "measured": HERE, **figures}
    elif arm.name in (others or {}):
      arms[arm.name] = others[arm.name]
  items = benchmark.MINI.read()
  values = {(name, number): entry["by_prompt"] for name, arm in arms.items()
            for number, entry in arm["rounds"].items()}
  return {
      "arms": arms,
      "differences": {name: benchmark.difference(values[after], values[before], items)
                      for name, after, before in _DIFFERENCES
                      if after in values and before in values},
      "intervals": "95 %, bootstrap over the prompts of each task, "
                   f"{benchmark.RESAMPLES} resamples, seed {benchmark.SEED}",
      "test": {"prompts": len(items), **benchmark.SPLITS},
  }


def _shipped_arms(path):
  """The figures of the other arms that come with a checkpoint, marked as measured elsewhere."""
  if not path.is_file():
    return {}
  try:
    arms = json.loads(path.read_text(encoding="utf-8"))["arms"]
    return {name: arm | {"measured": ELSEWHERE} for name, arm in arms.items()
            if name != FINAL.name}
  except (ValueError, KeyError, TypeError, AttributeError) as e:
    raise ValueError(f"{path}: is not a report.json of irg mini report ({e})") from e


# --- Generating and scoring the test ---


def select(seen: int | None = None, unseen: int | None = None, images: int = 4):
  """The first test prompts of each split, with at most `images` images each."""
  items, limits = benchmark.MINI.read(), {"seen": seen, "unseen": unseen}
  return [dataclasses.replace(item, images=min(images, item.images)) for split in limits
          for item in [i for i in items if i.extra["split"] == split][:limits[split]]]


def evaluate(out, items, batch_size: int = 64, arms=ARMS, checkpoint=None) -> None:
  """Generates missing images of each arm and scores them; and the autoencoder alone.

  Args:
    out, items: folder of the run, and prompts from `select`.
    checkpoint: used for all arms in place of the run's own.

  Raises:
    ValueError: an arm's weights are missing, or its images are of other weights.
  """
  out = pathlib.Path(out)
  for arm in arms:
    folder = pathlib.Path(checkpoint or out / arm.weights)
    if not folder.is_dir():
      raise ValueError(f"{folder}: no such folder; the run in {out} is not finished, go on with "
                       "irg mini run")
    print(f"irg mini: drawing the test, {arm.title}", flush=True)
    draw(arm, folder, out / "evaluation" / arm.name, items, batch_size)
    score_new(out / "evaluation" / arm.name)
  # The autoencoder is frozen, so it is the same in any arm.
  vae.measure(folder, out / "evaluation" / "autoencoder.json", [item.extra for item in items])


def draw(arm: Arm, checkpoint, folder: pathlib.Path, items, batch_size: int) -> None:
  """Generates the missing images of an arm, with the checkpoint's own settings."""
  defaults = generate_settings.read_defaults(checkpoint)
  result = generate.generate_images(generate.Request(
      benchmark=benchmark.MINI, items=tuple(benchmark.MINI.read()), selected=tuple(items),
      out=folder, checkpoint=checkpoint, batch_size=batch_size,
      settings=dataclasses.replace(defaults.settings, rounds=arm.rounds, think=arm.think),
      system_prompt=defaults.system_prompt if arm.think else ""))
  if result.generated:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of this process so far
    peak *= 1 if sys.platform == "darwin" else 1024
    storage.write_json(folder / "cost.json", {"peak_bytes": peak, "batch_size": batch_size})


def score_new(folder) -> None:
  """Scores an arm, unless this very verifier has scored all its images."""
  images = score.open_folder(benchmark.MINI, folder)
  there, path = list(score.images_there(images)), images.out / score.SCORES
  if path.is_file():
    before = json.loads(path.read_text(encoding="utf-8"))
    judged = sum(r["pictures"] + r["unscored"]["total"] for r in before["rounds"].values())
    if before["protocol"] == benchmark.protocol() and judged == len(there):
      return
  benchmark.MINI.score(images)


# --- Tables, page and card ---


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, head, rows) of every table, as text."""
  rows, found = list(_rows(report)), []
  found.append(("Overall, mean over tasks", ["", *_SPLITS, "pictures"], [
      [name, *(_interval(entry["scores"][split]["overall"]) for split in _SPLITS),
       str(entry["pictures"])] for name, _, entry in rows]))
  for split in ("seen", "unseen"):
    scores = [(name, entry["scores"][split]["tasks"]) for name, _, entry in rows]
    tasks = [t for t in world.TASKS if any(t in values for _, values in scores)]
    found.append((f"By task, {split} combinations", ["", *tasks], [
        [name, *(_interval(values.get(t)) for t in tasks)] for name, values in scores]))
  found.append(("Paired differences", ["", *_SPLITS], [
      [name, *(_interval(values[split]) for split in _SPLITS)]
      for name, values in report["differences"].items()]))
  pairs = [(name, entry["reflections"] | entry["changes"]) for name, _, entry in rows
           if "changes" in entry]
  found.append(("From the picture before to this round", ["", *(name for name, _ in pairs)], [
      [text, *(_share(shares[key]) for _, shares in pairs)] for key, text in _TEXTS.items()]))
  found.append(("Plans, seconds, memory", ["", "pictures as planned, cell by cell",
                                           "seconds a batch", "pictures a batch", "peak GiB"], [
      [name, _share(entry["plan_drawn"]), _number(entry["seconds"], 1),
       str(cost.get("batch_size", "–")), _number(cost.get("peak_bytes"), 2, 2**30)]
      for name, cost, entry in rows]))
  return found


def notes(report: dict) -> list[str]:
  """What to know about the figures."""
  others = [arm["title"] for arm in report["arms"].values() if arm["measured"] != HERE]
  missing = [f"{name}: {entry['missing']}" for name, _, entry in _rows(report) if entry["missing"]]
  return pages.render("mini_notes.txt", report=report, elsewhere=ELSEWHERE, others=others,
                      missing=missing).splitlines()


def markdown_table(title: str, head: list[str], rows: list[list[str]]) -> str:
  """One of `tables` under its title."""
  return f"## {title}\n\n{table(head, rows, numbers=True)}"


def markdown(report: dict) -> str:
  """The tables and notes."""
  return "\n\n".join(["# The mini world, measured", *_markdown(report, "## Notes")]) + "\n"


def card(report: dict, settings: dict) -> str:
  """The model card, Markdown; `settings` is the mini.json of the run that made the checkpoint."""
  return pages.render("mini_card.md", settings=settings, world=world,
                      tables="\n\n".join(_markdown(report))) + "\n"


def page(report: dict, images: dict[str, bytes], examples: list[dict]) -> str:
  """The page: plots (PNG by file name), tables, notes, and traces from `benchmark.choose`."""
  return pages.render("mini_report", test=report["test"], plots=images, tables=tables(report),
                      notes=notes(report), examples=examples)


def charts(report: dict) -> dict[str, bytes]:
  """The plots, PNG by file name."""
  rows = list(_rows(report))
  found = {"scores.png": plots.bar_chart(
      "Whole images right, mean over tasks, with 95 % intervals",
      [name.replace(", ", "\n") for name, *_ in rows],
      [(f"{split} combinations", [entry["scores"][split]["overall"] for *_, entry in rows])
       for split in ("seen", "unseen")])}
  wanted = {_name(report, *key): key for key in (("base", "1"), ("irg", "1"), ("irg", "2"))
            if key[0] in report["arms"]}
  series = [(name, [entry["scores"]["all"]["tasks"].get(t) for t in world.TASKS])
            for name, _, entry in rows if name in wanted]
  if series:
    found["tasks.png"] = plots.bar_chart(
        "By task, seen and unseen together", list(world.TASKS), series)
  return found


def _markdown(report, *before_notes):
  return [*(markdown_table(*found) for found in tables(report)), *before_notes,
          "\n".join(f"- {text}" for text in notes(report))]


def _rows(report):
  """(name, cost, figures) of every round of every arm."""
  for arm, entry in report["arms"].items():
    for number, figures in entry["rounds"].items():
      yield _name(report, arm, number), entry["cost"], figures


def _name(report, arm, number):
  """"stage 2, round 1"; the title alone where an arm has one round."""
  entry = report["arms"][arm]
  return entry["title"] + (f", round {number}" if len(entry["rounds"]) > 1 else "")


def _number(value, places, unit=1):
  return "–" if value is None else f"{value / unit:.{places}f}"


def _interval(value):
  return "–" if value is None else (
      f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")


def _share(value):
  return "–" if value is None or value["share"] is None else (
      f"{value['share']:.3f} ({value['count']} of {value['of']})")
