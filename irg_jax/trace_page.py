"""The pages that `irg_jax.trace` writes: HTML without scripts, nothing fetched from outside."""

import base64
import html
import re
import urllib.parse

_LONG_THOUGHT = 3000  # characters

_CSS = """
:root { color-scheme: light dark; --paper: #fbfaf7; --ink: #23211d; --soft: #6d685f;
  --line: #e2ded4; --card: #f3f0e9; --accent: #9a5b2c; }
@media (prefers-color-scheme: dark) { :root { --paper: #17171a; --ink: #e6e3dc; --soft: #98948b;
  --line: #313136; --card: #202024; --accent: #dca274; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); text-rendering: optimizeLegibility;
  font: 17px/1.65 Charter, "Bitstream Charter", "Iowan Old Style", Georgia, serif; }
main { max-width: 46rem; margin: 0 auto; padding: 4.5rem 1.5rem 5rem; }
h1, h2, p, figure, table { margin: 0; }
h1 { font-weight: 500; font-size: clamp(1.45rem, 4.2vw, 2.05rem); line-height: 1.3;
  letter-spacing: -.01em; text-wrap: pretty; white-space: pre-wrap; overflow-wrap: anywhere; }
h1.long { font-size: 1.15rem; line-height: 1.55; letter-spacing: 0; }
h2, .label, .meta, .note, figcaption, details, .aside { letter-spacing: .01em;
  font: 13.5px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h2, .label { font-weight: 600; color: var(--accent); }
.label { margin-bottom: .7rem; }
.meta { margin-top: 1rem; color: var(--soft); }
.note { margin-top: 1.4rem; padding: .65rem .9rem; background: var(--card); border-radius: 6px; }
.steps { list-style: none; margin: 3rem 0 0; padding: 0 0 0 1.75rem;
  border-left: 1px solid var(--line); }
.steps > li { position: relative; margin-bottom: 3rem; }
.steps > li:last-child { margin-bottom: 0; }
.steps > li::before { content: ""; position: absolute; left: -1.75rem; top: .35rem; width: 9px;
  height: 9px; margin-left: -5px; border-radius: 50%; background: var(--paper);
  border: 1.5px solid var(--accent); }
.steps > li.final::before { background: var(--accent); }
.thought { margin-top: .6rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.thought b { font-weight: 600; }
.thought.long { max-height: 36rem; overflow: auto; padding-right: .8rem; background:
  linear-gradient(var(--paper), var(--paper)) bottom / 100% 3rem no-repeat local,
  linear-gradient(#0000, var(--line)) bottom / 100% 1.5rem no-repeat scroll; }
.thought:focus-visible { outline: 2px solid var(--accent); outline-offset: 6px; }
.tag { font: 12px/1 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--soft);
  background: var(--card); border-radius: 4px; padding: .2em .45em; }
.aside { margin-top: .5rem; color: var(--soft); }
figure { margin-top: .8rem; }
img { display: block; width: 100%; height: auto; border-radius: 4px; background: var(--card); }
img.tiny { image-rendering: pixelated; }
figcaption { margin-top: .55rem; color: var(--soft); }
.final img { box-shadow: 0 1px 2px #0002, 0 14px 40px #0003; }
details { margin-top: 4rem; border-top: 1px solid var(--line); padding-top: 1rem;
  color: var(--soft); }
summary { cursor: pointer; width: max-content; }
details .label { margin: 1.5rem 0 .3rem; color: var(--ink); }
.system { white-space: pre-wrap; overflow-wrap: anywhere; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; font-weight: 400; padding: .2rem 1.4rem .2rem 0;
  overflow-wrap: anywhere; }
td { color: var(--ink); }
.scroll { overflow-x: auto; }
.scroll :is(th, td) { white-space: nowrap; }
thead th { border-bottom: 1px solid var(--line); }
td.n, th.n { text-align: right; }
.grid { display: grid; gap: 2.5rem 2rem; margin-top: 2.5rem; padding: 0; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 15rem), 1fr)); }
main.wide { max-width: 70rem; }
.grid a { color: inherit; text-decoration: none; display: block; }
.grid img, .grid .blank { aspect-ratio: 1; object-fit: contain; background: var(--card);
  border-radius: 4px; }
.grid a:hover .prompt { color: var(--accent); }
.grid .prompt { margin-top: .8rem; line-height: 1.45; overflow: hidden; display: -webkit-box;
  -webkit-box-orient: vertical; -webkit-line-clamp: 4; overflow-wrap: anywhere; }
.grid .aside { margin-top: .25rem; }
@media (max-width: 36rem) { body { font-size: 16px; } main { padding: 2.5rem 1.1rem 3rem; }
  .steps { padding-left: 1.1rem; margin-top: 2.2rem; }
  .steps > li { margin-bottom: 2.3rem; } .steps > li::before { left: -1.1rem; } }
@media print { .thought.long { max-height: none; } }
"""


