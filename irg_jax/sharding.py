"""Sharding rules: logical axis names to mesh axes, in one table.

Parameters (hence optimizer state and EMA), caches, batches and activations name their axes with
the logical names below; `RULES` maps these to the mesh axes `slice`, `data`, `fsdp`, `sequence` and
`tensor`. A dimension that a mesh axis does not divide is not split over it.

`slice` counts TPU slices (or nodes) that a slower network joins. Only training splits over it: each
slice has its rows of the batch and all parameters, and gradients are summed across slices once an
update (`train.step`).
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("slice", "data", "fsdp", "sequence", "tensor")

RULES = {
    "global_batch": ("slice", "data", "fsdp"),  # rows of a training batch
    "slices": ("slice",),
    "batch": ("data", "fsdp"),  # rows of a slice's part of it, of caches and activations
    "rows": ("data",),  # the same where `fsdp` splits the width
    "length": ("sequence",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "width": ("fsdp",),  # the model width of a parameter
    "embed": (),  # the model width of an activation
    "layers": (),
}

# The first match wins; a parameter without a match is an error.
PARAMETER_AXES = (
    (r"(decoder/layers/\w+|vit/layers)/[qkv]/kernel", ("layers", "width", "heads")),
    (r"decoder/layers/\w+/[qkv]/bias", ("layers", "heads")),
    (r"(decoder/layers/\w+|vit/layers)/o/kernel", ("layers", "heads", "width")),
    (r"(decoder/layers/\w+/(gate|up)|vit/layers/fc1)/kernel", ("layers", "width", "mlp")),
    (r"(decoder/layers/\w+/down|vit/layers/fc2)/kernel", ("layers", "mlp", "width")),
    (r"embed/embedding", ("vocab", "width")),
    (r"heads/text/kernel", ("width", "vocab")),
    (r"(connector|time_embed)/fc\d/kernel", ("width", None)),
    (r"(latent_embed|heads/\w+|vit/patch_embed)/kernel", ("width", None)),
    (r"vit/position_embed/embedding", (None, "width")),
    (r".*(scale|bias)", ()),
    (r"vae/.*", ()),  # small and frozen: replicated
)


def make_mesh(shape: dict[str, int] | None = None, devices=None):
  """A mesh over `devices` (default: all) with the axes of `MESH_AXES`.

  `shape` gives sizes by axis name, 1 for missing axes; None or empty puts all devices on `fsdp`.
  Raises ValueError for an unknown axis, a product that is not the number of devices, or a `slice`
  that would cross from one TPU slice to another.
  """
  devices = jax.devices() if devices is None else devices
  shape = dict(shape) if shape else {"fsdp": len(devices)}
  if unknown := set(shape) - set(MESH_AXES):
    raise ValueError(f"unknown mesh axes {sorted(unknown)}; known: {MESH_AXES}")
  if min(shape.values()) < 1:
    raise ValueError(f"mesh {shape}: every axis needs at least 1 device")
  sizes = tuple(shape.get(axis, 1) for axis in MESH_AXES)
  if (count := math.prod(sizes)) != len(devices):
    raise ValueError(f"mesh {shape} needs {count} devices, but there are {len(devices)}")
  inner = [jax.make_mesh(sizes[1:], MESH_AXES[1:], devices=part).devices
           for part in _by_slice(devices, sizes[0])]
  return Mesh(np.stack(inner), MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def _by_slice(devices, count: int):
  """Splits devices into `count` equal groups, each from one TPU slice, else by process."""
  place = lambda d: (getattr(d, "slice_index", None) or 0, d.process_index)
  groups = np.split(np.array(sorted(devices, key=place)), count) if count > 1 else [devices]
  slices = {place(d)[0] for d in devices}
  if any(len({place(d)[0] for d in group}) > 1 for group in groups):
    raise ValueError(f"mesh with slice={count}: the devices are in {len(slices)} TPU slices; give "
                     f"slice={len(slices)}, or a multiple of it")
  return [list(group) for group in groups]


def generation_mesh(shape: dict[str, int] | None, llm, devices=None):
  """`make_mesh` for generation: without a shape, weights stay where they are.

  As many devices as the heads allow are on `tensor`, so that no weight moves; the others split the
  rows. `llm` is the decoder's `config.LlmConfig`.
  """
  count = len(jax.devices() if devices is None else devices)
  tensor = next(n for n in range(count, 0, -1) if count % n == 0 and splits_heads(llm, n))
  return make_mesh(shape or {"data": count // tensor, "tensor": tensor}, devices)


def splits_heads(llm, tensor: int) -> bool:
  """Whether the heads divide by a `tensor` axis, key-value heads repeated if need be."""
  return llm.num_heads % tensor == 0 and (
      llm.num_kv_heads % tensor == 0 or tensor % llm.num_kv_heads == 0)


def kv_copies(llm) -> int:
  """Copies of each key-value head, so that they divide by a `tensor` axis with more devices."""
  mesh = jax.sharding.get_abstract_mesh()
  tensor = 1 if mesh.empty else mesh.shape["tensor"]
  return max(1, tensor // llm.num_kv_heads) if splits_heads(llm, tensor) else 1


def partition_spec(shape, axes, mesh) -> PartitionSpec:
  """The PartitionSpec of an array with the given logical axes (names or None).

  Mesh axes are taken from left to right while their product divides the dimension, and each at
  most once in an array.
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


