"""TPU chips and slices: what a chip can do, and devices to compile for without having any."""

import dataclasses
import math
import os
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Public figures of one chip (vendor's system architecture pages, "key specifications").

  Attributes:
    hbm_gib: memory that a program can use.
    tflops: peak of bfloat16 matrix products, 1e12 a second.
    hbm_gbs: memory bandwidth, 1e9 bytes a second.
    link_gbs: one link to a neighbour, one way, 1e9 bytes a second.
    ring: a side of the slice of at least this many chips closes to a ring.
    dims: of the torus.
  """

  name: str
  hbm_gib: float
  tflops: float
  hbm_gbs: float
  link_gbs: float
  ring: int
  dims: int


CHIPS = {chip.name: chip for chip in (
    Chip("v4", 32, 275, 1228, 50, 4, 3),
    Chip("v5e", 16, 197, 819, 50, 16, 2),
    Chip("v5p", 95, 459, 2765, 100, 4, 3),
    Chip("v6e", 32, 918, 1640, 112, 16, 2),
)}


@dataclasses.dataclass(frozen=True)
class Slice:
  """A slice of a pod: `sides[0] * sides[1] * ...` chips.

  Attributes:
    devices: what JAX compiles for, one a chip; None where only the arithmetic is wanted.
    places: where the chip of each device is, by the device's id.
  """

  chip: Chip
  sides: tuple[int, ...]
  devices: tuple | None = None
  places: dict[int, tuple[int, ...]] | None = None

  @property
  def name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.sides))}"

  @property
  def chips(self) -> int:
    return math.prod(self.sides)

  def bandwidth(self, devices) -> float:
    """Bytes a second that each of a group of devices can send to the others.

    Two links for every side of the slice that the group extends along (one where it does not
    close to a ring): what a collective gets at best.
    """
    places = [self.places[d.id] for d in devices]
    links = 0
    for axis, side in enumerate(self.sides):
      if len({p[axis] for p in places}) > 1:
        links += 2 if side >= self.chip.ring else 1
    return max(links, 1) * self.chip.link_gbs * 1e9


def parse_slice(text: str) -> Slice:
  """Chip and sides of "v5p:4x4x4", without devices.

  Raises:
    ValueError: another form, an unknown chip, the wrong number of sides.
  """
  found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)", text)
  if not found:
    raise ValueError(f"topology {text!r}: write CHIP:SIDExSIDE, like v5p:4x4x4 or v5e:2x4")
  chip, sides = CHIPS.get(found[1]), tuple(map(int, found[2].split("x")))
  if chip is None:
    raise ValueError(f"topology {text!r}: unknown chip {found[1]!r}; known: {', '.join(CHIPS)}")
  if len(sides) != chip.dims:
    raise ValueError(f"topology {text!r}: a {chip.name} slice has {chip.dims} sides, like "
                     f"{chip.name}:{'x'.join(['4'] * chip.dims)}")
  return Slice(chip, sides)


def prepare_environment() -> None:
  """Sets what lets libtpu compile on a machine without TPUs; call it before importing JAX."""
  # Without these it asks the cloud's metadata server what machine this is, and waits for it.
  # The accelerator type only has to be a real one: the topology is asked for by name.
  os.environ["JAX_PLATFORMS"] = "cpu"
  os.environ["TPU_SKIP_MDS_QUERY"] = "1"
  os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # there is no chip to be held by one process
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def open_slice(text: str) -> Slice:
  """The slice with devices to compile for, from libtpu.

  Raises:
    ValueError: as `parse_slice`; libtpu is not installed, or knows no such slice.
  """
  parsed = parse_slice(text)
  prepare_environment()
  try:
    import libtpu  # noqa: F401
  except ImportError as e:
    raise ValueError("compiling for a TPU needs libtpu, which is not installed: "
                     "pip install 'irg_jax[tpu]' (no TPU is needed)") from e
  from jax.experimental import topologies
  # The two cores of a v4 chip work as one if they are told to; later chips know themselves.
  options = {"chip_config_name": "megacore"} if parsed.chip.name == "v4" else {}
  try:
    devices = topologies.get_topology_desc(
        platform="tpu", topology_name=parsed.name, **options).devices
  except Exception as e:  # libtpu's own errors have no type of their own
    raise ValueError(f"topology {parsed.name}: libtpu cannot compile for it: "
                     f"{str(e).splitlines()[0]}") from e
  places = {d.id: tuple(d.coords) for d in devices}
  return dataclasses.replace(parsed, devices=tuple(devices), places=places)
