"""What training changes: parameters, their moving average, the optimizer's moments."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from irg_jax.sharding import parameter_shardings
from irg_jax.train.optimizer import Optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """The state of one stage.

  Attributes:
    step: int32, updates made in this stage.
    params: float32 parameters of the UnifiedTransformer (the VAE is frozen and not here).
    ema: their moving average.
    opt_state: of optax.
  """

  step: jax.Array
  params: Any
  ema: Any
  opt_state: Any


def init_state(params, optimizer: Optimizer) -> TrainState:
  """The state before the first update; under `jax.eval_shape` and `jax.jit`, too.

  Args:
    params: parameters of the UnifiedTransformer, in any dtype.
  """
  master = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  # Copies: the state is donated, and no buffer may be donated twice.
  copy = lambda tree: jax.tree.map(jnp.array, tree)
  return TrainState(step=jnp.zeros((), jnp.int32), params=copy(master), ema=copy(master),
                    opt_state=optimizer.transform.init(master))


def state_shardings(state: TrainState, mesh) -> TrainState:
  """NamedShardings of a state (or of its shapes): parameters, EMA and moments alike."""
  return parameter_shardings(state, mesh)
