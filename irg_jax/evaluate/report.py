"""The report of scored runs: the main table in Markdown, JSON and HTML, and pages with the images.

Images are linked, not copied: a page shows them as long as the runs' folders stay in place. Only
where a run and the report are not in the same bucket, or not both on this machine, are they copied.
"""

import collections
import dataclasses
import functools
import json
import os
import pathlib
import re
import urllib.parse

from irg_jax import evaluate, storage
from irg_jax.evaluate import base
from irg_jax.evaluate.records import read_lines
from irg_jax.evaluate.score import ITEMS, SCORES
from irg_jax.reports import pages

_PROMPTS_A_PAGE = 50


@dataclasses.dataclass(frozen=True)
class Scored:
  """A scored run: its folder and the content of its scores.json."""

  out: pathlib.Path
  scores: dict

  @property
  def benchmark(self) -> base.Benchmark:
    return evaluate.get(self.scores["benchmark"])

  @property
  def rounds(self) -> dict[int, dict]:
    """Summaries by round, in order."""
    return dict(sorted((int(n), summary) for n, summary in self.scores["rounds"].items()))


def load(folders) -> list[Scored]:
  """Reads the scores of runs, a benchmark at most once; returns them in the table's order.

  Raises:
    ValueError: no scores there, or two runs of one benchmark.
  """
  found = {}
  for out in map(storage.path, folders):
    path = out / SCORES
    try:
      scores = json.loads(path.read_text(encoding="utf-8"))
      name = scores["benchmark"]
      rounds = {int(number) for number in scores["rounds"]}
    except FileNotFoundError:
      raise ValueError(f"{out}: has no {SCORES}; run irg eval score first") from None
    except (ValueError, KeyError, TypeError) as e:
      raise ValueError(f"{path}: cannot be read ({e}); run irg eval score again") from e
    if name in found or name not in evaluate.BENCHMARKS or not rounds:
      why = f"{found[name].out} is of {name}, too" if name in found else "is of no benchmark"
      raise ValueError(f"{out}: {why}; a report has one run of each benchmark")
    found[name] = Scored(out, scores)
  return [found[name] for name in evaluate.BENCHMARKS if name in found]


def build(runs: list[Scored]) -> dict:
  """The report as plain data; the pages and the Markdown say nothing else.

  {"columns", "rows": [{"name", "published": bool, "values": {column: number},
   "partial": [column, ...]}], "categories": {benchmark: {"rows": {category: {row name: number}},
   "names": [row name, ...]}}, "settings": {...}, "coverage": [...], "notes": [...]}
  """
  benchmarks = evaluate.BENCHMARKS.values()
  published = {name: {column: value for b in benchmarks
                      for column, value in b.published.get(name, {}).items()}
               for name in base.PUBLISHED}
  rows = [{"name": name, "published": True, "values": values, "partial": []}
          for name, values in published.items()]
  for number in sorted({n for run in runs for n in run.rounds}):
    row = {"name": f"this run, round {number}", "published": False, "values": {}, "partial": []}
    for run in (run for run in runs if number in run.rounds):
      values = run.benchmark.headline(run.rounds[number])
      row["values"] |= values
      row["partial"] += [c for c, v in values.items() if v is not None
                         and not run.rounds[number]["complete"]]
    rows.append(row)
  columns = [c for b in benchmarks if b.published for c in b.columns]
  return {"columns": list(dict.fromkeys([*columns, *(c for row in rows for c in row["values"])])),
          "rows": rows,
          "categories": {run.benchmark.name: _category_table(run) for run in runs},
          "settings": {run.benchmark.name: _settings(run) for run in runs},
          "coverage": [c for r in runs for c in _coverage(r)],
          "notes": _notes(runs), "caveats": [text for b in benchmarks for text in b.caveats]}


def write(runs: list[Scored], folder) -> dict:
  """Writes report.json, report.md, report.html and pages/; returns the report, see `build`."""
  folder, report = storage.path(folder), build(runs)
  (folder / "pages").mkdir(parents=True, exist_ok=True)
  links = {run.benchmark.name: write_pages(run, folder / "pages") for run in runs}
  storage.write_json(folder / "report.json", report, indent=1, ensure_ascii=False)
  storage.write_text(folder / "report.md", markdown(report))
  storage.write_text(folder / "report.html", pages.render(
      "evaluation", sections=sections(report), links=links, notes=report["notes"],
      caveats=report["caveats"]))
  return report


