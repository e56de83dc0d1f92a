"""The report's HTML: the tables, and pages with each prompt's images, round beside round.

Images are linked, not copied: a page shows them as long as the runs' folders stay in place.
"""

import json
import os
import pathlib
import re
import urllib.parse

from irg_jax.reports import pages
from irg_jax.evaluate import layout
from irg_jax.evaluate import report as report_lib
from irg_jax.evaluate import score
from irg_jax.reports.pages import escape

_PROMPTS_A_PAGE = 50
_CSS = """
h2.part { margin-top: 3rem; } .scroll { margin-top: .8rem; } main.wide p { margin-top: .6rem; }
tr.published th, tr.published td { color: var(--soft); } nav { margin-top: 1rem; }
.pair { display: grid; gap: 1.5rem; margin-top: .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); }
.pair img, .pair .blank { aspect-ratio: 1; object-fit: contain; background: var(--card);
  border-radius: 4px; } .said { white-space: pre-wrap; overflow-wrap: anywhere; color: var(--soft);
  font: 13.5px/1.5 system-ui, sans-serif; max-height: 18rem; overflow: auto; }
article { margin-top: 3.5rem; border-top: 1px solid var(--line); padding-top: 1.5rem; }
"""


def report_html(report: dict, links: dict[str, list[str]]) -> str:
  """The page with all tables; `links` are the pages of each benchmark, by file name."""
  head = ["", *report["columns"]]
  rows = []
  for row in report["rows"]:
    cells = [report_lib.show(row["values"].get(c), c) + "*" * (c in row["partial"])
             for c in report["columns"]]
    rows.append((row["name"], cells, "published" if row["published"] else ""))
  parts = ["<h1>Results</h1>", _table(head, rows)]
  if any(row["partial"] for row in report["rows"]):
    parts.append('<p class="aside">* of a part of the prompts: see what was scored.</p>')
  for name, table in report["categories"].items():
    parts += [_part(report_lib.TITLES[name]), _page_links(links.get(name, ())),
              _table(["", *table["names"]], [
                  (category, [report_lib.show(values.get(n), name) for n in table["names"]], "")
                  for category, values in table["rows"].items()])]
  parts += [_part("What was scored"), _coverage(report), _part("Settings"), _settings(report),
            _part("Notes"), *_paragraphs(report["notes"]),
            _part("Before comparing"), *_paragraphs(report["caveats"])]
  return pages.page("Results", f'<main class="wide">{"".join(parts)}</main>', _CSS)


def write_pages(run, folder) -> list[str]:
  """Writes the pages of a run's prompts into `folder`; returns their names, in order.

  Only the places of the lines of items.jsonl are held, not the lines.
  """
  folder, places = pathlib.Path(folder), _places(run.out / score.ITEMS)
  ids = list(places)
  names = []
  with open(run.out / score.ITEMS, "rb") as file:
    for start in range(0, len(ids), _PROMPTS_A_PAGE):
      chosen = ids[start : start + _PROMPTS_A_PAGE]
      name = f"{run.benchmark}-{start // _PROMPTS_A_PAGE + 1:03d}.html"
      articles = [_article(run, folder, _lines(file, places[i])) for i in chosen]
      title = f"{report_lib.TITLES[run.benchmark]}, prompts {start + 1} to {start + len(chosen)}"
      body = (f'<main class="wide"><p class="meta"><a href="../report.html">Results</a></p>'
              f"<h1>{escape(title)} of {len(ids)}</h1>{''.join(articles)}</main>")
      report_lib.write_text(folder / name, pages.page(title, body, _CSS))
      names.append(name)
  _remove_others(folder, run.benchmark, names)
  return names


def _article(run, folder, lines):
  """One prompt: for each image of it, the rounds side by side."""
  first = lines[0]
  parts = [f'<p class="label">{escape(first["id"])} · {escape(", ".join(first["tasks"]))}</p>'
           f'<p dir="auto">{escape(first["prompt"])}</p>']
  for image in sorted({entry["picture"] for entry in lines}):
    found = {entry["round"]: entry for entry in lines if entry["picture"] == image}
    # A file may hold several images: OneIG's grids.
    seeds = [layout.seed(run.benchmark, first["id"], image + i) for i in range(first["in_file"])]
    parts.append(f'<p class="aside">image {image + 1} · seed {", ".join(map(str, seeds))}</p>'
                 '<div class="pair">'
                 + "".join(_round(run, folder, n, found.get(n)) for n in run.rounds) + "</div>")
  return f"<article>{''.join(parts)}</article>"


