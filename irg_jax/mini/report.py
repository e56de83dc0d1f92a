"""Evaluation of a run, and its report.

  OUT/evaluation/ARM/...            as `irg eval generate mini` and `irg eval score mini` write it
  OUT/evaluation/ARM/cost.json      peak memory and batch size
  OUT/evaluation/autoencoder.json   painted images that are correct after the autoencoder
  OUT/report/report.json            every figure; a shipped checkpoint has it as scores.json
  OUT/report/report.md, index.html  the tables; a page with tables, plots and traces
  OUT/report/*.png                  the plots: scores, tasks, choices
"""

import dataclasses
import functools
import json
import pathlib

from irg_jax import runs, storage
from irg_jax.evaluate import generate, get, records, score
from irg_jax.generate import generator
from irg_jax.generate import settings as generate_settings
from irg_jax.mini import benchmark, figures, phases, vae
from irg_jax.mini import world as world_lib
from irg_jax.mini.arms import ALL, ARMS, FINAL, WORDING, Arm
from irg_jax.reports import pages, plots
from irg_jax.train import logs

HERE, ELSEWHERE = "here", "in the run that made the checkpoint"
_TRAINED_AS = {"checkpoint": "irgl"}  # folder of weights -> folder of the training
_SPLITS = ("seen", "unseen", "all")
_OPEN = "What prompts leave open: entropy of the choice, 1 if even"


def run(out, arms: tuple[Arm, ...] = ARMS) -> pathlib.Path:
  """Reports on a finished run, or else on the package's checkpoint; returns the page's path.

  Missing images of `arms` are generated first. ValueError where the run is not finished, or there
  is neither a run nor a checkpoint in the package.
  """
  out, checkpoint = pathlib.Path(out), storage.SHIPPED
  if (out / FINAL.weights).is_dir():
    settings = runs.read(out / "mini.json")
    images = settings.get("test_images") or settings["test_pictures"]  # the name in version 0.1
    mini = benchmark.MINIS[settings.get("world", world_lib.WORLD1.name)]
    items = benchmark.select(settings["test_seen"], settings["test_unseen"], images, mini)
    evaluate(out, items, settings["sample_batch"], arms)
    return make(out, settings=settings, mini=mini)
  if (out / "mini.json").is_file():
    raise ValueError(f"--out {out}: the run in there is not finished; go on with irg mini run "
                     f"--out {out}, or give another folder to measure the package's checkpoint")
  if not checkpoint.is_dir():
    raise ValueError(f"--out {out}: no run of irg mini run in there, and this copy of the package "
                     "comes without a checkpoint to measure; make a run first")
  others = _shipped_arms(checkpoint / score.SCORES)
  evaluate(out, benchmark.select(), arms=[FINAL], checkpoint=checkpoint)
  return make(out, others)


def make(out, others: dict | None = None, settings: dict | None = None,
         mini: benchmark.Mini = benchmark.MINI) -> pathlib.Path:
  """Writes the report of the arms that are scored under `out`; returns the page's path.

  `others` are figures of arms that are not there, see `build`. With `settings`, the run's
  mini.json, the run's checkpoint gets the figures and its card.
  """
  out = pathlib.Path(out)
  drawn = {arm.name: benchmark.read(out / "evaluation" / arm.name, mini)
           for arm in ALL if (out / "evaluation" / arm.name / score.ITEMS).is_file()}
  if not drawn:
    raise ValueError(f"--out {out}: nothing in there has been drawn and scored")
  report, folder = build(drawn, others, mini), out / "report"
  for arm in ALL:
    if arm.name in drawn and (training := read_training(out, arm)):
      report["arms"][arm.name]["training"] = training
  if again := figures.read_seeds(out):
    report["seeds"] = figures.compare_seeds({0: report} | again, mini.read())
  if (alone := out / "evaluation" / "autoencoder.json").is_file():
    report["autoencoder"] = json.loads(alone.read_text())
  images, text = charts(report), json.dumps(report, indent=1, ensure_ascii=False) + "\n"
  examples = benchmark.choose(drawn[FINAL.name]) if FINAL.name in drawn else []
  texts = {folder / "report.json": text, folder / "report.md": markdown(report),
           folder / "index.html": pages.render(
               "mini_report", test=report["test"], plots=images, tables=tables(report),
               notes=notes(report), examples=examples)}
  if settings:
    checkpoint = out / FINAL.weights
    texts |= {checkpoint / score.SCORES: text, checkpoint / "README.md": card(report, settings)}
  folder.mkdir(parents=True, exist_ok=True)
  for path, content in texts.items():
    storage.write_text(path, content)
  for name, content in images.items():
    storage.write_bytes(folder / name, content)
  return folder / "index.html"


