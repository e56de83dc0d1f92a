"""The look of the pages that this project writes: HTML without scripts, self-contained."""

import html

import jinja2
import markupsafe

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


def page(title: str, body: str, css: str = "") -> str:
  """A whole HTML document; `body` is markup, `css` is added to the common style."""
  return (
      '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
      '<meta name="viewport" content="width=device-width, initial-scale=1">'
      f"<title>{escape(short(title))}</title><style>{_CSS}{css}</style></head>\n"
      f"<body>{body}</body></html>\n"
  )


def escape(value) -> str:
  """Any value as text of a page or of an attribute."""
  return html.escape(str(value), quote=True)


def short(text: str, length: int = 80) -> str:
  """The text on one line, cut to `length` characters."""
  text = " ".join(text.split())
  return text if len(text) <= length else text[: length - 1] + "…"


def render(template: str, **values) -> str:
  """Renders templates/TEMPLATE.html, with values escaped; or a template with another suffix."""
  name = template if "." in template else f"{template}.html"
  return _TEMPLATES.get_template(name).render(values)


_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("irg_jax.reports"), autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True, lstrip_blocks=True)
_TEMPLATES.filters["short"] = short
_TEMPLATES.globals["style"] = markupsafe.Markup(_CSS)
