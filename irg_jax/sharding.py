"""From what an axis means to which mesh axis it is split over: one table for everything.

Parameters (and so optimizer state and EMA), caches, batches and activations all name their
axes with the logical names below; `RULES` maps those to the mesh axes `data`, `fsdp`,
`tensor` and `sequence`. A dimension that a mesh axis does not divide is left whole.
"""

import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

RULES = {
    "batch": ("data", "fsdp"),  # rows of a batch, of a cache, of activations
    "length": ("sequence",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "width": ("fsdp",),  # the model width in a parameter
    "embed": (),  # the model width in an activation
    "layers": (),
}

# First match wins; a parameter that nothing matches is an error.
PARAMETER_AXES = (
    (r"decoder/layers/\w+/[qkv]/kernel", ("layers", "width", "heads")),
    (r"decoder/layers/\w+/[qkv]/bias", ("layers", "heads")),
    (r"decoder/layers/\w+/o/kernel", ("layers", "heads", "width")),
    (r"decoder/layers/\w+/(gate|up)/kernel", ("layers", "width", "mlp")),
    (r"decoder/layers/\w+/down/kernel", ("layers", "mlp", "width")),
    (r"embed/embedding", ("vocab", "width")),
    (r"heads/text/kernel", ("width", "vocab")),
    (r"vit/layers/[qkv]/kernel", ("layers", "width", "heads")),
    (r"vit/layers/o/kernel", ("layers", "heads", "width")),
    (r"vit/layers/fc1/kernel", ("layers", "width", "mlp")),
    (r"vit/layers/fc2/kernel", ("layers", "mlp", "width")),
    (r"(connector|time_embed)/fc\d/kernel", (None, "width")),
    (r"(latent_embed|heads/velocity|vit/patch_embed)/kernel", ("width", None)),
    (r"vit/position_embed/embedding", (None, "width")),
    (r".*(scale|bias)", ()),
    (r"vae/.*", ()),  # small and frozen: a copy on every device
)


def make_mesh(shape: dict[str, int] | None = None, devices=None):
  """A mesh over `devices` (all by default) with the four axes of `MESH_AXES`.

  Args:
    shape: sizes by axis name; axes left out are 1, and if no size is given at all, every
      device goes to `fsdp`.

  Raises:
    ValueError: an unknown axis, or sizes that do not use the devices exactly.
  """
  devices = jax.devices() if devices is None else devices
  shape = dict(shape) if shape else {"fsdp": len(devices)}
  unknown = set(shape) - set(MESH_AXES)
  if unknown:
    raise ValueError(f"unknown mesh axes {sorted(unknown)}; known: {MESH_AXES}")
  if min(shape.values()) < 1:
    raise ValueError(f"mesh {shape}: every axis needs at least 1 device")
  sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
  count = 1
  for size in sizes:
    count *= size
  if count != len(devices):
    raise ValueError(f"mesh {shape} needs {count} devices, but there are {len(devices)}")
  types = (AxisType.Auto,) * len(MESH_AXES)
  return jax.make_mesh(sizes, MESH_AXES, axis_types=types, devices=devices)


def partition_spec(shape, axes, mesh) -> PartitionSpec:
  """The PartitionSpec of an array with the given logical axes (names or None).

  Mesh axes are taken from left to right as long as their product divides the dimension, each
  mesh axis at most once in an array.
  """
  taken, spec = set(), []
  for size, name in zip(shape, axes, strict=True):
    split, product = [], 1
    for axis in RULES[name] if name else ():
      length = mesh.shape[axis]
      if length > 1 and axis not in taken and size % (product * length) == 0:
        split.append(axis)
        product *= length
    taken.update(split)
    spec.append(tuple(split) if split else None)
  return PartitionSpec(*spec)


def constrain(x, *axes):
  """Asks XLA to lay out `x` by its logical axes; does nothing where no mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return x
  return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))


def parameter_shardings(params, mesh):
  """Shardings of a parameter tree (or of anything built of the same paths and shapes).

  Args:
    params: pytree of arrays or ShapeDtypeStructs whose paths contain the parameter paths.

  Raises:
    ValueError: a parameter that `PARAMETER_AXES` does not cover.
  """
  def sharding(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, partition_spec(x.shape, _parameter_axes(name, x), mesh))

  return jax.tree.map_with_path(sharding, params)


def _parameter_axes(name, x):
  for pattern, axes in PARAMETER_AXES:
    if re.search(rf"(^|/){pattern}$", name):
      return axes or (None,) * len(x.shape)
  raise ValueError(f"no rule in sharding.PARAMETER_AXES matches parameter {name!r} {x.shape}")
