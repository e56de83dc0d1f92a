"""Text report of estimates: one table per slice, then collectives and bounds of each program."""

from collections import Counter

from irg_jax.chips import GIB, Slice
from irg_jax.plan import Estimate
from irg_jax.reports.pages import table

_HINTS = {
    "train": ("give it more chips; more of the mesh to `sequence` (--mesh fsdp=64,sequence=4); "
              "fewer rows a chip (--config.data.rows); --config.model.remat=full; "
              "smaller buffers (--config.{stage}.sizes)"),
    "generate": ("give it more chips; fewer prompts (--batch); a smaller cache (--cache) or "
                 "image (--size); more of the mesh to `tensor` (--mesh fsdp=4,tensor=2)"),
}


def report(estimates: list[Estimate], slice_: Slice, headroom: float) -> str:
  """The report of programs on one slice; `headroom` is the share of memory to stay free."""
  chip = slice_.chip
  head = ["program", "arguments", "temporaries", f"peak of {chip.hbm_gib:g} GiB", "free", "FLOPs",
          "needed", "compute", "HBM", "ICI", "at least"]
  return "\n\n".join([
      f"{slice_.name}: {slice_.chips} chips of {chip.hbm_gib:g} GiB, {chip.tflops:g} TFLOP/s, "
      f"HBM {chip.hbm_gbs:g} GB/s, links {chip.link_gbs:g} GB/s each way",
      table(head, [_row(e, slice_) for e in estimates], numbers=True, padded=True),
      "Memory in GiB, FLOPs and seconds for one chip. FLOPs: matrix products of the program, loops "
      "counted\nas often as they run; needed: the share of them that the mathematics asks for.",
      *("\n".join(_details(e)) for e in estimates),
      *(_excess(e, slice_, headroom) for e in estimates if e.headroom(slice_) < headroom)])


def _row(e, slice_):
  name, peak, free = e.program.name, f"{e.peak / GIB:.2f}", f"{e.headroom(slice_):.0%}"
  if not e.seconds:
    return [name, "?", "?", peak, free, *["?"] * 6]
  needed = "" if e.needed_flops is None else f"{e.needed_flops / max(e.flops, 1):.0%}"
  return [name, f"{e.arguments / GIB:.2f}", f"{e.temporaries / GIB:.2f}", peak, free,
          f"{e.flops:.3g}", needed, *(f"{x:.3g}" for x in e.seconds.values()),
          f"{max(e.seconds.values()):.3g} s"]


def _details(e):
  """Lines about the bounds and the collectives of a program."""
  mesh = ", ".join(f"{axis}={n}" for axis, n in e.program.mesh.shape.items() if n > 1)
  yield f"{e.program.name} ({e.program.unit}; mesh {mesh or 'one device'})"
  if not e.seconds:
    yield "  not compiled to the end: it does not fit"
    return
  bound = max(e.seconds, key=e.seconds.get)
  yield (f"  bound by {bound}: {e.seconds[bound]:.3g} s if everything overlaps, "
         f"{sum(e.seconds.values()):.3g} s if nothing does")
  sent, calls = Counter(), Counter()
  for (kind, group), size in ((key[1:], n) for key, n in e.traffic.items() if key[0] == "sent"):
    sent[kind, len(group)] += size
    calls[kind, len(group)] += e.traffic["calls", kind, group]
  for (kind, chips), size in sent.most_common():
    yield (f"  {kind:<18} among {chips:>3} chips {calls[kind, chips]:>8} times "
           f"{size / 1e9:>10.3f} GB sent")
  if not sent:
    yield "  no collectives"
  if e.unbounded:
    yield f"  loops of unknown length ({e.unbounded}) are counted as one turn each"


def _excess(e, slice_, headroom) -> str:
  """How much memory a program lacks, and what to try."""
  name, chip = e.program.name, slice_.chip
  hint = _HINTS["train" if name.startswith("train") else "generate"]
  missing = (headroom - e.headroom(slice_)) * chip.hbm_gib
  kept = f" with {headroom:.0%} to spare" if headroom else ""
  least = "" if e.seconds else "at least "  # the compiler stops at the first excess
  return (f"DOES NOT FIT: {name} needs {least}{e.peak / GIB:.2f} GiB of the {chip.hbm_gib:g} GiB "
          f"of a {chip.name} chip, {missing:.2f} GiB too many{kept}.\n"
          f"Try: {hint.format(stage=name.split()[-1])}")
