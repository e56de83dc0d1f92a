"""TPU chips, slices and GPUs: peak FLOP/s, memory, bandwidth and links, from public data sheets.

This module does not import JAX: `prepare_to_compile` has to run before.
"""

import dataclasses
import math
import os
import re

from irg_jax.messages import guess

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Specification of one TPU chip or GPU."""

  name: str
  hbm_gib: float  # memory that a program can use, in GiB
  tflops: float  # peak of bfloat16 matrix products, in 1e12 FLOP/s
  hbm_gbs: float  # memory bandwidth, in 1e9 bytes/s
  link_gbs: float  # bandwidth of one link to a neighbour, one way, in 1e9 bytes/s
  ring: int  # the shortest side of a slice whose links wrap around
  dims: int  # dimensions of the torus
  dcn_gbs: float = 0.0  # of the network between slices, in 1e9 bytes/s; 0: not published
  gpu: bool = False  # GPUs of one node, all on one switch: a single side without a ring


CHIPS = {chip.name: chip for chip in (
    Chip("v4", 32, 275, 1228, 50, 4, 3),
    Chip("v5e", 16, 197, 819, 50, 16, 2, dcn_gbs=3.125),
    Chip("v5p", 95, 459, 2765, 100, 4, 3, dcn_gbs=6.25),
    Chip("v6e", 32, 918, 1640, 112, 16, 2, dcn_gbs=12.5),
    Chip("a100", 79, 312, 2039, 300, 9, 1, gpu=True),
    Chip("a6000", 47, 155, 768, 56, 9, 1, gpu=True),  # 48 GB
    Chip("h100", 79, 989, 3352, 450, 9, 1, gpu=True),
)}

# Peak of dense bfloat16 products in TFLOP/s by a part of `device_kind`; the first match counts.
_PEAKS = {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5e": 197, "TPU v5": 459, "TPU v6": 918,
          "A100": 312, "H100 PCIe": 756, "H100": 989, "H200": 989}


def peak_tflops(device_kind: str) -> float:
  """Peak of one device in TFLOP/s by JAX's `device_kind`; 0 if the device is unknown."""
  return next((peak for name, peak in _PEAKS.items() if name in device_kind), 0.0)


@dataclasses.dataclass(frozen=True)
class Slice:
  """Slices of a TPU pod with `sides[0] * sides[1] * ...` chips each, or a node of GPUs."""

  chip: Chip
  sides: tuple[int, ...]
  devices: tuple | None = None  # of JAX to compile for, one per chip; None: only the figures
  places: dict[int, tuple[int, ...]] | None = None  # of each chip in its slice by device id
  count: int = 1  # slices, joined by the data centre's network

  @property
  def name(self) -> str:
    """The topology of one slice."""
    return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

  @property
  def chips(self) -> int:
    """Chips of all slices."""
    return self.count * math.prod(self.sides)

  def crosses(self, devices) -> bool:
    """Whether a group of devices is in several slices."""
    return self.count > 1 and len({d.slice_index for d in devices}) > 1

  def bandwidth(self, devices) -> float:
    """Bytes/s that each device of a group can send to the others, at best.

    Between slices, that of the network.
    A group has two links for each side of the slice that it extends along, one if that side is
    too short to wrap around.
    """
    if self.crosses(devices):
      return self.chip.dcn_gbs * 1e9
    axes = zip(*(self.places[d.id] for d in devices))
    links = sum(1 + (side >= self.chip.ring)
                for side, places in zip(self.sides, axes) if len(set(places)) > 1)
    return max(links, 1) * self.chip.link_gbs * 1e9


def parse_slice(text: str) -> Slice:
  """Parses a topology such as "v5p:4x4x4" into a Slice without devices; ValueError if wrong."""
  if not (found := re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", text)):
    raise ValueError(f"topology {text!r}: write CHIP:SIDExSIDE, like v5p:4x4x4, v5e:2x4 or h100:8")
  chip, sides = CHIPS.get(found[1]), tuple(map(int, found[2].split("x")))
  if chip is None:
    raise ValueError(f"topology {text!r}: unknown chip {found[1]!r}{guess(found[1], CHIPS)}; "
                     f"known: {', '.join(CHIPS)}")
  if len(sides) != chip.dims:
    example = "8" if chip.gpu else "x".join(["4"] * chip.dims)
    raise ValueError(f"topology {text!r}: a {chip.name} slice has {chip.dims} sides, like "
                     f"{chip.name}:{example}")
  if chip.gpu and sides[0] > 8:
    raise ValueError(f"topology {text!r}: a node has at most 8 GPUs")
  return Slice(chip, sides)


def prepare_to_compile() -> None:
  """Sets the environment to compile without the device; call it before JAX is imported."""
  os.environ |= {
      "JAX_PLATFORMS": "cpu",
      "TPU_SKIP_MDS_QUERY": "1",  # or libtpu waits for the cloud's metadata server
      "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}  # several processes may compile at once
  # Any accelerator that exists: the topology is requested by name later.
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