def _round(run, folder, number, entry):
  if entry is None:
    return f'<div><p class="label">round {number}</p><p class="aside">was not scored</p></div>'
  path = run.out / entry["file"]
  image = '<div class="blank"></div>'
  if path.is_file():
    link = urllib.parse.quote(os.path.relpath(path, folder))
    alt = escape(f"Round {number}, drawn for: {pages.short(entry['prompt'], 300)}")
    image = f'<a href="{link}"><img loading="lazy" alt="{alt}" src="{link}"></a>'
  scores = " · ".join(f"{name} {value:g}" for name, value in entry["scores"].items())
  why = f'<p class="note">no score: {escape(entry["why"])}</p>' if entry["why"] else ""
  return (f'<div><p class="label">round {number}</p>{image}<p class="meta">{escape(scores)}</p>'
          f'{why}<p class="said" dir="auto">{escape(_words(entry))}</p></div>')


def _words(entry):
  """What the judge said, as text: beside each question where there are several."""
  if entry.get("questions"):
    asked = "\n".join(f"{q} expected {e.strip().lower()}, said {p}"
                      for q, e, p in entry["questions"])
    return f"{asked}\n\n{entry['words']}"
  words = entry["words"]
  if not isinstance(words, dict):
    return words or ""
  lines = []
  for cell, said in words.items():
    lines.append(f"cell {int(cell) + 1}")
    lines += [f"  {q} {a}" for q, a in said.items()] if isinstance(said, dict) else [f"  {said}"]
  return "\n".join(lines)


def _places(path):
  """{prompt id: where its lines begin}, in the order of the file."""
  places = {}
  with open(path, "rb") as file:
    position = 0
    for line in file:
      places.setdefault(json.loads(line)["id"], []).append(position)
      position += len(line)
  return places


def _lines(file, positions):
  lines = []
  for position in positions:
    file.seek(position)
    lines.append(json.loads(file.readline()))
  return lines


def _remove_others(folder, benchmark, names):
  """Pages of an earlier and longer report."""
  for path in folder.glob(f"{benchmark}-*.html"):
    if re.fullmatch(rf"{benchmark}-\d{{3,}}\.html", path.name) and path.name not in names:
      path.unlink()


def _part(title):
  return f'<h2 class="part">{escape(title)}</h2>'


def _paragraphs(texts):
  return (f'<p class="aside">{escape(text)}</p>' for text in texts)


def _page_links(names):
  links = " ".join(f'<a href="pages/{name}">{i}</a>' for i, name in enumerate(names, 1))
  return f'<nav class="aside">images and the judge\'s words, page {links}</nav>' if links else ""


def _table(head, rows):
  """`rows` are (name, cells, class)."""
  top = "".join(f'<th{" class=n" if i else ""}>{escape(h)}</th>' for i, h in enumerate(head))
  body = "".join(
      f'<tr class="{kind}"><th>{escape(name)}</th>'
      + "".join(f'<td class="n">{escape(cell)}</td>' for cell in cells) + "</tr>"
      for name, cells, kind in rows)
  return (f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
          "</div>")


def _coverage(report):
  rows = []
  for entry in report["coverage"]:
    why = "; ".join(f"{reason}: {count}" for reason, count in entry["reasons"].items())
    rows.append((entry["benchmark"], [entry["round"], entry["scored"], entry["missing"],
                                      entry["unscored"], why], ""))
  return _table(list(report_lib.COVERAGE.values()), rows)


def _settings(report):
  names = list(report["settings"])
  keys = list(dict.fromkeys(k for values in report["settings"].values() for k in values))
  return _table(["", *map(report_lib.TITLES.get, names)], [
      (key, [pages.short(str(report["settings"][n].get(key, "")), 120) for n in names], "")
      for key in keys])
