"""Estimates as text: a table a slice, then what each program sends and what bounds it."""

import collections

from irg_jax.plan.plan import Estimate
from irg_jax.plan.topology import GIB, Slice

_HINTS = {
    "train": ("give it more chips; more of the mesh to `sequence` (--mesh fsdp=64,sequence=4); "
              "fewer rows a chip (--config.data.rows); --config.model.remat=full; "
              "smaller buffers (--config.{stage}.sizes)"),
    "generate": ("give it more chips; fewer prompts (--batch); a smaller cache (--cache) or "
                 "picture (--size); more of the mesh to `tensor` (--mesh fsdp=4,tensor=2)"),
}


def report(estimates: list[Estimate], slice_: Slice, headroom: float) -> str:
  """The whole report of programs for one slice.

  Args:
    headroom: share of the memory that must stay free.
  """
  lines = [_title(slice_), ""]
  lines += table(
      ["program", "arguments", "temporaries", f"peak of {slice_.chip.hbm_gib:g} GiB", "free",
       "FLOPs", "needed", "compute", "HBM", "ICI", "at least"],
      [_row(e, slice_) for e in estimates])
  lines += ["", "Memory in GiB, FLOPs and seconds for one chip. FLOPs: matrix products of the "
            "compiled program, loops", "counted as often as they run; needed: the share of them "
            "that the mathematics asks for."]
  for e in estimates:
    lines += ["", *_details(e)]
  for e in estimates:
    if (free := e.headroom(slice_)) < headroom:
      lines += ["", does_not_fit(e, slice_, free, headroom)]
  return "\n".join(lines)


def table(head, rows) -> list[str]:
  """A Markdown table whose columns line up."""
  widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
  line = lambda cells: "| " + " | ".join(
      [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]) + " |"
  rule = ["-" * widths[0], *["-" * (w - 1) + ":" for w in widths[1:]]]
  return [line(head), line(rule), *map(line, rows)]


def does_not_fit(e: Estimate, slice_: Slice, free: float, headroom: float) -> str:
  """One program that does not fit, by how much, and what to try."""
  name, gib = e.program.name, e.memory.peak / GIB
  kind = "train" if name.startswith("train") else "generate"
  hint = _HINTS[kind].format(stage=name.split()[-1])
  missing = (headroom - free) * slice_.chip.hbm_gib
  kept = f" with {headroom:.0%} to spare" if headroom else ""
  least = "" if e.cost else "at least "  # the compiler stops at what it minds first
  return (f"DOES NOT FIT: {name} needs {least}{gib:.2f} GiB of the {slice_.chip.hbm_gib:g} GiB of "
          f"a {slice_.chip.name} chip, {missing:.2f} GiB too many{kept}.\nTry: {hint}")


def _title(slice_):
  chip = slice_.chip
  return (f"{slice_.name}: {slice_.chips} chips of {chip.hbm_gib:g} GiB, {chip.tflops:g} TFLOP/s, "
          f"HBM {chip.hbm_gbs:g} GB/s, links {chip.link_gbs:g} GB/s each way")


def _row(e, slice_):
  free = f"{e.headroom(slice_):.0%}"
  gib = lambda x: f"{x / GIB:.2f}"
  if e.cost is None:
    return [e.program.name, "?", "?", gib(e.memory.peak), free, *["?"] * 6]
  m, s = e.memory, e.seconds
  needed = "" if e.needed_flops is None else f"{e.needed_flops / max(e.cost.flops, 1):.0%}"
  return [e.program.name, gib(m.arguments), gib(m.temporaries), gib(m.peak), free,
          f"{e.cost.flops:.3g}", needed, *(f"{s[k]:.3g}" for k in ("compute", "HBM", "ICI")),
          f"{s[e.bound]:.3g} s"]


def _details(e):
  p = e.program
  mesh = ", ".join(f"{axis}={n}" for axis, n in p.mesh.shape.items() if n > 1) or "one device"
  lines = [f"{p.name} ({p.unit}; mesh {mesh})"]
  if e.cost is None:
    return lines + ["  not compiled to the end: it does not fit"]
  total, slowest = sum(e.seconds.values()), e.seconds[e.bound]
  lines.append(f"  bound by {e.bound}: {slowest:.3g} s if everything overlaps, {total:.3g} s if "
               "nothing does")
  sent, calls = collections.Counter(), collections.Counter()
  for (kind, group), size in e.cost.wire.items():
    sent[kind, len(group)] += size
    calls[kind, len(group)] += e.cost.calls[kind, group]
  for (kind, devices), size in sent.most_common():
    lines.append(f"  {kind:<18} among {devices:>3} chips {calls[kind, devices]:>8} times "
                 f"{size / 1e9:>10.3f} GB sent")
  if not sent:
    lines.append("  no collectives")
  if e.cost.guessed:
    lines.append(f"  loops of unknown length ({e.cost.guessed}) are counted as one turn each")
  return lines
