"""Compiles programs ahead of time and says what each needs of a chip."""

import dataclasses
import re

import jax

from irg_jax.plan import cost as cost_lib
from irg_jax.plan.programs import Program
from irg_jax.plan.topology import GIB, Slice


@dataclasses.dataclass(frozen=True)
class Memory:
  """Of one chip, in bytes.

  Attributes:
    arguments: what the program is given and what it gives back, counted once where it may
      be the same memory (a donated state).
    temporaries: what it needs in between; with its code.
    peak: both, or what the compiler says is the most at any time if that is more.
  """

  arguments: float
  temporaries: float
  peak: float


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a program needs of one chip.

  Attributes:
    memory: where it does not fit, only `peak` is known.
    cost: None where it does not compile because it does not fit.
    seconds: least time by what would bound it: "compute", "HBM", "ICI".
    needed_flops: a chip's share of `Program.needed_flops`, or None.
  """

  program: Program
  memory: Memory
  cost: cost_lib.Cost | None = None
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  needed_flops: float | None = None

  @property
  def bound(self) -> str:
    return max(self.seconds, key=self.seconds.get)

  def headroom(self, slice_: Slice) -> float:
    """Share of the chip's memory that stays free; negative where the program does not fit."""
    return 1 - self.memory.peak / (slice_.chip.hbm_gib * GIB)


def estimate(program: Program, slice_: Slice) -> Estimate:
  """Compiles a program for a slice and reads off what it needs.

  Raises:
    ValueError: it does not compile, for another reason than memory.
  """
  try:
    with jax.set_mesh(program.mesh):
      compiled = program.lower().compile()
  except jax.errors.JaxRuntimeError as e:
    return Estimate(program, Memory(0, 0, _asked_for(program, str(e))))
  cost = cost_lib.program_cost(compiled.as_text())
  needed = None if program.needed_flops is None else program.needed_flops / slice_.chips
  return Estimate(program, _memory(compiled.memory_analysis()), cost,
                  roofline(cost, slice_, program.mesh), needed)


def roofline(cost: cost_lib.Cost, slice_: Slice, mesh) -> dict[str, float]:
  """Seconds that a program takes at least, by resource, were each used at its peak."""
  chip, devices = slice_.chip, list(mesh.devices.flat)
  wire = sum(sent / slice_.bandwidth([devices[i] for i in group])
             for (_, group), sent in cost.wire.items())
  return {"compute": cost.flops / (chip.tflops * 1e12), "HBM": cost.memory / (chip.hbm_gbs * 1e9),
          "ICI": wire}


def _memory(analysis) -> Memory:
  arguments = (analysis.argument_size_in_bytes + analysis.output_size_in_bytes
               - analysis.alias_size_in_bytes)
  temporaries = analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes
  return Memory(arguments, temporaries,
                max(arguments + temporaries, analysis.peak_memory_in_bytes))


def _asked_for(program, message) -> float:
  """Bytes that a program wanted, from the compiler's refusal."""
  found = re.search(r"[Uu]sed ([\d.]+)([KMGT]) of ", message) or re.search(
      r"\(([\d.]+)([KMGT])\) exceeds available HBM", message)
  if "RESOURCE_EXHAUSTED" not in message or not found:
    raise ValueError(f"{program.name} does not compile: {message.strip()[:2000]}")
  return float(found[1]) * 2 ** (10 * (1 + "KMGT".index(found[2])))
