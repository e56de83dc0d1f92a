"""Pages from the templates in templates/ (self-contained HTML without scripts), Markdown tables."""

import base64
import re

import jinja2
import markupsafe

_LONGEST = 20_000  # characters of a text in a page


def render(template: str, **values) -> str:
  """Renders templates/TEMPLATE.html; or the file TEMPLATE, if the name has a suffix.

  Values are `shown`, and escaped in HTML. Beside jinja's filters there are `short`, `data_uri` and
  `thought`.
  """
  name = template if "." in template else f"{template}.html"
  return _TEMPLATES.get_template(name).render(values)


def table(head, rows, numbers: bool = False, padded: bool = False) -> str:
  """A Markdown table: a row of column names, then rows of as many cells, all text.

  Args:
    numbers: aligns all columns but the first to the right.
    padded: pads the cells of a column to one width, for a terminal.
  """
  lines = [head, ["---", *["---:" if numbers else "---"] * (len(head) - 1)], *rows]
  if padded:
    first, *widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [[name.ljust(first), *map(str.rjust, cells, widths)] for name, *cells in lines]
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def flat(values: dict, prefix: str = ""):
  """Yields (dotted name, value) of every leaf of nested dicts that is not None."""
  for name, value in values.items():
    if isinstance(value, dict):
      yield from flat(value, f"{prefix}{name}.")
    elif value is not None:
      yield prefix + str(name), value


def shown(text: str) -> str:
  """The text as `visible`, and not too long."""
  if (more := len(text) - _LONGEST) > 0:
    text = f"{text[:_LONGEST]}… ({more} more characters)"
  return visible(text)


def short(text: str, length: int = 80) -> str:
  """The text on one line, `shown`, cut to `length` characters."""
  text = " ".join(str(text)[: 100 * length].split())
  return shown(text if len(text) <= length else text[: length - 1] + "…")


def data_uri(image: bytes, kind: str = "png") -> markupsafe.Markup:
  """The `src` of an image that the page itself holds; `kind` is its format."""
  return markupsafe.Markup(f"data:image/{kind};base64,{base64.b64encode(image).decode()}")


def thought(text: str) -> markupsafe.Markup:
  """A thought, `shown`, as markup: <think> tags set apart, headings in bold."""
  text = re.sub(r"&lt;/?think&gt;", r'<span class="tag">\g<0></span>',
                str(markupsafe.escape(shown(text))))
  return markupsafe.Markup(re.sub(r"^#{1,6} .*$", r"<b>\g<0></b>", text, flags=re.MULTILINE))


def visible(value):
  """A value whose control and bidirectional characters, if it is text, are shown by their code.

  So no text of a page moves, hides or turns what stands around it. Tabs and ends of lines stay.
  """
  if not isinstance(value, str) or not _UNSEEN.search(value):
    return value
  return type(value)(_UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", value))


# C0, C1, marks, embeddings, overrides and isolates of direction, separators of lines, tags.
_UNSEEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e"
                     r"\u2066-\u2069\ufeff\U000e0000-\U000e007f]|\r(?!\n)")
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("irg_jax.reports"), autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True, lstrip_blocks=True,
    finalize=lambda value: shown(value) if type(value) is str else visible(value))
_TEMPLATES.filters |= {"short": short, "data_uri": data_uri, "thought": thought}
