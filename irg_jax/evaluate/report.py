"""The paper's table of runs that have been scored: Markdown, JSON, and pages with the images."""

import dataclasses
import json
import pathlib

from irg_jax.evaluate import layout
from irg_jax.evaluate import oneig
from irg_jax.evaluate import prompts
from irg_jax.evaluate import published
from irg_jax.evaluate import score
from irg_jax.evaluate import tiif
from irg_jax.evaluate import wise
from irg_jax.storage import atomic_file

TITLES = {"geneval": "GenEval", "wise": "WISE", "tiif": "TIIF-Bench", "genai_bench": "GenAI-Bench",
          "oneig": "OneIG-Bench, English", "mini": "Mini world"}
SEEDS = ("the seed of an image is the first four bytes of the SHA-256 of "
         '["BENCHMARK", "PROMPT ID", PICTURE], a JSON list')


@dataclasses.dataclass(frozen=True)
class Run:
  """A scored run: its folder and the content of its scores.json."""

  out: pathlib.Path
  scores: dict

  @property
  def benchmark(self) -> str:
    return self.scores["benchmark"]

  @property
  def rounds(self) -> list[int]:
    return sorted(map(int, self.scores["rounds"]))


def load(folders) -> list[Run]:
  """Reads the scores of runs, a benchmark at most once, in the order of the paper.

  Raises:
    ValueError: no scores there, or two runs of one benchmark.
  """
  found = {}
  for out in map(pathlib.Path, folders):
    path = out / score.SCORES
    try:
      scores = json.loads(path.read_text(encoding="utf-8"))
      name = scores["benchmark"]
      rounds = {int(number) for number in scores["rounds"]}
    except FileNotFoundError:
      raise ValueError(f"{out}: has no {score.SCORES}; run irg eval score first") from None
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(f"{path}: cannot be read ({e}); run irg eval score again") from e
    if name in found or name not in prompts.BENCHMARKS or not rounds:
      why = f"{found[name].out} is of {name}, too" if name in found else "is of no benchmark"
      raise ValueError(f"{out}: {why}; a report has one run of each benchmark")
    found[name] = Run(out, scores)
  return [found[name] for name in prompts.BENCHMARKS if name in found]


def headline(benchmark: str, summary: dict) -> dict[str, float | None]:
  """The columns of the main table that a round's summary fills; TIIF times 100."""
  if benchmark == "wise":
    return {"WISE, plain mean": summary["unweighted_partial"],
            "WISE, weighted": summary["weighted_partial"]}
  if benchmark == "tiif":
    return {f"TIIF {n}": _percent(summary["overall"][n]) for n in tiif.LENGTHS}
  column = {"geneval": "GenEval", "genai_bench": "GenAI-Bench", "oneig": "OneIG-EN",
            "mini": "Mini world"}[benchmark]
  return {column: summary["overall"]}


def categories(benchmark: str, summary: dict) -> dict[str, float | None]:
  """A round's figures by category, the benchmark's overall last."""
  if benchmark in layout.SAMPLES:
    parts = {"": summary} | {f", {name}": s for name, s in summary.get("splits", {}).items()}
    return {f"{task}{which}": value for which, part in parts.items() for task, value in (
        *((tag, task["score"]) for tag, task in part["tasks"].items()),
        ("overall", part["overall"]))}
  if benchmark == "wise":
    return {name: summary["categories"][name]["score"] for name in wise.LEGACY.ranges} | {
        "plain mean": summary["unweighted_partial"], "weighted": summary["weighted_partial"]}
  if benchmark == "tiif":
    named = {name.split(" - ")[0].replace("_", ": ", 1): row
             for name, row in summary["groups"].items()} | {"overall": summary["overall"]}
    return {f"{name}, {n}": _percent(row[n]) for n in tiif.LENGTHS for name, row in named.items()}
  if benchmark == "genai_bench":
    return {tag: entry["score"] for tag, entry in summary["tags"].items()}
  return {name: summary["parts"][name]["score"] for name in oneig.PARTS} | {
      "overall": summary["overall"]}


def build(runs: list[Run]) -> dict:
  """The report as plain data; the pages and the Markdown say nothing else.

  {"columns", "rows": [{"name", "published": bool, "values": {column: number},
   "partial": [column, ...]}], "categories": {benchmark: {"rows": {category: {row name: number}},
   "names": [row name, ...]}}, "settings": {...}, "coverage": [...], "notes": [...]}
  """
  rows = [{"name": name, "published": True, "values": values, "partial": []}
          for name, values in published.ROWS.items()]
  for number in sorted({n for run in runs for n in run.rounds}):
    row = {"name": f"this run, round {number}", "published": False, "values": {}, "partial": []}
    for run in runs:
      if str(number) in run.scores["rounds"]:
        summary = run.scores["rounds"][str(number)]
        values = headline(run.benchmark, summary)
        row["values"] |= values
        row["partial"] += [c for c, v in values.items() if v is not None
                           and not summary["complete"]]
    rows.append(row)
  columns = dict.fromkeys([*published.COLUMNS, *(c for row in rows for c in row["values"])])
  return {"columns": list(columns), "rows": rows,
          "categories": {run.benchmark: _category_table(run) for run in runs},
          "settings": _settings(runs), "coverage": [c for r in runs for c in _coverage(r)],
          "notes": _notes(runs), "caveats": list(published.CAVEATS)}


