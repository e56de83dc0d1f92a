"""From what an axis means to which mesh axis it is split over: one table for everything.

Parameters (and so optimizer state and EMA), caches, batches and activations all name their
axes with the logical names below; `RULES` maps those to the mesh axes `data`, `fsdp`,
`tensor` and `sequence`. A dimension that a mesh axis does not divide is left whole.
"""

import re

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "sequence", "tensor")

RULES = {
    "batch": ("data", "fsdp"),  # rows of a batch, of a cache, of activations
    "rows": ("data",),  # likewise, where `fsdp` is needed for the width
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
    (r"(connector|time_embed)/fc\d/kernel", ("width", None)),
    (r"(latent_embed|heads/\w+|vit/patch_embed)/kernel", ("width", None)),
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


def lookup(table, ids):
  """Rows of an embedding table [V, D] for ids [B, T] -> [B, T, D].

  A table is split over the width and the ids over the rows of the batch, by the same mesh
  axis. Each device looks up its part of the width for all rows of that axis, then the parts
  change hands: the table itself never does.
  """
  parts = constrain(table[constrain(ids, "rows", "length")], "rows", "length", "width")
  return constrain(parts, "batch", "length", "embed")


def pick(x, place):
  """x [B, T, D] at place [B, L] -> [B, L, D]; gathered from whole rows, cut up again after."""
  x = constrain(x, "batch", None, "embed")
  picked = jnp.take_along_axis(x, place[..., None], axis=1)
  return constrain(picked, "batch", "length", "embed")


def constrain_parameters(params):
  """Asks XLA to lay out a parameter tree as `parameter_shardings` says, if a mesh is set."""
  mesh = jax.sharding.get_abstract_mesh()
  return params if mesh.empty else jax.tree.map(
      jax.lax.with_sharding_constraint, params, parameter_shardings(params, mesh))


def gather_parameters(params):
  """Asks for the parameters outside the stacks of layers to be whole along `fsdp`.

  Once, where they are used often (the text head, chunk by chunk) or where XLA would rather
  move the activations of the whole batch than a small matrix. The embedding table stays cut
  up: see `lookup`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params

  def gathered(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if re.search(r"(^|/)layers/|embedding$", name):
      return x
    axes = [None if axis == "width" else axis for axis in _parameter_axes(name, x)]
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))

  return jax.tree.map_with_path(gathered, params)


def platform() -> str:
  """The kind of device that a program is traced for: the mesh's, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def parameter_shardings(params, mesh):
  """Shardings of a parameter tree (or of anything built of the same paths and shapes).

  Args:
    params: pytree of arrays or ShapeDtypeStructs whose paths end in the parameter paths;
      scalars beside them are whole on every device.

  Raises:
    ValueError: a parameter that `PARAMETER_AXES` does not cover.
  """
  def sharding(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return NamedSharding(mesh, partition_spec(x.shape, _parameter_axes(name, x), mesh))

  return jax.tree.map_with_path(sharding, params)


def _parameter_axes(name, x):
  if not x.shape:  # counts of an optimizer
    return ()
  for pattern, axes in PARAMETER_AXES:
    if re.search(rf"(^|/){pattern}$", name):
      return axes or (None,) * len(x.shape)
  raise ValueError(f"no rule in sharding.PARAMETER_AXES matches parameter {name!r} {x.shape}")
