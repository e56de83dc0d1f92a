"""Ahead-of-time compilation for a TPU slice: memory, cost and a roofline estimate of the time."""

import collections
import dataclasses
import re

import jax
from jax.experimental import topologies

from irg_jax import chips
from irg_jax.chips import GIB, Slice
from irg_jax.plan.cost import count_flops, count_traffic
from irg_jax.plan.programs import Program

try:
  import libtpu
except ImportError:
  libtpu = None


@dataclasses.dataclass(frozen=True)
class Estimate:
  """Memory and time of a program on one chip; only `peak` of one that does not fit and compile.

  Attributes:
    peak: bytes of memory: arguments and temporaries, or the compiler's own peak if that is more.
    arguments: bytes of inputs and outputs; a donated input and its output count once.
    temporaries: bytes of everything else, with the program's code.
    flops: FLOPs of matrix products and convolutions.
    needed_flops: share of `Program.needed_flops`, or None.
    unbounded: loops without a static bound, which count as one turn.
    traffic: bytes moved, see `cost.count_traffic`.
    seconds: lower bounds of the time by resource: "compute", "HBM", "ICI".
  """

  program: Program
  peak: float
  arguments: float = 0.0
  temporaries: float = 0.0
  flops: float = 0.0
  needed_flops: float | None = None
  unbounded: int = 0
  traffic: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  def headroom(self, slice_: Slice) -> float:
    """Share of the chip's memory that stays free; negative if the program does not fit."""
    return 1 - self.peak / (slice_.chip.hbm_gib * GIB)


def open_slice(text: str) -> Slice:
  """A slice such as "v5p:4x4x4" with libtpu's devices to compile for.

  Call `chips.prepare_to_compile` before JAX is imported.

  Raises:
    ValueError: as `chips.parse_slice`; libtpu is not installed or does not know the slice.
  """
  parsed = chips.parse_slice(text)
  if libtpu is None:
    raise ValueError("compiling for a TPU needs libtpu, which is not installed: "
                     "pip install 'irg_jax[tpu]' (no TPU is needed)")
  # Later chips than v4 join their two cores by themselves.
  options = {"chip_config_name": "megacore"} if parsed.chip.name == "v4" else {}
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
      compiled = traced.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    used = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of |"
                     r"\(([\d.]+)([KMGT])\) exceeds available HBM", str(e))
    if "RESOURCE_EXHAUSTED" not in str(e) or not used:
      raise ValueError(f"{program.name} does not compile: {str(e).strip()[:2000]}") from e
    number, unit = filter(None, used.groups())
    return Estimate(program, float(number) * 2 ** (10 * (1 + "KMGT".index(unit))))
  memory, chip = compiled.memory_analysis(), slice_.chip
  arguments = (memory.argument_size_in_bytes + memory.output_size_in_bytes
               - memory.alias_size_in_bytes)
  temporaries = memory.temp_size_in_bytes + memory.generated_code_size_in_bytes
  peak = max(arguments + temporaries, memory.peak_memory_in_bytes)
  (flops, unbounded), traffic = count_flops(traced.jaxpr), count_traffic(compiled.as_text())
  flops, needed = (x and x / slice_.chips for x in (flops, program.needed_flops))
  devices = list(program.mesh.devices.flat)
  seconds = {"compute": flops / (chip.tflops * 1e12), "HBM": traffic["hbm"] / (chip.hbm_gbs * 1e9),
             "ICI": sum(size / slice_.bandwidth([devices[i] for i in key[2]])
                        for key, size in traffic.items() if key[0] == "sent")}
  return Estimate(program, peak, arguments, temporaries, flops, needed, unbounded, traffic, seconds)
