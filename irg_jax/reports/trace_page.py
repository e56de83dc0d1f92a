"""The pages that `irg_jax.reports.trace` writes: HTML without scripts, nothing fetched from outside."""

import base64
import re
import urllib.parse

from irg_jax.reports.pages import escape, page, short

_LONG_THOUGHT = 3000  # characters


def trace_html(trace: dict, pngs: list[bytes | None], source: bytes | None = None) -> str:
  """The page of one trace; images are encoded: the rounds' and the one that was edited."""
  last = max((i for i, png in enumerate(pngs) if png), default=None)
  steps = []
  if source:
    alt = "The image to edit"
    steps.append(f"<li><h2>Image to edit</h2>{_figure(trace['source'], source, 26, alt)}</li>")
  for i, (entry, png) in enumerate(zip(trace["rounds"], pngs)):
    if entry.get("think") is not None:
      steps.append(_thought(entry, first=i == 0))
    if png:
      steps.append(_image(entry["picture"], png, i + 1, i == last, trace["prompt"]))
  note = f'<p class="note">{escape(trace["note"])}</p>' if trace.get("note") else ""
  prompt = escape(trace["prompt"])
  size = ' class="long"' if len(prompt) > 200 else ""
  body = (
      f'<main><header><p class="label">Prompt</p><h1{size} dir="auto">{prompt}</h1>'
      f'<p class="meta">{escape(_summary(trace, pngs))}</p>{note}</header>'
      f'<ol class="steps">{"".join(steps)}</ol>{_details(trace)}</main>'
  )
  return page(trace["prompt"], body)


def index_html(entries: list[dict]) -> str:
  """The page that lists traces; `entries` as `irg_jax.reports.trace.write_trace` returns them."""
  body = (
      f'<main class="wide"><h1>{len(entries)} prompt{"s" * (len(entries) != 1)}</h1>'
      f'<ul class="grid">{"".join(map(_card, entries))}</ul></main>'
  )
  return page("Pictures", body)


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


def _image(image, png, number, final, prompt):
  title = "Final picture" if final else f"Picture {number}"
  if final and number == 1:
    title = "Picture"
  alt = f"{title}, drawn for: {short(prompt, 300)}"
  figure = _figure(image, png, 46 if final else 26, alt)
  return f'<li{" class=final" * final}><h2>{title}</h2>{figure}</li>'


def _figure(image, png, widest, alt):
  """`widest` in rem: to look at, never taller than the window; small ones at most four-fold."""
  height, width = image.shape[:2]
  limit = min(widest, 4 * width / 16)
  style = f"max-width:min({limit:g}rem,{80 * width / height:.4g}vh)"
  tiny = ' class="tiny"' if width < 256 else ""
  data = base64.b64encode(png).decode("ascii")
  return (
      f'<figure><img{tiny} width="{width}" height="{height}" style="{style}" '
      f'alt="{escape(alt)}" src="data:image/png;base64,{data}"></figure>'
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
                    f'<div class="system" dir="auto">{escape(trace["system_prompt"])}</div>')
  return f'<details><summary>How it was made</summary>{"".join(parts)}</details>'


def _timings(rounds):
  """Seconds by round and phase, with the length of each thought."""
  phases = list(dict.fromkeys(name for entry in rounds for name in entry.get("seconds") or {}))
  if not phases:
    return ""
  head = "".join(f'<th class="n">{escape(h)}</th>' for h in [*phases, "thought, tokens"])
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
  rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
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
    alt = escape(f"Picture drawn for: {short(entry['prompt'], 300)}")
    image = f'<img loading="lazy" alt="{alt}" src="{folder}/{entry["picture"]}">'
  rounds = entry.get("rounds", 0)
  facts = f"{rounds} round{'s' * (rounds != 1)}"
  if entry.get("seed") is not None:
    facts += f" · seed {entry['seed']}"
  return (f'<li><a href="{folder}/trace.html">{image}'
          f'<p class="prompt" dir="auto">{escape(entry["prompt"])}</p>'
          f'<p class="aside">{escape(facts)}</p></a></li>')


def _marked_up(text):
  """Escaped text, every character kept: <think> tags set apart, headings in bold."""
  text = re.sub(r"&lt;/?think&gt;", r'<span class="tag">\g<0></span>', escape(text))
  return re.sub(r"^#{1,6} .*$", r"<b>\g<0></b>", text, flags=re.MULTILINE)
