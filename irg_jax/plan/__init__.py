"""Ahead-of-time compilation for a TPU slice or GPUs: memory, roofline estimate of time, report."""

import dataclasses
import re
from collections import Counter

import jax
from jax.experimental import topologies

from irg_jax import chips
from irg_jax.chips import GIB, Slice
from irg_jax.plan import gpus
from irg_jax.plan.cost import count_traffic, count_work
from irg_jax.plan.programs import Case, Program
from irg_jax.reports.pages import table

try:
  import libtpu
except ImportError:
  libtpu = None

# Products through Triton take minutes to compile and are not tuned without a GPU anyway.
_OPTIONS = {False: {}, True: {"xla_gpu_enable_triton_gemm": False}}
_HINTS = {
    "train": ("give it more chips; more of the mesh to `sequence` (--mesh fsdp=64,sequence=4); "
              "fewer rows a chip (--config.data.rows); --config.model.remat=full; "
              "smaller buffers (--config.{stage}.sizes)"),
    "rl": ("give it more chips; more parts (--config.accumulate); --config.model.remat=full; "
           "shorter thoughts or smaller images (--config.rollout.think_limit, .height, .width); "
           "adapters (--config.lora.rank=64)"),
    "generate": ("give it more chips; fewer prompts (--batch); a smaller cache (--cache) or "
                 "image (--size); more of the mesh to `tensor` (--mesh fsdp=4,tensor=2)"),
}


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Memory and time of a program on one chip; only `peak` of one that does not fit and compile.

  Attributes:
    peak: bytes of memory: arguments and temporaries, or the compiler's own peak if that is more.
    arguments: bytes of inputs and outputs; a donated input and its output count once.
    temporaries: bytes of everything else, with the program's code.
    case: of the program's cases, that of the figures below.
    work: FLOPs and bytes of kernels, see `cost.count_work`.
    traffic: bytes moved, see `cost.count_traffic`.
    seconds: lower bounds of the time by resource: "compute", "HBM", "ICI", and of several slices
      "DCN".
    utilisation: share of the peak if the program takes its largest bound and only needed FLOPs
      count; None if the case has no formula.
    others: the same for the other cases of the program.
  """

  program: Program
  peak: float
  arguments: float = 0.0
  temporaries: float = 0.0
  case: Case = Case()
  work: Counter = dataclasses.field(default_factory=Counter)
  traffic: Counter = dataclasses.field(default_factory=Counter)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  utilisation: float | None = None
  others: tuple["Estimate", ...] = ()

  def headroom(self, slice_: Slice) -> float:
    """Share of the chip's memory that stays free; negative if the program does not fit."""
    return 1 - self.peak / (slice_.chip.hbm_gib * GIB)


def open_slice(text: str, count: int = 1) -> Slice:
  """Slices such as "v5p:4x4x4", or a node such as "h100:8", with devices to compile for.

  Call `chips.prepare_to_compile` before JAX is imported.

  Raises:
    ValueError: as `chips.parse_slice`; the compiler is not installed or does not know the slice;
      several slices of chips whose network is not known.
  """
  parsed = dataclasses.replace(chips.parse_slice(text), count=count)
  if count > 1 and not parsed.chip.dcn_gbs:
    known = [chip.name for chip in chips.CHIPS.values() if chip.dcn_gbs]
    raise ValueError(f"--slices {count}: the speed of the network between slices is known of "
                     f"{', '.join(known)} alone")
  if parsed.chip.gpu:
    devices = gpus.devices(parsed.chip.name, parsed.chips)
    return dataclasses.replace(parsed, devices=devices,
                               places={d.id: (i,) for i, d in enumerate(devices)})
  if libtpu is None:
    raise ValueError("compiling for a TPU needs libtpu, which is not installed: "
                     "pip install 'irg_jax[tpu]' (no TPU is needed)")
  # Later chips than v4 join their two cores by themselves.
  options = {"chip_config_name": "megacore"} if parsed.chip.name == "v4" else {}
  options |= {"num_slices": count} if count > 1 else {}
  try:
    topology = topologies.get_topology_desc(platform="tpu", topology_name=parsed.name, **options)
  except Exception as e:  # libtpu's errors have no type of their own
    raise ValueError(f"topology {parsed.name}: libtpu cannot compile for it: "
                     f"{str(e).splitlines()[0]}") from e
  return dataclasses.replace(parsed, devices=tuple(topology.devices),
                             places={d.id: tuple(d.coords) for d in topology.devices})