def attention_specs(q_BTNH, k_BKSH, mesh) -> tuple[PartitionSpec, PartitionSpec]:
  """PartitionSpecs of queries and keys for attention; only queries are split along the length."""
  q = partition_spec(q_BTNH.shape, ("batch", "length", "heads", None), mesh)
  kv = partition_spec(k_BKSH.shape, ("batch", "heads", None, None), mesh)
  if kv[1] == q[2]:
    return q, kv
  # Query heads that share a key-value head stay together.
  return PartitionSpec(*q[:2], None, None), PartitionSpec(kv[0], None, None, None)


def constrain(x, *axes):
  """Constrains the sharding of `x` by its logical axes; a no-op without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return x if mesh.empty else jax.lax.with_sharding_constraint(
      x, partition_spec(x.shape, axes, mesh))


def lookup(table_VD, ids_BT):
  """Rows of an embedding table, [B, T, D].

  The table is split over the width and the ids over the rows of the batch, by the same mesh axis.
  Each device looks up its part of the width for all rows of that axis. Then the results are
  exchanged; the table never moves.
  """
  parts_BTD = constrain(table_VD[constrain(ids_BT, "rows", "length")], "rows", "length", "width")
  return constrain(parts_BTD, "batch", "length", "embed")


def pick(x_BTD, place_BE):
  """Tokens of x [B, T, D] at the given places, [B, E, D]."""
  x_BTD = constrain(x_BTD, "batch", None, "embed")  # gathered along the length, then split again
  picked_BED = jnp.take_along_axis(x_BTD, place_BE[..., None], axis=1)
  return constrain(picked_BED, "batch", "length", "embed")


def constrain_parameters(params, lead=()):
  """Constrains a parameter tree to its `parameter_shardings`; a no-op without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return params if mesh.empty else jax.tree.map(
      jax.lax.with_sharding_constraint, params, parameter_shardings(params, mesh, lead))


def gather_parameters(params):
  """Gathers the parameters outside the layer stacks along `fsdp`; a no-op without a mesh.

  Gathered once because the text head is used chunk by chunk, and because XLA would otherwise move
  the activations of the whole batch instead of a small matrix. The embedding table stays split,
  see `lookup`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return params

  def gathered(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if re.search(r"(^|/)layers/|embedding$", name):
      return x
    axes = [None if axis == "width" else axis for axis in _parameter_axes(name, x.shape)]
    return jax.lax.with_sharding_constraint(x, partition_spec(x.shape, axes, mesh))

  return jax.tree.map_with_path(gathered, params)


def to_host(x) -> np.ndarray:
  """All of an array, in every process; a collective where other processes hold parts of it."""
  whole = x.is_fully_addressable or x.is_fully_replicated
  return np.asarray(x if whole else process_allgather(x, tiled=True))


def platform() -> str:
  """Platform that a program is traced for: the mesh's, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return device.platform if device is not None else jax.default_backend()


def parameter_shardings(params, mesh, lead=()):
  """NamedShardings of a parameter tree, or of a tree with the same paths and shapes inside.

  `lead` names axes in front of those of every parameter.

  Paths need only end in parameter paths, as in optimizer state; scalars are replicated. Raises
  ValueError for a parameter without a match in `PARAMETER_AXES`.
  """
  def sharding(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    axes = (*lead, *_parameter_axes(name, x.shape[len(lead):]))
    return NamedSharding(mesh, partition_spec(x.shape, axes, mesh))

  return jax.tree.map_with_path(sharding, params)


def _parameter_axes(name, shape):
  if not shape:  # counts of an optimizer
    return ()
  if name.endswith(("/lora_a", "/lora_b")):  # one side of their kernel, and the rank
    *lead, first, last = _parameter_axes(f"{name[:-7]}/kernel", shape)
    return (*lead, first, None) if name.endswith("a") else (*lead, None, last)
  if name.endswith("/kernel_scale"):  # one for each output of an int8 kernel
    *lead, _, last = _parameter_axes(name.removesuffix("_scale"), shape)
    return (*lead, last)
  for pattern, axes in PARAMETER_AXES:
    if re.search(rf"(^|/){pattern}$", name):
      return axes or (None,) * len(shape)
  raise ValueError(f"no rule in sharding.PARAMETER_AXES matches parameter {name!r} {shape}")
