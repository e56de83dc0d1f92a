"""Sharding rules: which dimension is split over which mesh axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from irg_jax import sharding
from irg_jax.config import LlmConfig, ModelConfig, VaeConfig, VitConfig
from irg_jax.weights import names

# Sizes that fsdp 2 and tensor 2 divide.
SMALL = ModelConfig(
    llm=LlmConfig(vocab_size=96, hidden_size=32, mlp_size=48, num_layers=2, num_heads=4,
                  num_kv_heads=2),
    vit=VitConfig(hidden_size=16, mlp_size=24, num_layers=2, num_heads=2, patch_size=2,
                  grid_size=4),
    vae=VaeConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4))


def cube():
  return sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


def abstract_mesh(**sizes):
  """An abstract mesh: the rules need no devices."""
  return AbstractMesh(tuple(sizes.get(a, 1) for a in sharding.MESH_AXES), sharding.MESH_AXES)


def test_mesh_gives_every_device_to_fsdp_unless_told_otherwise():
  assert dict(sharding.make_mesh().shape) == dict(slice=1, data=1, fsdp=8, sequence=1, tensor=1)
  assert dict(cube().shape) == dict(slice=1, data=2, fsdp=2, sequence=1, tensor=2)
  one = sharding.make_mesh({"data": 1}, devices=jax.devices()[:1])
  assert set(one.shape.values()) == {1}


@pytest.mark.parametrize("shape, message", [
    ({"model": 8}, r"unknown mesh axes \['model'\].*tensor"),
    ({"data": 2}, "needs 2 devices, but there are 8"),
    ({"fsdp": 16}, "needs 16 devices, but there are 8"),
    ({"fsdp": 0}, "every axis needs at least 1"), ({"data": -1, "fsdp": -8}, "at least 1"),
])
def test_mesh_that_cannot_be_is_refused(shape, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(shape)


@pytest.mark.parametrize("shape, axes, want", [
    ((2, 32, 64), ("layers", "width", "heads"), P(None, ("fsdp",), ("tensor",))),
    ((8, 5, 32), ("batch", "length", "embed"), P(("data", "fsdp"), None, None)),
    ((8,), (None,), P(None)),
    ((3, 32), ("batch", "width"), P(None, ("fsdp",))),  # 2 does not divide 3
    ((2, 6), ("batch", "heads"), P(("data",), ("tensor",))),  # data fits, data x fsdp does not
    ((31, 33), ("width", "mlp"), P(None, None)),
    ((1,), ("batch",), P(None)),
])
def test_axes_that_do_not_divide_are_dropped(shape, axes, want):
  assert sharding.partition_spec(shape, axes, abstract_mesh(data=2, fsdp=2, tensor=2)) == want


def test_mesh_axis_is_used_once_in_an_array():
  mesh = abstract_mesh(data=2, fsdp=2, tensor=2)
  assert sharding.partition_spec((8, 8), ("heads", "mlp"), mesh) == P(("tensor",), None)
  assert sharding.partition_spec((8, 8), ("batch", "width"), mesh) == P(("data", "fsdp"), None)
  # Where the first could not take it, the second may.
  assert sharding.partition_spec((7, 8), ("heads", "mlp"), mesh) == P(None, ("tensor",))


def test_axes_of_one_device_are_not_named():
  assert sharding.partition_spec((8, 8), ("batch", "heads"), abstract_mesh(data=2)) == P(
      ("data",), None)


def test_wrong_number_of_logical_axes_is_refused():
  with pytest.raises(ValueError):
    sharding.partition_spec((8, 8), ("batch",), abstract_mesh(data=2))


@pytest.mark.parametrize("config", [SMALL, ModelConfig()], ids=["small", "7B"])
def test_every_parameter_has_a_rule(config):
  params = names.abstract_params(config, jnp.float32)
  specs = sharding.parameter_shardings(params, cube())
  assert jax.tree.structure(specs) == jax.tree.structure(params)


@pytest.mark.parametrize("config, share", [(SMALL, 0.45), (ModelConfig(), 0.26)],
                         ids=["small", "7B"])
def test_every_big_transformer_kernel_is_split(config, share):
  """Replicated parameters are a small part of the transformer on 8 devices."""
  params = names.abstract_params(config, jnp.float32)["transformer"]
  specs = sharding.parameter_shardings(params, cube())
  on_one = jax.tree.map(lambda x, s: np.prod(s.shard_shape(x.shape)), params, specs)
  layers = names.flatten(on_one)
  for path, x in names.flatten(params).items():
    if path.startswith(("decoder/layers", "vit/layers", "embed", "heads/text")) and (
        path.endswith(("kernel", "embedding"))):
      assert layers[path] * 4 == np.prod(x.shape), path  # fsdp x tensor
  total = sum(np.prod(x.shape) for x in jax.tree.leaves(params))
  assert sum(jax.tree.leaves(on_one)) < share * total


def test_rules_hold_wherever_the_parameters_stand_in_a_tree():
  """Optimizer moments and EMA are sharded as the parameters are."""
  params = names.abstract_params(SMALL, jnp.float32)
  mesh = cube()
  state = {"opt": [{"mu": params}], "ema": params}
  want = sharding.parameter_shardings(params, mesh)
  assert sharding.parameter_shardings(state, mesh) == {"opt": [{"mu": want}], "ema": want}


def test_unknown_parameter_is_refused():
  params = {"transformer": {"depth_head": {"table": jnp.zeros((4, 4))}}}
  with pytest.raises(ValueError, match=r"PARAMETER_AXES.*'transformer/depth_head/table' \(4, 4\)"):
    sharding.parameter_shardings(params, cube())


def test_arrays_really_lie_in_pieces_on_the_devices():
  shapes = names.abstract_params(SMALL, jnp.float32)
  placed = jax.tree.map(lambda x, s: jax.device_put(np.zeros(x.shape, np.float32), s),
                        shapes, sharding.parameter_shardings(shapes, cube()))
  leaves = names.flatten(placed)
  D, V, F, L = 32, 96, 48, 2
  for path, shard in {
      "transformer/embed/embedding": (V // 2, D // 2),
      "transformer/heads/text/kernel": (D // 2, V // 2),
      "transformer/decoder/layers/und/q/kernel": (L, D // 2, D // 2),
      "transformer/decoder/layers/gen/k/kernel": (L, D // 2, D // 4),
      "transformer/decoder/layers/gen/o/kernel": (L, D // 2, D // 2),
      "transformer/decoder/layers/und/up/kernel": (L, D // 2, F // 2),
      "transformer/decoder/layers/gen/down/kernel": (L, F // 2, D // 2),
      "transformer/decoder/layers/und/q/bias": (L, D // 2),
      "transformer/vit/layers/fc1/kernel": (L, 8, 12),
      "transformer/connector/fc2/kernel": (D // 2, D),
      "transformer/decoder/und_norm/scale": (D,),
      "vae/encoder/conv_in/kernel": (3, 3, 3, 32),
  }.items():
    shards = leaves[path].addressable_shards
    assert len(shards) == 8 and {s.data.shape for s in shards} == {shard}, path


def test_constrain_lays_out_under_a_mesh_and_is_a_no_op_without():
  x = jnp.zeros((4, 6, 8))
  assert sharding.constrain(x, "batch", "length", "mlp") is x
  with jax.set_mesh(cube()):
    y = jax.jit(lambda x: sharding.constrain(x + 1, "batch", "length", "mlp"))(x)
  assert {s.data.shape for s in y.addressable_shards} == {(1, 6, 4)}
