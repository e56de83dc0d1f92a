"""The report's figures as text: tables and notes for Markdown, page and model card."""

from irg_jax.mini import world

HERE, ELSEWHERE = "here", "in the run that made the checkpoint"
_TEXTS = {
    "readable": "reflections that can be read",
    "faults_named": "reflections that name exactly the actual faults (none, if there is none)",
    "wrong_faults_named": "wrong images, all faults named exactly",
    "wrong_noticed": "wrong images of which the reflection says that something falls short",
    "right_doubted": "right images of which it says so",
    "seen_rightly": "reflections that see in each cell what is there",
    "right_to_wrong": "right images made wrong",
    "wrong_to_right": "wrong images made right",
}


def row_name(report: dict, arm: str, number: str) -> str:
  """"stage 2, round 1"; the title alone where an arm has one round."""
  entry = report["arms"][arm]
  return entry["title"] + (f", round {number}" if len(entry["rounds"]) > 1 else "")


def rows_of(report):
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
           "An image is right if the verifier sees exactly what was asked for in it. \"Unseen\" "
           "are prompts with a shape in a colour, or a relation of two shapes, that no training "
           "picture or prompt has; single_object, two_object and counting cannot be unseen.",
           "Seconds are those of a whole batch; memory is the process's peak up to the end of "
           "that arm, so what ran before in the same process counts."]
  if alone := report.get("autoencoder"):
    found.append(f"The autoencoder alone: of {alone['pictures']} painted images of the test's "
                 f"prompts its round trip keeps {alone['right']} right "
                 f"({alone['right'] / alone['pictures']:.3f}).")
  there = [arm["title"] for arm in report["arms"].values() if arm["measured"] != HERE]
  if there:
    found.append(f"Measured {ELSEWHERE}: {', '.join(there)}.")
  missing = [f"{name}: {entry['missing']}" for name, entry in rows_of(report) if entry["missing"]]
  if missing:
    found.append(f"Pictures that could not be drawn or scored, and count nowhere: "
                 f"{'; '.join(missing)}.")
  return found


def markdown(report: dict) -> str:
  """The tables and notes."""
  parts = ["# The mini world, measured", *(markdown_table(*table) for table in tables(report)),
           "## Notes", bullets(notes(report))]
  return "\n\n".join(parts) + "\n"


def markdown_table(title: str, head: list[str], rows: list[list[str]]) -> str:
  """One of `tables` under its title."""
  lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
  return "\n".join([f"## {title}", "", *("| " + " | ".join(cells) + " |" for cells in lines)])


def bullets(texts: list[str]) -> str:
  return "\n".join(f"- {text}" for text in texts)


def show(value: dict | None) -> str:
  """An interval as text: "0.912 [0.880, 0.940]"."""
  return "–" if value is None else (
      f"{value['value']:.3f} [{value['low']:.3f}, {value['high']:.3f}]")


def _overall_table(report):
  head = ["", "seen", "unseen", "all", "pictures"]
  return "Overall, mean over tasks", head, [
      [name, *(show(entry["scores"][split]["overall"]) for split in ("seen", "unseen", "all")),
       str(entry["pictures"])] for name, entry in rows_of(report)]


def _task_table(report, split):
  found = [t for t in world.TASKS
           if any(t in entry["scores"][split]["tasks"] for _, entry in rows_of(report))]
  rows = [[name, *(show(entry["scores"][split]["tasks"].get(t)) for t in found)]
          for name, entry in rows_of(report)]
  return f"By task, {split} combinations", ["", *found], rows


def _difference_table(report):
  return "Paired differences", ["", "seen", "unseen", "all"], [
      [name, *(show(found[split]) for split in ("seen", "unseen", "all"))]
      for name, found in report["differences"].items()]


def _talk_table(report):
  """A column for each pair of rounds, a row for what happened between them."""
  pairs = [(name, entry) for name, entry in rows_of(report) if "changes" in entry]
  rows = [[text, *(_share((entry["reflections"] | entry["changes"])[key]) for _, entry in pairs)]
          for key, text in _TEXTS.items()]
  return "From the image before to this round", ["", *(name for name, _ in pairs)], rows


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
