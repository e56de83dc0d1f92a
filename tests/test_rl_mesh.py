"""Learning from rewards on a mesh: the same updates and trajectories as on one device."""

import dataclasses

import jax
import numpy as np
import pytest
import rl_runs

from irg_jax import sharding
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.rl import rollout, step
from irg_jax.train.step import init_state, make_optimizer

MESH = {"fsdp": 4, "tensor": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return rl_runs.make(tmp_path_factory.mktemp("rl"))


@pytest.mark.long
def test_an_update_is_the_same_on_a_mesh_and_its_state_stays_split(folder):
  rows, s = rl_runs.rows(folder, "image.divergence=0.1")
  rows = jax.tree.map(lambda x: x[:, :4], rows)
  params, optimizer = rl_runs.policy(folder)[0].params["transformer"], make_optimizer(
      s.optimizer, s.stage)
  params, found = jax.device_get(params), []
  for mesh in (sharding.make_mesh({"data": 1}, jax.devices()[:1]), sharding.make_mesh(MESH)):
    model = UnifiedTransformer(s.model)
    placed = jax.device_put(params, sharding.parameter_shardings(params, mesh))
    state = init_state(placed, optimizer)
    state = jax.device_put(state, sharding.parameter_shardings(state, mesh))
    shift = jax.tree.map(lambda x: 1.01 * x, placed)
    old, reference = (step.make_measure(model, s, mesh)(x, rows) for x in (placed, shift))
    program = step.make_update(model, optimizer, s, mesh, state, rows, old)
    state, metrics = program(state, rows, old, reference, np.bool_(False))
    found.append((jax.device_get(metrics), state))
  (one, _), (many, state) = found
  assert one.keys() == many.keys()
  for name in one:
    assert float(many[name]) == pytest.approx(float(one[name]), rel=1e-3, abs=2e-6), name
  kernel = state.params["decoder"]["layers"]["gen"]["q"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 16, 32)


@pytest.mark.long
def test_trajectories_are_the_same_on_a_mesh(folder, tmp_path):
  loaded, generation = rl_runs.policy(folder)
  mesh = sharding.make_mesh(MESH)
  params = jax.device_put(jax.device_get(loaded.params), {
      "transformer": sharding.parameter_shardings(loaded.params["transformer"], mesh),
      "vae": jax.tree.map(lambda x: jax.NamedSharding(mesh, jax.P()), loaded.params["vae"])})
  other = dataclasses.replace(loaded, mesh=mesh, params=params)
  found = rollout.sample(other, rl_runs.settings(folder), generation, rl_runs.PROMPTS[:2], 1,
                         tmp_path, "same")
  for a, b in zip(found, rl_runs.sampled(folder)):
    assert a.trajectory.rounds[0].thought == b.trajectory.rounds[0].thought
    np.testing.assert_allclose(a.path[0], b.path[0], atol=1e-3)
