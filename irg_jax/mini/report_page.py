"""The page of the mini world's report: one file with tables, plots and real traces."""

import base64

import numpy as np

from irg_jax.reports import pages
from irg_jax.mini import benchmark, report_tables
from irg_jax.reports.pages import escape

# (title, right before, right after, how many are shown)
KINDS = (("wrong, then right", False, True, 4), ("right both times", True, True, 2),
         ("right, then wrong", True, False, 3), ("wrong both times", False, False, 3))
RULE = ("Of each kind the first in the order of the test, one a task and split in turn; nothing is "
        "picked by hand.")
_CSS = """
h2.part { margin-top: 3rem; } .scroll { margin-top: .8rem; } main.wide p { margin-top: .6rem; }
.plot { margin-top: 1.5rem; } .plot img { max-width: 56rem; background: #fff; }
article { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1.2rem; }
.turn { display: grid; grid-template-columns: 9rem 1fr; gap: 1.4rem; margin-top: 1rem; }
.turn img { width: 9rem; image-rendering: pixelated; } .said { overflow-wrap: anywhere;
  font: 13.5px/1.5 system-ui, sans-serif; } .said b { color: var(--accent); }
@media (max-width: 36rem) { .turn { grid-template-columns: 1fr; } }
"""


def choose(drawn) -> list[dict]:
  """The traces to show, by a fixed rule (`RULE`).

  Args:
    drawn: `figures.Drawn` of two rounds or more.

  Returns:
    [{"kind", "prompt", "tasks", "seed", "turns": [{"thought", "picture": PNG, "faults"}] * 2}]
  """
  if drawn.rounds < 2:
    return []
  right, chosen = drawn.right, []
  for kind, before, after, count in KINDS:
    fits = (right[0] == before) & (right[1] == after)
    groups = {}
    for i, image in np.argwhere(fits).tolist():
      extra = drawn.items[i].extra
      groups.setdefault((extra["tag"], extra["split"]), []).append((i, image))
    in_turn = sorted((place, i, image) for group in groups.values()
                     for place, (i, image) in enumerate(group))
    chosen += [_example(drawn, kind, i, image) for _, i, image in in_turn[:count]]
  return chosen


def _example(drawn, kind, i, image):
  trace, turns = drawn.traces[i, image], []
  for number in (1, 2):
    line = drawn.lines[i, image, number]
    turns.append({"thought": trace["rounds"][number - 1]["think"],
                  "picture": (drawn.folder / line["file"]).read_bytes(),
                  "faults": benchmark.faults(line["words"])})
  return {"kind": kind, "prompt": trace["prompt"], "seed": trace["seed"],
          "tasks": drawn.lines[i, image, 1]["tasks"], "turns": turns}


def page_html(report: dict, plots: dict[str, bytes], examples: list[dict]) -> str:
  """The page.

  Args:
    report: from `report.build`.
    plots: PNG by file name.
    examples: from `choose`.
  """
  test = report["test"]
  parts = ["<h1>The mini world, measured</h1>",
           f'<p class="meta">{test["prompts"]} prompts of the test, {test["seen"]} of combinations '
           f'that training shows and {test["unseen"]} of those that it never does.</p>',
           *(f'<figure class="plot"><img alt="{escape(name)}" src="{_data(content)}"></figure>'
             for name, content in plots.items())]
  for title, head, rows in report_tables.tables(report):
    parts += [_part(title), _table(head, rows)]
  texts = report_tables.notes(report)
  parts += [_part("Notes"), *(f'<p class="aside">{escape(text)}</p>' for text in texts)]
  if examples:
    parts += [_part("Traces, good and bad"), f'<p class="aside">{escape(RULE)}</p>',
              *map(_article, examples)]
  return pages.page("The mini world, measured", f'<main class="wide">{"".join(parts)}</main>', _CSS)


def _article(example):
  head = f"{example['kind']} · {', '.join(example['tasks'])} · seed {example['seed']}"
  turns = "".join(_turn(number, turn) for number, turn in enumerate(example["turns"], 1))
  return (f'<article><p class="label">{escape(head)}</p><p>{escape(example["prompt"])}</p>{turns}'
          "</article>")


def _turn(number, turn):
  verdict = ", ".join(turn["faults"]) or "nothing falls short"
  return (f'<div class="turn"><figure><img class="tiny" alt="picture {number}" '
          f'src="{_data(turn["picture"])}"><figcaption>round {number}, the verifier: '
          f'{escape(verdict)}</figcaption></figure>'
          f'<p class="said">{_thought(turn["thought"])}</p></div>')


def _thought(text):
  """A thought as markup, with what it says falls short in bold."""
  before, mark, after = (text or "no thought").partition("What falls short:")
  fault, dot, rest = after.partition(".")
  bold = f"<b>{escape(mark + fault + dot)}</b>" if mark else ""
  return escape(before) + bold + escape(rest)


def _table(head, rows):
  top = "".join(f'<th{" class=n" if i else ""}>{escape(h)}</th>' for i, h in enumerate(head))
  body = "".join(f"<tr><th>{escape(first)}</th>"
                 + "".join(f'<td class="n">{escape(cell)}</td>' for cell in rest) + "</tr>"
                 for first, *rest in rows)
  return (f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>'
          "</div>")


def _part(title):
  return f'<h2 class="part">{escape(title)}</h2>'


def _data(png):
  return "data:image/png;base64," + base64.b64encode(png).decode()