def build(drawn: dict, others: dict | None = None, mini=benchmark.MINI) -> dict:
  """All figures, of `benchmark.read` and of other arms, as JSON values.

  {"arms": {name: {"title", "measured", "rounds", "cost"}}, as in `ALL`, then "best_of_two",
   "differences": {name: {split: interval}}, "intervals": their method,
   "test": numbers of prompts, "world": its name, if it is not the first}
  `make` adds "autoencoder": {"right", "pictures"}, "training" to an arm, see `read_training`, and
  "seeds", see `figures.compare_seeds`. See `figures.arm_figures` for rounds and cost.
  """
  known = (others or {}) | {
      arm.name: {"title": arm.title, "measured": HERE, **figures.arm_figures(drawn[arm.name])}
      for arm in ALL if arm.name in drawn}
  arms = {arm.name: known[arm.name] for arm in ALL if arm.name in known}
  if FINAL.name in drawn and (best := figures.best_of_two(drawn[FINAL.name])):
    arms["best_of_two"] = {"title": WORDING["best_of_two"], "measured": HERE, "cost": {},
                           "rounds": {"1": best}}
  values = {(name, number): entry["by_prompt"] for name, arm in arms.items()
            for number, entry in arm["rounds"].items()}
  items, differences = mini.read(), {}
  for name, *pair in WORDING["differences"]:
    after, before = (values.get(tuple(key)) for key in pair)
    if after and before:
      differences[name] = figures.difference(after, before, items)
  return {"arms": arms, "differences": differences,
          "intervals": "95 %, bootstrap over the prompts of each task, "
                       f"{figures.RESAMPLES} resamples, seed {figures.SEED}",
          "test": {"prompts": len(items), **mini.counts(len(items))}} | (
              {} if mini.world is world_lib.WORLD1 else {"world": mini.world.name})


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


def evaluate(out: pathlib.Path, items, batch_size: int = 64, arms=ARMS,
             checkpoint=None) -> None:
  """Generates the missing images of `items` and scores each arm; and the autoencoder alone.

  `checkpoint` is used for all arms in place of the run's own. ValueError where an arm's weights
  are missing, or its images are of other weights.
  """
  mini = get(items[0].benchmark)
  for arm in arms:
    weights, folder = pathlib.Path(checkpoint or out / arm.weights), out / "evaluation" / arm.name
    if not weights.is_dir():
      raise ValueError(f"{weights}: no such folder; the run in {out} is not finished, go on with "
                       "irg mini run")
    print(f"irg mini: drawing the test, {arm.title}", flush=True)
    draw(arm, weights, folder, items, batch_size)
    score_new(folder, mini)
  # The autoencoder is frozen, so it is the same in any arm.
  vae.measure(weights, out / "evaluation" / "autoencoder.json", [item.extra for item in items])


def draw(arm: Arm, checkpoint, folder: pathlib.Path, items, batch_size: int) -> None:
  """Generates the missing images of an arm, with the checkpoint's own settings."""
  defaults, mini = generate_settings.read_defaults(checkpoint), get(items[0].benchmark)
  result = generate.generate_images(generate.Request(
      benchmark=mini, items=tuple(mini.read()), selected=tuple(items),
      out=folder, checkpoint=checkpoint, batch_size=batch_size,
      settings=dataclasses.replace(defaults.settings, rounds=arm.rounds, think=arm.think),
      system_prompt=defaults.system_prompt if arm.think else "",
      draw=phases.blind if arm.blind else generator.Generator.batch))
  if result.generated:
    peak = int(logs.memory()["memory/host_peak_gib"] * 2**30)  # of this process so far
    storage.write_json(folder / "cost.json", {"peak_bytes": peak, "batch_size": batch_size})


