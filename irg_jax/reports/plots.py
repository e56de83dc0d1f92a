"""Plots for reports, drawn with matplotlib."""

import io

from matplotlib.figure import Figure
from matplotlib.patches import Patch

COLORS = ("#b9b2a3", "#dca274", "#2f6690")
_INK, _SOFT, _LINE = "#23211d", "#6d685f", "#e2ded4"


def bar_chart(title: str, groups: list[str], series: list[tuple[str, list]]) -> bytes:
  """Grouped bars with error bars of values from 0 to 1, as PNG.

  Args:
    groups: a label for each group.
    series: (name, a value for each group), at most as many as `COLORS`; a value is
      {"value", "low", "high"}, or None for no bar.
  """
  figure = Figure(figsize=(9, 3.8), dpi=200, layout="constrained")
  axes, colors, width = figure.subplots(), COLORS[-len(series):], min(0.8 / len(series), 0.3)
  for i, (_, values) in enumerate(series):
    shift = (i + 0.5 - len(series) / 2) * width
    places = [at + shift for at, v in enumerate(values) if v]
    found = [v for v in values if v]
    # A mean may lie outside its bootstrap interval by rounding.
    errors = [[max(0, v["value"] - v["low"]) for v in found],
              [max(0, v["high"] - v["value"]) for v in found]]
    bars = axes.bar(places, [v["value"] for v in found], 0.9 * width, color=colors[i],
                    yerr=errors, error_kw={"ecolor": _INK, "capsize": 2, "linewidth": 0.8})
    labels = [f"{v['value']:.2f}".lstrip("0") if v["value"] < 1 else "1" for v in found]
    axes.bar_label(bars, labels, padding=1, fontsize=7, color=_SOFT)
  axes.set(ylim=(0, 1.1), xlim=(-0.6, len(groups) - 0.4))
  axes.set_xticks(range(len(groups)), groups)
  axes.tick_params(length=0, labelcolor=_SOFT, labelsize=8)
  axes.grid(axis="y", color=_LINE)
  axes.set_axisbelow(True)
  axes.spines[:].set_visible(False)
  axes.set_title(title, loc="left", color=_INK, fontsize=11, pad=26)
  axes.legend([Patch(color=color) for color in colors], [name for name, _ in series],
              loc="lower left", bbox_to_anchor=(-0.01, 1), ncols=len(series), frameon=False,
              fontsize=8, handlelength=1, handleheight=1)
  file = io.BytesIO()
  figure.savefig(file, format="png")
  return file.getvalue()