def trace_html(trace: dict, pngs: list[bytes | None]) -> str:
  """The page of one trace; `pngs` are the rounds' encoded pictures (see irg_jax.trace)."""
  last = max((i for i, png in enumerate(pngs) if png), default=None)
  steps = []
  for i, (entry, png) in enumerate(zip(trace["rounds"], pngs)):
    if entry.get("think") is not None:
      steps.append(_thought(entry, first=i == 0))
    if png:
      steps.append(_picture(entry["picture"], png, i + 1, i == last, trace["prompt"]))
  note = f'<p class="note">{_escape(trace["note"])}</p>' if trace.get("note") else ""
  prompt = _escape(trace["prompt"])
  size = ' class="long"' if len(prompt) > 200 else ""
  body = (
      f'<main><header><p class="label">Prompt</p><h1{size} dir="auto">{prompt}</h1>'
      f'<p class="meta">{_escape(_summary(trace, pngs))}</p>{note}</header>'
      f'<ol class="steps">{"".join(steps)}</ol>{_details(trace)}</main>'
  )
  return _page(trace["prompt"], body)


def index_html(entries: list[dict]) -> str:
  """The page that lists traces; `entries` as `irg_jax.trace.write_trace` returns them."""
  body = (
      f'<main class="wide"><h1>{len(entries)} prompt{"s" * (len(entries) != 1)}</h1>'
      f'<ul class="grid">{"".join(map(_card, entries))}</ul></main>'
  )
  return _page("Pictures", body)


def _page(title, body):
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f"<title>{_escape(_short(title))}</title><style>{_CSS}</style></head>\n"
      f"<body>{body}</body></html>\n"
  )


def _thought(entry, first):
  title = "Plan" if first else "Reflection"
  text = entry["think"].strip("\n")
  # Long ones scroll in a box, which the keyboard must be able to reach.
  is_long = len(text) > _LONG_THOUGHT or text.count("\n") > _LONG_THOUGHT / 60
  box = f' long" tabindex="0" role="region" aria-label="{title}"' if is_long else '"'
  words = f'<div class="thought{box} dir="auto">{_marked_up(text)}</div>'
  if not text:
    words = '<p class="aside">The thought ended at once.</p>'
  limit = '<p class="aside">Cut off at the length limit.</p>' if entry.get("hit_limit") else ""
  if entry.get("tokens_cut"):
    limit += (f'<p class="aside">Read back without its last {int(entry["tokens_cut"])} tokens: '
              'tokenized again, it was longer than the limit.</p>')
  return f"<li><h2>{title}</h2>{words}{limit}</li>"


def _picture(picture, png, number, final, prompt):
  height, width = picture.shape[:2]
  title = "Final picture" if final else f"Picture {number}"
  if final and number == 1:
    title = "Picture"
  # Wide enough to look at, never taller than the window; small ones at most four-fold.
  limit = min(46 if final else 26, 4 * width / 16)
  style = f"max-width:min({limit:g}rem,{80 * width / height:.4g}vh)"
  tiny = ' class="tiny"' if width < 256 else ""
  alt = _escape(f"{title}, drawn for: {_short(prompt, 300)}")
  data = base64.b64encode(png).decode("ascii")
  return (
      f'<li{" class=final" * final}><h2>{title}</h2><figure><img{tiny} width="{width}" '
      f'height="{height}" style="{style}" alt="{alt}" src="data:image/png;base64,{data}">'
      f"</figure></li>"
  )