def score_new(folder, mini: benchmark.Mini = benchmark.MINI) -> None:
  """Scores an arm, unless this very verifier has scored all its images."""
  images = score.open_folder(mini, folder)
  there, path = list(score.images_there(images)), images.out / score.SCORES
  if path.is_file():
    before = json.loads(path.read_text(encoding="utf-8"))
    judged = sum(r["pictures"] + r["unscored"]["total"] for r in before["rounds"].values())
    if before["protocol"] == benchmark.protocol() and judged == len(there):
      return
  mini.score(images)


def read_training(out: pathlib.Path, arm: Arm) -> dict | None:
  """{"updates", "samples", "seconds"} of an arm's training after the base model, from its log.

  None where nothing was trained, or the log is gone. Seconds are from update to update, without the
  first one after each start. A stage counts with all before it.
  """
  training, *stage = pathlib.PurePath(arm.weights).parts
  path = out / _TRAINED_AS.get(training, training) / logs.FILE
  if training == "base" or not path.is_file():
    return None
  steps = {(line["stage"], line["step"]): line  # the last one, if it was made again
           for _, line in records.read_lines(path) if line and "samples" in line}
  last = stage[0] if stage else "stage2"
  counted = [line for (name, _), line in steps.items() if name <= last]
  return {"updates": len(counted), "samples": sum(len(line["samples"]) for line in counted),
          "seconds": sum(line["seconds"] or 0 for line in counted)}


def tables(report: dict) -> list[tuple[str, list[str], list[list[str]]]]:
  """(title, head, rows) of every table, as text; those without a row are left out."""
  rows = _rows(report)
  by_name = lambda key, text: (WORDING[key].values(), [
      [row["name"], *(text(row[key][name]) for name in WORDING[key])]
      for row in rows if key in row])
  pairs = [(row["name"], row["reflections"] | row["changes"]) for row in rows if "changes" in row]
  seeds = report.get("seeds", {"seeds": [], "rows": {}})
  found = [
      ("Overall, mean over tasks", [*_SPLITS, "pictures"], [
          [row["name"], *(_interval(row["scores"][split]["overall"]) for split in _SPLITS),
           str(row["pictures"])] for row in rows]),
      *(_by_task(report, rows, split) for split in ("seen", "unseen")),
      ("Part by part, means over pictures", *by_name("parts", "{:.3f}".format)),
      ("Paired differences", _SPLITS, [
          [name, *(_interval(values[split]) for split in _SPLITS)]
          for name, values in report["differences"].items()]),
      ("From the picture before to this round", [name for name, _ in pairs], [
          [text, *(_share(shares[key]) for _, shares in pairs)]
          for key, text in WORDING["shares"].items()]),
      ("Seeds of training", [*(f"seed + {n}" for n in seeds["seeds"]),
                             "all, intervals over prompts and seeds"], [
          [name, *map(_interval, [*values["each"], values["all"]])]
          for name, values in seeds["rows"].items()]),
      ("Training after the base model", ["updates", "samples", "minutes"], [
          [arm["title"], str(cost["updates"]), str(cost["samples"]),
           _number(cost["seconds"], 1, 60)]
          for arm in report["arms"].values() if (cost := arm.get("training"))]),
      (_OPEN, *by_name("choices", _spread)),
      ("Plans, seconds, memory", [
          "pictures as planned, cell by cell", "seconds a batch", "pictures a batch", "peak GiB"], [
          [row["name"], _share(row["plan_drawn"]), _number(row["seconds"], 1),
           str(row["cost"].get("batch_size", "–")),
           _number(row["cost"].get("peak_bytes"), 2, 2**30)] for row in rows
          if "plan_drawn" in row]),
      ("Passes of the decoder for a picture", ["passes"], [
          [row["name"], str(row["passes"])] for row in rows if row.get("passes")])]
  return [(title, ["", *head], lines) for title, head, lines in found if lines]


