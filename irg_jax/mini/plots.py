"""Bar charts of scores from 0 to 1, drawn with Pillow."""

import io

from PIL import Image, ImageDraw, ImageFont

_INK, _SOFT, _LINE, _PAPER = "#23211d", "#6d685f", "#e2ded4", "#ffffff"
COLORS = ("#b9b2a3", "#dca274", "#2f6690")
_SCALE = 2  # pixels a unit of the layout below
_WIDTH, _HEIGHT = 900, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 76, 52


def bar_chart(title: str, groups: list[str], series: list[tuple[str, list]]) -> bytes:
  """A PNG with a group of bars side by side for each of `groups`.

  Args:
    groups: what stands below; "\\n" breaks the line.
    series: (name, a value a group); a value is {"value", "low", "high"}, or None for no bar.
  """
  image = Image.new("RGB", (_WIDTH * _SCALE, _HEIGHT * _SCALE), _PAPER)
  draw = ImageDraw.Draw(image)
  _text(draw, (_LEFT, 14), title, 15, _INK)
  _legend(draw, [name for name, _ in series])
  for tenth in range(0, 11, 2):
    y = _y(tenth / 10)
    _line(draw, (_LEFT, y, _WIDTH - _RIGHT, y), _LINE)
    _text(draw, (_LEFT - 8, y), f"{tenth / 10:.1f}", 11, _SOFT, "rm")
  step = (_WIDTH - _LEFT - _RIGHT) / max(1, len(groups))
  wide = min(0.8 * step / len(series), 46)
  for i, group in enumerate(groups):
    middle = _LEFT + (i + 0.5) * step
    for j, (_, values) in enumerate(series):
      if values[i] is not None:
        left = middle + (j - len(series) / 2) * wide
        _bar(draw, left, wide - 3, values[i], COLORS[j - len(series)])
    _text(draw, (middle, _HEIGHT - _BOTTOM + 8), group, 11, _INK, "ma")
  file = io.BytesIO()
  image.save(file, "PNG", optimize=True)
  return file.getvalue()


def _legend(draw, names):
  x = _LEFT
  for name, color in zip(names, COLORS[-len(names):]):
    draw.rectangle(_scaled((x, 44, x + 11, 55)), fill=color)
    _text(draw, (x + 17, 50), name, 12, _INK, "lm")
    x += 17 + draw.textlength(name, _font(12)) / _SCALE + 24


def _bar(draw, left, width, value, color):
  draw.rectangle(_scaled((left, _y(value["value"]), left + width, _y(0))), fill=color)
  middle = left + width / 2
  _line(draw, (middle, _y(value["low"]), middle, _y(value["high"])), _INK)
  for end in ("low", "high"):
    _line(draw, (middle - 3, _y(value[end]), middle + 3, _y(value[end])), _INK)
  label = f"{value['value']:.2f}".lstrip("0") if value["value"] < 1 else "1"
  _text(draw, (middle, _y(value["high"]) - 3), label, 10, _SOFT, "md")


def _y(value):
  return _HEIGHT - _BOTTOM - value * (_HEIGHT - _BOTTOM - _TOP)


def _scaled(place):
  return tuple(v * _SCALE for v in place)


def _line(draw, place, color):
  draw.line(_scaled(place), fill=color, width=_SCALE)


def _text(draw, place, text, size, color, anchor="lt"):
  if "\n" in text:  # anchors of several lines know only "a" and its like
    draw.multiline_text(_scaled(place), text, color, _font(size), anchor="ma", align="center")
  else:
    draw.text(_scaled(place), text, color, _font(size), anchor=anchor)


def _font(size):
  return ImageFont.load_default(size * _SCALE)