def estimate(program: Program, slice_: Slice) -> Estimate:
  """Compiles a program for a slice and estimates its memory and time.

  Raises:
    ValueError: the program does not compile for another reason than memory.
  """
  try:
    with jax.set_mesh(program.mesh):
      traced = program.trace()
      compiled = traced.lower().compile(compiler_options=_OPTIONS[slice_.chip.gpu])
  except jax.errors.JaxRuntimeError as e:
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of |"
                     r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(e))
    if "RESOURCE_EXHAUSTED" not in str(e) or not used:
      raise ValueError(f"{program.name} does not compile: {str(e).strip()[:2000]}") from e
    number, unit = filter(None, used.groups())
    return Estimate(program, float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))
  memory = compiled.memory_analysis()
  arguments = (memory.argument_size_in_bytes + memory.output_size_in_bytes
               - memory.alias_size_in_bytes)
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  peak = max(arguments + temporaries, memory.peak_memory_in_bytes)
  whole = Estimate(program, peak, arguments, temporaries)
  # The text of a program for GPUs shows neither the turns of loops nor what a kernel reads from
  # its cache.
  traffic = Counter() if slice_.chip.gpu else count_traffic(compiled.as_text())
  first, *others = (_of_case(whole, case, traced.jaxpr, traffic, slice_) for case in program.cases)
  return dataclasses.replace(first, others=tuple(others))


def _of_case(e, case, jaxpr, traffic, slice_) -> Estimate:
  """The estimate with the times of one case."""
  work, chip = count_work(jaxpr, case.share), slice_.chip
  work = Counter({key: n if key == "unbounded" else n / slice_.chips for key, n in work.items()})
  devices, peak = list(e.program.mesh.devices.flat), chip.tflops * 1e12
  kernels = sum(n for key, n in work.items() if key[0] == "hbm")
  sent = [([devices[i] for i in key[2]], n) for key, n in traffic.items() if key[0] == "sent"]
  seconds = {"compute": work["flops"] / peak,
             "HBM": (traffic["hbm"] + kernels) / (chip.hbm_gbs * 1e9), "ICI": 0.0, "DCN": 0.0}
  for group, size in sent:
    seconds["DCN" if slice_.crosses(group) else "ICI"] += size / slice_.bandwidth(group)
  if slice_.count == 1:
    del seconds["DCN"]
  if chip.gpu:
    return dataclasses.replace(e, case=case, work=work, seconds={"compute": seconds["compute"]})
  used = case.needed_flops and case.needed_flops / slice_.chips / peak / max(seconds.values())
  return dataclasses.replace(e, case=case, work=work, traffic=traffic, seconds=seconds,
                             utilisation=used)


def report(estimates: list[Estimate], slice_: Slice, headroom: float) -> str:
  """A table of programs on one slice, then collectives and bounds of each, as text.

  `headroom` is the share of memory to stay free.
  """
  chip = slice_.chip
  head = ["program", "arguments", "temporaries", f"peak of {chip.hbm_gib:g} GiB", "free", "FLOPs",
          "needed", *_resources(slice_), "at least", "utilisation"]
  return "\n\n".join([
      f"{slice_.name}{f', {slice_.count} slices' if slice_.count > 1 else ''}: {slice_.chips} "
      f"chips of {chip.hbm_gib:g} GiB, {chip.tflops:g} TFLOP/s, "
      f"HBM {chip.hbm_gbs:g} GB/s, links {chip.link_gbs:g} GB/s each way",
      table(head, [_row(x, slice_) for e in estimates for x in (e, *e.others)], numbers=True,
            padded=True),
      "Memory in GiB, FLOPs and seconds for one chip. FLOPs: matrix products of the program, loops "
      "counted\nas often as they run; needed: the share of them that the mathematics asks for; "
      "utilisation: needed\nFLOPs at the peak over the largest of these seconds.",
      *(["Compiled without a GPU, so nothing is tuned: trust memory and programs, not seconds."]
        if chip.gpu else []),
      *("\n".join(_details(e)) for e in estimates),
      *(_excess(e, slice_, headroom) for e in estimates if e.headroom(slice_) < headroom)])