def sections(report: dict) -> list[dict]:
  """The tables as text: title, head, rows; for some a benchmark.

  The first is the main table, with the number of its published rows, and whether it has a figure
  for a part of the prompts only.
  """
  title = lambda name: evaluate.get(name).title
  columns, rows = report["columns"], report["rows"]
  found = [{"title": "Results", "published": sum(row["published"] for row in rows),
            "partial": any(row["partial"] for row in rows), "head": ["", *columns], "rows": [
                [row["name"], *(show(row["values"].get(c), c) + "*" * (c in row["partial"])
                                for c in columns)] for row in rows]}]
  for name, table in report["categories"].items():
    found.append({"title": title(name), "benchmark": name, "head": ["", *table["names"]], "rows": [
        [category, *(show(values.get(n), name) for n in table["names"])]
        for category, values in table["rows"].items()]})
  head = ["benchmark", "round", "scored", "not there", "no score", "why"]
  found.append({"title": "What was scored", "head": head, "rows": [
      [_cell(value) for value in (*list(entry.values())[:-1], "; ".join(
          f"{reason}: {count}" for reason, count in entry["reasons"].items()))]
      for entry in report["coverage"]]})
  settings = report["settings"]
  keys = dict.fromkeys(key for values in settings.values() for key in values)
  found.append({"title": "Settings", "head": ["", *map(title, settings)], "rows": [
      [key, *(_cell(values.get(key)) for values in settings.values())] for key in keys]})
  return found


def markdown(report: dict) -> str:
  """The report's tables and notes."""
  parts = []
  for level, section in enumerate(sections(report)):
    parts += [f"{'##' if level else '#'} {section['title']}", _markdown_table(section)]
    if section.get("partial"):
      parts.append("\\* of a part of the prompts: see what is missing below.")
  parts += ["## Notes", "\n".join(f"- {note}" for note in report["notes"])]
  parts += ["## Before comparing", "\n".join(f"- {text}" for text in report["caveats"])]
  return "\n\n".join(parts) + "\n"


def table_text(report: dict) -> str:
  """The main table alone, as Markdown."""
  return _markdown_table(sections(report)[0])


def round_lines(run: Scored):
  """Yields a line for each round's figures, and one for each reason without a score."""
  for number, summary in run.rounds.items():
    irregular = summary.get("irregular") or {"total": 0}
    figures = ", ".join(f"{name} {show(value, name)}"
                        for name, value in run.benchmark.headline(summary).items())
    yield (f"round {number}: {figures} ({run.benchmark.scored(summary)} scored, "
           f"{summary['missing']} not there, {summary['unscored']['total']} without a score)")
    for reason, count in summary["unscored"]["by_reason"].items():
      examples = (f" ({pages.short(e['item'])}: {pages.short(e['detail'], 120)})"
                  for e in summary["unscored"]["examples"] if e["reason"] == reason and e["detail"])
      yield f"  no score: {reason}: {count}{next(examples, '')}"
    if irregular["total"]:
      yield (f"  {base.IRREGULAR}: {irregular['total']}, such as "
             f"{pages.short(irregular['examples'][0]['detail'])!r} (see --strict-official)")


def show(value: float | None, column: str = "") -> str:
  """A figure with its benchmark's decimal places; `column` is a column or a benchmark's name."""
  places = next((b.places for b in evaluate.BENCHMARKS.values()
                 if column == b.name or column in b.columns), 3)
  return "–" if value is None else f"{value:.{places}f}"


def write_pages(run: Scored, folder) -> list[str]:
  """Writes the pages of a run's prompts into `folder`; returns their names, in order."""
  folder, name, names = storage.path(folder), run.benchmark.name, []
  by_id, there = collections.defaultdict(list), base.listing(run.out)
  for _, line in read_lines(run.out / ITEMS):
    path = run.out / line["file"]
    link = _link(path, folder, folder / name / line["file"]) if there(line["file"]) else None
    by_id[line["id"]].append(line | {
        "link": link, "said": _words(line), "small": link is not None and pages.small(path),
        "thoughts": list(_thoughts(run, line))})
  for start in range(0, len(by_id), _PROMPTS_A_PAGE):
    chosen = list(by_id.values())[start : start + _PROMPTS_A_PAGE]
    names.append(f"{name}-{start // _PROMPTS_A_PAGE + 1:03d}.html")
    storage.write_text(folder / names[-1], pages.render(
        "evaluation_prompts", total=len(by_id), prompts=chosen, rounds=list(run.rounds),
        title=f"{run.benchmark.title}, prompts {start + 1} to {start + len(chosen)}",
        seed=functools.partial(base.seed, name)))
  for path in folder.glob(f"{name}-*.html"):  # of an earlier and longer report
    if re.fullmatch(rf"{name}-\d{{3,}}\.html", path.name) and path.name not in names:
      path.unlink()
  return names