def _summary(trace, pngs):
  parts = [f"seed {trace['seed']}"] if trace.get("seed") is not None else []
  shapes = [e["picture"].shape for e, png in zip(trace["rounds"], pngs) if png]
  if shapes:
    parts.append(f"{shapes[-1][1]} × {shapes[-1][0]}")
  rounds = len(trace["rounds"])
  parts.append(f"{rounds} round{'s' * (rounds != 1)}")
  total = sum(sum((e.get("seconds") or {}).values()) for e in trace["rounds"])
  if total:
    parts.append(f"{total:.1f} s")
  return " · ".join(parts)


def _details(trace):
  run = {"checkpoint": trace.get("checkpoint"), "seed": trace.get("seed")}
  parts = [_timings(trace["rounds"]), _table("Run", run),
           _table("Settings", trace.get("settings")), _table("Versions", trace.get("versions"))]
  if trace.get("system_prompt"):
    parts.insert(0, '<p class="label">System prompt</p>'
                    f'<div class="system" dir="auto">{_escape(trace["system_prompt"])}</div>')
  return f'<details><summary>How it was made</summary>{"".join(parts)}</details>'


def _timings(rounds):
  """Seconds by round and phase, with the length of each thought."""
  phases = list(dict.fromkeys(name for entry in rounds for name in entry.get("seconds") or {}))
  if not phases:
    return ""
  head = "".join(f'<th class="n">{_escape(h)}</th>' for h in [*phases, "thought, tokens"])
  rows = ""
  for number, entry in enumerate(rounds, 1):
    seconds = entry.get("seconds") or {}
    cells = [f"{seconds[p]:.2f}" if p in seconds else "" for p in phases]
    cells.append("" if entry.get("think") is None else str(entry.get("think_tokens", "")))
    rows += f"<tr><th>Round {number}</th>"
    rows += "".join(f'<td class="n">{c}</td>' for c in cells) + "</tr>"
  return (f'<p class="label">Seconds</p><div class="scroll"><table><thead><tr><th></th>{head}'
          f"</tr></thead><tbody>{rows}</tbody></table></div>")


def _table(title, values):
  rows = "".join(f"<tr><th>{_escape(name)}</th><td>{_escape(value)}</td></tr>"
                 for name, value in _flat(values or {}))
  return f'<p class="label">{title}</p><table><tbody>{rows}</tbody></table>' if rows else ""


def _flat(values, prefix=""):
  """(dotted name, value) of every leaf that is not None."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f"{prefix}{name}.")
    elif value is not None:
      yield prefix + str(name), value


def _card(entry):
  folder = urllib.parse.quote(entry["folder"])
  image = '<div class="blank"></div>'
  if entry.get("picture"):
    alt = _escape(f"Picture drawn for: {_short(entry['prompt'], 300)}")
    image = f'<img loading="lazy" alt="{alt}" src="{folder}/{entry["picture"]}">'
  rounds = entry.get("rounds", 0)
  facts = f"{rounds} round{'s' * (rounds != 1)}"
  if entry.get("seed") is not None:
    facts += f" · seed {entry['seed']}"
  return (f'<li><a href="{folder}/trace.html">{image}'
          f'<p class="prompt" dir="auto">{_escape(entry["prompt"])}</p>'
          f'<p class="aside">{_escape(facts)}</p></a></li>')


def _marked_up(text):
  """Escaped text, every character kept: <think> tags set apart, headings in bold."""
  text = re.sub(r"&lt;/?think&gt;", r'<span class="tag">\g<0></span>', _escape(text))
  return re.sub(r"^#{1,6} .*$", r"<b>\g<0></b>", text, flags=re.MULTILINE)


def _escape(value):
  return html.escape(str(value), quote=True)


def _short(text, length=80):
  text = " ".join(text.split())
  return text if len(text) <= length else text[: length - 1] + "…"