def _resources(slice_):
  return ("compute", "HBM", "ICI", *["DCN"] * (slice_.count > 1))


def _row(e, slice_):
  name, peak, free = e.program.name, f"{e.peak / GIB:.2f}", f"{e.headroom(slice_):.0%}"
  if not e.seconds:
    return [name, "?", "?", peak, free, *["?"] * (4 + len(_resources(slice_)))]
  flops, share = e.work["flops"], lambda x: "" if x is None else f"{x:.0%}"
  memory = [f"{e.arguments / GIB:.2f}", f"{e.temporaries / GIB:.2f}", peak, free]
  needed = e.case.needed_flops and e.case.needed_flops / max(flops, 1) / slice_.chips
  return [name if not e.case.label else f"{name}, {e.case.label}", *memory, f"{flops:.3g}",
          share(needed),
          *(f"{e.seconds[x]:.3g}" if x in e.seconds else "" for x in _resources(slice_)),
          f"{max(e.seconds.values()):.3g} s", share(e.utilisation)]


def _details(e):
  """Lines about the bounds and the collectives of a program."""
  mesh = ", ".join(f"{axis}={n}" for axis, n in e.program.mesh.shape.items() if n > 1)
  yield f"{e.program.name} ({e.program.unit}; mesh {mesh or 'one device'})"
  if not e.seconds:
    yield "  not compiled to the end: it does not fit"
    return
  bound = max(e.seconds, key=e.seconds.get)
  if len(e.seconds) > 1:
    yield (f"  bound by {bound}: {e.seconds[bound]:.3g} s if everything overlaps, "
           f"{sum(e.seconds.values()):.3g} s if nothing does")
  if e.program.attention:
    yield f"  attention: {', '.join(e.program.attention)}"
  for x in (e, *e.others):
    yield from _kernels(x)
  sent, calls = Counter(), Counter()
  for (kind, group), size in ((key[1:], n) for key, n in e.traffic.items() if key[0] == "sent"):
    sent[kind, len(group)] += size
    calls[kind, len(group)] += e.traffic["calls", kind, group]
  for (kind, count), size in sent.most_common():
    yield (f"  {kind:<18} among {count:>3} chips {calls[kind, count]:>8} times "
           f"{size / 1e9:>10.3f} GB sent")
  if not sent and len(e.seconds) > 1:
    yield "  no collectives"
  if e.work["unbounded"]:
    yield f"  loops of unknown length ({e.work['unbounded']}) are counted as one turn each"


def _kernels(e):
  """Lines about the kernels of a program in one case."""
  label = e.case.label and f", {e.case.label}"
  for name in (key[1] for key in e.work if key[0] == "calls"):
    yield (f"  {name:<18} {e.work['calls', name]:>8.0f} times {e.work['flops', name]:>10.3g} FLOPs "
           f"{e.work['hbm', name] / 1e9:>10.3f} GB moved{label}")


def _excess(e, slice_, headroom) -> str:
  """Message about the memory that a program lacks, and what to try."""
  name, chip = e.program.name, slice_.chip
  hint = _HINTS.get(name.split()[0], _HINTS["generate"])
  missing = (headroom - e.headroom(slice_)) * chip.hbm_gib
  kept = f" with {headroom:.0%} to spare" if headroom else ""
  least = "" if e.seconds else "at least "  # the compiler stops at the first excess
  return (f"DOES NOT FIT: {name} needs {least}{e.peak / GIB:.2f} GiB of the {chip.hbm_gib:g} GiB "
          f"of a {chip.name} chip, {missing:.2f} GiB too many{kept}.\n"
          f"Try: {hint.format(stage=name.split()[-1])}")