def write(runs: list[Run], folder) -> pathlib.Path:
  """Writes report.json, report.md, report.html and pages/; returns the page's path."""
  from irg_jax.evaluate import report_page
  folder = pathlib.Path(folder)
  (folder / "pages").mkdir(parents=True, exist_ok=True)
  report = build(runs)
  links = {run.benchmark: report_page.write_pages(run, folder / "pages") for run in runs}
  write_text(folder / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
  write_text(folder / "report.md", markdown(report))
  write_text(folder / "report.html", report_page.report_html(report, links))
  return folder / "report.html"


def markdown(report: dict) -> str:
  """The report's tables."""
  parts = ["# Results", table_text(report)]
  if any(row["partial"] for row in report["rows"]):
    parts.append("\\* of a part of the prompts: see what is missing below.")
  for name, table in report["categories"].items():
    head = ["", *table["names"]]
    body = [[category, *(show(values.get(n), name) for n in table["names"])]
            for category, values in table["rows"].items()]
    parts += [f"## {TITLES[name]}", _markdown_table(head, body)]
  parts += ["## What was scored", _markdown_table(list(COVERAGE.values()),
                                                  [_coverage_cells(c) for c in report["coverage"]])]
  names = list(report["settings"])
  keys = list(dict.fromkeys(k for values in report["settings"].values() for k in values))
  parts += ["## Settings", _markdown_table(["", *map(TITLES.get, names)], [
      [key, *(_cell(report["settings"][n].get(key)) for n in names)] for key in keys])]
  parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
  parts += ["## Before comparing", "\n".join(f"- {text}" for text in report["caveats"])]
  return "\n\n".join(parts) + "\n"


def table_text(report: dict) -> str:
  """The main table alone, as Markdown."""
  return _markdown_table(["", *report["columns"]], [
      [row["name"], *(show(row["values"].get(c), c) + "\\*" * (c in row["partial"])
                      for c in report["columns"])] for row in report["rows"]])


def show(value: float | None, column: str = "") -> str:
  """A figure as the paper has it: TIIF's, times 100, with two places, others with three."""
  if value is None:
    return "–"
  return f"{value:.2f}" if column.lower().startswith("tiif") else f"{value:.3f}"


COVERAGE = {"benchmark": "benchmark", "round": "round", "scored": "scored", "missing":
            "not there", "unscored": "no score", "reasons": "why"}


def _coverage(run):
  for number in run.rounds:
    summary = run.scores["rounds"][str(number)]
    reasons = dict(summary["unscored"]["by_reason"])
    if irregular := summary.get("irregular", {}).get("total"):
      reasons["scored as 0: neither Yes nor No"] = irregular
    yield {"benchmark": TITLES[run.benchmark], "round": number, "scored": scored(run, summary),
           "missing": summary["missing"], "unscored": summary["unscored"]["total"],
           "reasons": reasons}


def scored(run: Run, summary: dict) -> int:
  """Pictures (GenEval, mini), prompts of a part (OneIG) or prompts that have a score."""
  if run.benchmark in layout.SAMPLES:
    return summary["pictures"]
  if run.benchmark == "oneig":
    return sum(part["prompts"] for part in summary["parts"].values())
  return summary["items"]


def _coverage_cells(entry):
  why = "; ".join(f"{reason}: {count}" for reason, count in entry["reasons"].items())
  return [_cell(value) for value in (entry | {"reasons": why}).values()]


def _category_table(run):
  ours = {f"this run, round {n}": categories(run.benchmark, run.scores["rounds"][str(n)])
          for n in run.rounds}
  columns = published.CATEGORIES.get(run.benchmark, {}) | ours
  order = list(dict.fromkeys(c for values in ours.values() for c in values))
  return {"names": list(columns),
          "rows": {c: {name: values.get(c) for name, values in columns.items()} for c in order}}


def _settings(runs):
  """{benchmark: {setting: value}}, flat, the judge's included."""
  result = {}
  for run in runs:
    record = run.scores.get("run") or {}
    result[run.benchmark] = dict(flat({
        "prompts": run.scores["prompts"],
        **{k: v for k, v in record.get("settings", {}).items() if k != "benchmark"},
        **record.get("notes", {}),
        "judge": run.scores.get("judge") or {},
        "protocol": run.scores.get("protocol") or {},
    }))
  return result


def flat(values: dict, prefix: str = ""):
  """(dotted name, value) of every leaf that is not None."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from flat(value, f"{prefix}{name}.")
    elif value is not None:
      yield prefix + str(name), value


def _notes(runs):
  notes = [f"Seeds: {SEEDS}."]
  checkpoints = {(r.scores.get("run") or {}).get("settings", {}).get("checkpoint") for r in runs}
  if len(checkpoints) > 1:
    notes.append("Caution: not all runs are of the same checkpoint, so a row of the main table is "
                 "not of one model.")
  for run in runs:
    if not (run.scores.get("run") or {}):
      notes.append(f"{TITLES[run.benchmark]}: the folder has no run.json, so how its images were "
                   "made is unknown.")
  return notes


def _percent(value):
  return None if value is None else 100 * value


def _markdown_table(head, body):
  lines = [head, ["---"] * len(head), *body]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _cell(value):
  return "" if value is None else " ".join(str(value).replace("|", "\\|").split())


def write_text(path, text: str) -> None:
  """Writes a file whole."""
  with atomic_file(path) as aside:
    aside.write_text(text, encoding="utf-8", errors="replace")
