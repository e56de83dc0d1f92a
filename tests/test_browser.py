"""Pages in Chromium, where there is one, as wide as a notebook's window and as a phone."""

import pathlib

import numpy as np

from irg_jax.reports import pages, trace

PLAN = ("<think> Two things. Places: red circle A. Cells: "
        + " ".join(f"{at} {'red circle' if at in 'AF' else 'empty ground'}"
                   for at in "ABCDEFGHIJKLMNOP") + ". </think>")
LONG, WIDE = "word " * 900 + "x" * 300, ["a name of a row", *["0.950 [0.850, 1.000]"] * 7]
WIDTHS = (1280, 390)


def draw(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Writes a page of each kind, with long names, texts and tables."""
  picture = lambda size: np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)
  entry = lambda think, size: {"think": think, "think_tokens": 9, "hit_limit": True,
                               "picture": picture(size), "seconds": {"draw": 1.0, "think": 2.0}}
  given = {"prompt": "x" * 300, "system_prompt": LONG, "seed": 0, "checkpoint": "a/" * 90,
           "settings": {"a": {"long_" * 9: {"name": "v" * 200}}}, "versions": {}, "note": "n" * 200}
  entries = [trace.write_trace(folder / name, given | {"rounds": rounds}) for name, rounds in (
      ("mini", [entry(PLAN, 64), entry(f"{PLAN} {PLAN}", 64)]),
      ("large", [entry(LONG, 512), entry("short", 512), entry(LONG[-900:], 512)]))]
  trace.write_index(folder, entries)
  tables = [("T" * 20, ["", *["a_long_column"] * 7], [WIDE] * 3)]
  png = (folder / "mini/round1.png").read_bytes()
  line = {"id": "0", "tasks": ["t"], "prompt": "p" * 200, "picture": 0, "round": 1, "in_file": 1,
          "link": "mini/round1.png", "small": True, "scores": {"correct": 1}, "why": "w" * 200,
          "said": "s" * 300, "thoughts": [PLAN]}
  made = {
      "report": ("evaluation", {"links": {}, "notes": [LONG], "caveats": [], "sections": [
          {"title": title, "head": head, "rows": rows} for title, head, rows in tables]}),
      "prompts": ("evaluation_prompts", {"title": "t", "total": 1, "rounds": [1, 2], "prompts": [
          [line, line | {"round": 2, "thoughts": [LONG]}]], "seed": lambda *_: 2**32}),
      "measured": ("mini_report", {"tables": tables, "notes": [LONG], "plots": {"p": png}, "test": {
          "prompts": 1, "seen": 1, "unseen": 0}, "examples": [
              {"kind": "k", "tasks": ["t"], "seed": 1, "prompt": "p", "turns": [
                  {"thought": PLAN, "image": png, "faults": ["f" * 90]}] * 2}]}),
      "data": ("data_check", {"title": "d/" * 90, "unit": "bytes", "rows": 1, "usable": 0,
                              "overview": [("m" * 30, 1, 0, 1, LONG)], "modes": [{
                                  "name": "m", "histogram": None, "complete": True, "offenders": [
                                      ("f" * 60, 1, "r" * 30, "w" * 200)], "samples": []}]})}
  for name, (template, values) in made.items():
    (folder / f"{name}.html").write_text(pages.render(template, **values), encoding="utf-8")
  return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.html")}


def test_no_page_is_wider_than_its_window_and_rounds_are_side_by_side(tab, tmp_path):
  folded = "document.querySelectorAll('details').forEach(e => e.open = true)"
  for name, path in draw(tmp_path).items():
    for width in WIDTHS:
      tab.open(path, width)
      for _ in ("folded", "open"):
        wide = tab.value("document.documentElement.scrollWidth")
        assert wide <= width, (name, width, wide)
        tab.value(folded)
      tops = tab.value("[...document.querySelectorAll('.rounds .drawn img')].map("
                       "e => e.getBoundingClientRect().top)")
      assert not tops or (len(set(tops)) == 1) == (width > 600), (name, width, tops)
  tab.open(tmp_path / "measured.html", 1280)
  assert tab.value("[...document.querySelectorAll('.scroll')].every("
                   "e => e.scrollWidth == e.clientWidth)")
