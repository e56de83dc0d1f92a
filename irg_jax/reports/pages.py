"""Pages from the templates in templates/ (self-contained HTML without scripts), Markdown tables."""

import base64
import io
import math
import re
import string

import jinja2
import markupsafe
from PIL import Image

from irg_jax import storage
from irg_jax.images import FORMATS

_LONGEST = 20_000  # characters of a text in a page


def render(template: str, **values) -> str:
  """Renders templates/TEMPLATE.html; or the file TEMPLATE, if the name has a suffix.

  Values are `shown`, and escaped in HTML. Filters beside jinja's: `short`, `data_uri`, `thought`,
  `drawn`, `small`.
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


def small(image) -> bool:
  """Whether an image, a file's content or path, is enlarged with its pixels as squares.

  False where it cannot be read.
  """
  try:
    data = image if isinstance(image, bytes) else storage.read_file(image)
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
      return opened.width < 256
  except Exception:  # decoders raise OSError, SyntaxError, EOFError, struct.error, ...
    return False


def thought(text: str) -> markupsafe.Markup:
  """A thought, `shown`, as markup: <think> tags set apart, headings in bold."""
  text = re.sub(r"&lt;/?think&gt;", r'<span class="tag">\g<0></span>',
                str(markupsafe.escape(shown(text))))
  return markupsafe.Markup(re.sub(r"^#{1,6} .*$", r"<b>\g<0></b>", text, flags=re.MULTILINE))


def drawn(text: str) -> markupsafe.Markup | None:
  """A thought as markup that draws each list of cells as a grid; None if it has no such list.

  A list of cells is "Cells: A red circle B empty ground C ...", up to a full stop, of 2 x 2 to
  5 x 5 cells in the order of the alphabet, the Latin one or small letters of the Greek one. A cell
  that ends with "empty ground" is left blank. The other sentences begin on lines of their own where
  they have a title: "Steps: keep the rest."
  """
  parts, end, text = [], 0, shown(text)
  for found in _CELLS.finditer(text):
    if cells := _read_cells(found[1]):
      parts += [_titled(text[end : found.start()]), markupsafe.Markup(
          render("cells", cells=cells, columns=math.isqrt(len(cells))))]
      end = found.end()
  return markupsafe.Markup("").join([*parts, _titled(text[end:])]) if parts else None


def _read_cells(text):
  """[(letter, content), ...] of a list of cells, or None."""
  _, *parts = re.split(r"(?:^| )([A-Yα-ω])(?= )", text)
  letters, cells = "".join(parts[::2]), [cell.strip() for cell in parts[1::2]]
  if len(cells) not in (4, 9, 16, 25) or not any(a.startswith(letters) for a in _ALPHABETS):
    return None
  if not all(0 < len(cell) <= 60 for cell in cells):
    return None
  return [(at, "" if cell.endswith("empty ground") else cell) for at, cell in zip(letters, cells)]


def _titled(text):
  """Sentences as markup, each that has a title on a line of its own, without <think> tags."""
  text = re.sub(r"</?think>", "", text).strip()
  text = str(markupsafe.escape(re.sub(r"(?<=[.\]]) (?=[A-Z][a-z ]{2,24}: )", "\n", text)))
  text = re.sub(r"^[A-Z][a-z ]{2,24}:", r"<b>\g<0></b>", text, flags=re.MULTILINE)
  return markupsafe.Markup(f"<p>{text}</p>" if text else "")


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
_CELLS = re.compile(r"\bCells: ([Aα] [^.:]*)\.")
_ALPHABETS = string.ascii_uppercase, "αβγδεζηθικλμνξοπρστυφχψω"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("irg_jax.reports"), autoescape=jinja2.select_autoescape(["html"]),
    trim_blocks=True, lstrip_blocks=True,
    finalize=lambda value: shown(value) if type(value) is str else visible(value))
_TEMPLATES.filters |= {"short": short, "data_uri": data_uri, "thought": thought, "drawn": drawn,
                       "small": small}
