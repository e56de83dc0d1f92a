"""The compiled loop over tokens."""

import re

import jax
import jax.numpy as jnp
import pytest

from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.generate import steps
from irg_jax.generate.context import new_context
from irg_jax.generate.settings import Sampling
from irg_jax.model.kernels import cpu
from irg_jax.model.unified import UnifiedTransformer
from irg_jax.weights.names import abstract_params

ROWS, SLOTS, TOKENS = 2, 512, 90
SPECIAL = SpecialTokens()
MODEL = ModelConfig(
    llm=LlmConfig(vocab_size=260, hidden_size=32, mlp_size=32, num_layers=3, num_heads=4,
                  num_kv_heads=2),
    vit=VitConfig(grid_size=8), vae=VaeConfig(), max_latent_size=8)


def copies():
  """Operations of the loop over tokens that make a copy of a layer of the draft, or of more."""
  ctx, draft = jax.eval_shape(lambda: (new_context(MODEL, ROWS, SLOTS),
                                       steps.new_draft(MODEL, ROWS, TOKENS, SPECIAL)))
  params = abstract_params(MODEL, jnp.float32)["transformer"]
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), ROWS))
  program = jax.jit(steps.think.__wrapped__, static_argnames=("model", "special"),
                    donate_argnames=("draft",)).lower(
      UnifiedTransformer(MODEL), params, ctx, draft, keys, jnp.int32(TOKENS), sampling=Sampling(),
      special=SPECIAL).compile()
  shape = rf"f32\[[\d,]*{ROWS},{MODEL.llm.num_kv_heads},{TOKENS},{MODEL.llm.head_dim}\]"
  made = re.findall(rf"%(\S+) = {shape}\S* (?:fusion|copy|slice|concatenate)\(",
                    program.as_text())
  return [name for name in made if "update-slice" not in name]


def test_a_token_copies_no_keys_and_values_of_the_draft():
  """They are written in place. On a CPU, copies took most of the time of many rows."""
  assert not copies()


@pytest.mark.parametrize("name, without", [
    ("layers", lambda x_L: [x_L]), ("after", lambda index, token_B: index)])
def test_each_of_its_two_means_is_needed(name, without, monkeypatch):
  """Should XLA no longer need one, remove it."""
  monkeypatch.setattr(cpu, name, without)
  jax.clear_caches()
  assert copies()