def _link(path, folder, copy):
  """Address of an image for the pages in `folder`; of one in another bucket, or on this machine
  while they are in a bucket, that of its `copy`."""
  place = lambda p: None if storage.is_local(p) else str(p).split("/")[:3]
  if place(path) != place(folder):
    copy.parent.mkdir(parents=True, exist_ok=True)
    storage.write_bytes(copy, storage.read_file(path))
    path = copy
  return urllib.parse.quote(os.path.relpath(path, folder))


def _thoughts(run, line):
  """The thought before each image of a file; None without one. Empty without traces."""
  item = base.Item(run.benchmark.name, line["id"], line["prompt"], 1, {})
  for image in range(line["in_file"]):
    trace = base.read_trace(run.out, item, line["picture"] + image) or {"rounds": ()}
    yield from (entry["think"] for entry in trace["rounds"][line["round"] - 1 : line["round"]])


def _words(line):
  """The judge's words, beside each question where there are several."""
  if line.get("questions"):
    asked = "\n".join(f"{q} expected {e.strip().lower()}, said {p}"
                      for q, e, p in line["questions"])
    return f"{asked}\n\n{line['words']}"
  if not isinstance(line["words"], dict):
    return line["words"] or ""
  parts = []
  for cell, said in line["words"].items():
    parts.append(f"cell {int(cell) + 1}")
    parts += [f"  {q} {a}" for q, a in said.items()] if isinstance(said, dict) else [f"  {said}"]
  return "\n".join(parts)


def _coverage(run):
  for number, summary in run.rounds.items():
    reasons = dict(summary["unscored"]["by_reason"])
    if irregular := summary.get("irregular", {}).get("total"):
      reasons[base.IRREGULAR] = irregular
    yield {"benchmark": run.benchmark.title, "round": number,
           "scored": run.benchmark.scored(summary), "missing": summary["missing"],
           "unscored": summary["unscored"]["total"], "reasons": reasons}


def _category_table(run):
  ours = {f"this run, round {n}": run.benchmark.categories(summary)
          for n, summary in run.rounds.items()}
  every = run.benchmark.published_categories | ours
  order = list(dict.fromkeys(c for values in ours.values() for c in values))
  return {"names": list(every),
          "rows": {c: {name: values.get(c) for name, values in every.items()} for c in order}}


def _settings(run):
  """{setting: value} of a run, flat, the judge's included."""
  record = run.scores.get("run") or {}
  settings = {k: v for k, v in record.get("settings", {}).items() if k != "benchmark"}
  return dict(pages.flat({"prompts": run.scores["prompts"], **settings, **record.get("notes", {}),
                          "judge": run.scores.get("judge") or {},
                          "protocol": run.scores.get("protocol") or {}}))


def _notes(runs):
  notes = ["Seeds: the seed of an image is the first four bytes of the SHA-256 of "
           '["BENCHMARK", "PROMPT ID", PICTURE], a JSON list.']
  checkpoints = {(r.scores.get("run") or {}).get("settings", {}).get("checkpoint") for r in runs}
  if len(checkpoints) > 1:
    notes.append("Caution: not all runs are of the same checkpoint, so a row of the main table is "
                 "not of one model.")
  return notes + [f"{run.benchmark.title}: the folder has no run.json, so how its images were made "
                  "is unknown." for run in runs if not run.scores.get("run")]


def _markdown_table(section):
  cell = lambda text: text.replace("|", "\\|").replace("*", "\\*")
  return pages.table(section["head"], [[row[0], *map(cell, row[1:])] for row in section["rows"]])


def _cell(value):
  return "" if value is None else pages.shown(" ".join(str(value).split()))
