"""Text report of estimates: one table per slice, then collectives and bounds of each program."""

import collections

from irg_jax.chips import GIB, Slice
from irg_jax.plan import Estimate
from irg_jax.reports.tables import table

_HEAD = ["FLOPs", "needed", "compute", "HBM", "ICI", "at least"]
_HINTS = {
    "train": ("give it more chips; more of the mesh to `sequence` (--mesh fsdp=64,sequence=4); "
              "fewer rows a chip (--config.data.rows); --config.model.remat=full; "
              "smaller buffers (--config.{stage}.sizes)"),
    "generate": ("give it more chips; fewer prompts (--batch); a smaller cache (--cache) or "
                 "image (--size); more of the mesh to `tensor` (--mesh fsdp=4,tensor=2)"),
}


def report(estimates: list[Estimate], slice_: Slice, headroom: float) -> str:
  """The report of programs on one slice; `headroom` is the share of memory to stay free."""
  head = ["program", "arguments", "temporaries", f"peak of {slice_.chip.hbm_gib:g} GiB", "free"]
  rows = [_row(e, slice_) for e in estimates]
  chip = slice_.chip
  parts = [
      f"{slice_.name}: {slice_.chips} chips of {chip.hbm_gib:g} GiB, {chip.tflops:g} TFLOP/s, "
      f"HBM {chip.hbm_gbs:g} GB/s, links {chip.link_gbs:g} GB/s each way",
      table(head + _HEAD, rows, numbers=True, padded=True),
      "Memory in GiB, FLOPs and seconds for one chip. FLOPs: matrix products of the program, loops "
      "counted\nas often as they run; needed: the share of them that the mathematics asks for."]
  parts += ["\n".join(_details(e)) for e in estimates]
  parts += [does_not_fit(e, slice_, headroom) for e in estimates if e.headroom(slice_) < headroom]
  return "\n\n".join(parts)


def does_not_fit(e: Estimate, slice_: Slice, headroom: float) -> str:
  """How much memory a program lacks, and what to try."""
  name, gib = e.program.name, e.peak / GIB
  kind = "train" if name.startswith("train") else "generate"
  missing = (headroom - e.headroom(slice_)) * slice_.chip.hbm_gib
  kept = f" with {headroom:.0%} to spare" if headroom else ""
  least = "" if e.seconds else "at least "  # the compiler stops at the first excess
  return (f"DOES NOT FIT: {name} needs {least}{gib:.2f} GiB of the {slice_.chip.hbm_gib:g} GiB of "
          f"a {slice_.chip.name} chip, {missing:.2f} GiB too many{kept}.\n"
          f"Try: {_HINTS[kind].format(stage=name.split()[-1])}")


def _row(e, slice_):
  gib = lambda x: f"{x / GIB:.2f}"
  name, peak, free = e.program.name, gib(e.peak), f"{e.headroom(slice_):.0%}"
  if not e.seconds:
    return [name, "?", "?", peak, free, *["?"] * 6]
  needed = "" if e.needed_flops is None else f"{e.needed_flops / max(e.flops, 1):.0%}"
  return [name, gib(e.arguments), gib(e.temporaries), peak, free, f"{e.flops:.3g}", needed,
          *(f"{x:.3g}" for x in e.seconds.values()), f"{e.seconds[e.bound]:.3g} s"]


def _details(e):
  mesh = ", ".join(f"{axis}={n}" for axis, n in e.program.mesh.shape.items() if n > 1)
  yield f"{e.program.name} ({e.program.unit}; mesh {mesh or 'one device'})"
  if not e.seconds:
    yield "  not compiled to the end: it does not fit"
    return
  yield (f"  bound by {e.bound}: {e.seconds[e.bound]:.3g} s if everything overlaps, "
         f"{sum(e.seconds.values()):.3g} s if nothing does")
  total = collections.Counter()
  for (what, kind, group), n in (item for item in e.traffic.items() if item[0] != "hbm"):
    total[what, kind, len(group)] += n
  for (what, kind, chips), size in total.most_common():
    if what == "sent":
      yield (f"  {kind:<18} among {chips:>3} chips {total['calls', kind, chips]:>8} times "
             f"{size / 1e9:>10.3f} GB sent")
  if not total:
    yield "  no collectives"
  if e.unbounded:
    yield f"  loops of unknown length ({e.unbounded}) are counted as one turn each"