def _by_task(report, rows, split):
  scores = [(row["name"], row["scores"][split]["tasks"]) for row in rows]
  tasks = [t for t in world_lib.of(report).tasks if any(t in values for _, values in scores)]
  return f"By task, {split} combinations", tasks, [
      [name, *(_interval(values.get(t)) for t in tasks)] for name, values in scores]


def notes(report: dict) -> list[str]:
  """Caveats of the figures."""
  others = [arm["title"] for arm in report["arms"].values() if arm["measured"] != HERE]
  missing = [f"{row['name']}: {row['missing']}" for row in _rows(report) if row["missing"]]
  return pages.render("mini_notes.txt", report=report, elsewhere=ELSEWHERE, others=others,
                      missing=missing).splitlines()


def markdown_table(title: str, head: list[str], rows: list[list[str]]) -> str:
  """One of `tables` under its title."""
  return f"## {title}\n\n{pages.table(head, rows, numbers=True)}"


def markdown(report: dict) -> str:
  """The tables and notes."""
  return "\n\n".join(["# The mini world, measured", *_markdown(report, "## Notes")]) + "\n"


def card(report: dict, settings: dict) -> str:
  """The model card, Markdown; `settings` is the mini.json of the run that made the checkpoint."""
  return pages.render("mini_card.md", settings=settings, world=world_lib.of(report), lib=world_lib,
                      tables="\n\n".join(_markdown(report))) + "\n"


def charts(report: dict) -> dict[str, bytes]:
  """The plots, PNG by file name; those without a value are left out."""
  names, tasks = [arm.name for arm in ARMS], list(world_lib.of(report).tasks)
  rows = [row for row in _rows(report) if row["key"][0] in names]
  free = [row for row in rows if "choices" in row]
  labels = lambda rows: [row["name"].replace(", ", "\n") for row in rows]
  bar = lambda value: value and dict.fromkeys(("value", "low", "high"), value["entropy"])
  found = {
      "scores.png": ("Whole images right, mean over tasks, with 95 % intervals", labels(rows), [
          (f"{split} combinations", [row["scores"][split]["overall"] for row in rows])
          for split in ("seen", "unseen")]),
      "tasks.png": ("By task, seen and unseen together", tasks, [
          (row["name"], [row["scores"]["all"]["tasks"].get(task) for task in tasks])
          for row in rows if row["key"] in (("base", "1"), ("irg", "1"), ("irg", "2"))]),
      "choices.png": (_OPEN, labels(free), [
          (name, [bar(row["choices"][key]) for row in free])
          for key, name in WORDING["choices"].items()
          if any(row["choices"][key] for row in free)])}
  return {name: plots.bar_chart(*chart) for name, chart in found.items() if chart[-1]}


def _markdown(report, *before_notes):
  return [*(markdown_table(*found) for found in tables(report)), *before_notes,
          "\n".join(f"- {text}" for text in notes(report))]


def _rows(report):
  """The figures of every round of every arm, with "key", "name" and "cost".

  The name is "stage 2, round 1", or the title alone where an arm has one round.
  """
  return [figures | {"key": (name, number), "cost": arm["cost"], "name":
                     arm["title"] + (f", round {number}" if len(arm["rounds"]) > 1 else "")}
          for name, arm in report["arms"].items() for number, figures in arm["rounds"].items()]


def _number(value, places, unit=1):
  return "–" if value is None else f"{value / unit:.{places}f}"


def _shown(form, value):
  """A figure of `figures` in words, where there is one."""
  return "–" if value is None or None in value.values() else form.format(**value)


_interval = functools.partial(_shown, "{value:.3f} [{low:.3f}, {high:.3f}]")
_spread = functools.partial(_shown, "{entropy:.2f} ({most} {share:.2f}, of {count})")
_share = functools.partial(_shown, "{share:.3f} ({count} of {of})")
