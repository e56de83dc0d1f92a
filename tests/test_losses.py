"""The losses on a stand-in for the model: what counts, and over what the means are taken."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax import flow
from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import pack_row, stack_rows
from irg_jax.data.sequence import PictureSplit, TextSplit, sample_features
from irg_jax.train.loss import mean_losses, token_losses

VOCAB = 12
CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=VOCAB), vit=VitConfig(patch_size=1, grid_size=5),
    vae=VaeConfig(z_channels=3), max_latent_size=4, latent_patch_size=1)
SPECIAL = SpecialTokens(text_start=8, text_end=9, image_start=10, image_end=11)


class StandIn:
  """Has the model's `apply`, answers what it is told to, and remembers its input."""

  def __init__(self, logits, velocity):
    self._answer = logits, velocity

  def apply(self, variables, batch, latents, timestep):
    self.latents, self.timestep = latents, timestep
    return self._answer


@pytest.fixture
def batch():
  """Two rows: 2 text and 4 latent targets in the first, 4 text and none in the second."""
  rng = np.random.default_rng(0)
  picture = PictureSplit(rng.standard_normal((2, 2, 3)), None, need_loss=True, need_vae=True)
  rows = [[TextSplit([1, 2]), TextSplit([3], need_loss=True), picture],
          [TextSplit([4, 5, 6], need_loss=True), dataclasses.replace(picture, need_loss=False)]]
  return stack_rows([pack_row([sample_features(r, CONFIG, SPECIAL)], 13, 9, 0) for r in rows])


@pytest.fixture
def draws(batch):
  """(timestep, noise) of the batch."""
  rng = np.random.default_rng(1)
  t = rng.uniform(0.1, 0.9, batch.latent_weight.shape) * (batch.latent_weight > 0)
  return t.astype(np.float32), rng.standard_normal(batch.latents.shape, np.float32)


def random_answer(batch, seed=2):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((*batch.text_ids.shape, VOCAB), np.float32),
          rng.standard_normal(batch.latents.shape, np.float32))


def losses(answer, batch, draws):
  return token_losses(StandIn(*answer), {}, batch, *draws)


def test_interpolation_goes_from_picture_to_noise_with_the_target_as_its_velocity():
  latents, noise = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32)
  np.testing.assert_array_equal(flow.interpolate(latents, noise, 0.0), latents)
  np.testing.assert_array_equal(flow.interpolate(latents, noise, 1.0), noise)
  _, slope = jax.jvp(lambda t: flow.interpolate(latents, noise, t), (0.3,), (1.0,))
  np.testing.assert_allclose(slope, noise - latents, rtol=1e-6)


def test_model_sees_targets_noised_and_conditions_clean(batch, draws):
  model = StandIn(*random_answer(batch))
  token_losses(model, {}, batch, *draws)
  t, noise = draws
  target = batch.latent_weight > 0
  np.testing.assert_array_equal(model.latents[~target], batch.latents[~target])
  want = (1 - t[..., None]) * batch.latents + t[..., None] * noise
  np.testing.assert_allclose(model.latents[target], want[target], rtol=1e-6)
  np.testing.assert_array_equal(model.timestep, t)


def test_velocity_target_is_noise_minus_picture(batch, draws):
  logits, _ = random_answer(batch)
  right = draws[1] - batch.latents
  _, error = losses((logits, right), batch, draws)
  assert not np.asarray(error).any()
  _, error = losses((logits, right + np.array([0.0, 1.0, 2.0])), batch, draws)
  np.testing.assert_allclose(error, batch.latent_weight * 5 / 3, rtol=1e-5)  # mean over numbers


def test_cross_entropy_is_that_of_the_next_token(batch, draws):
  logits, velocity = random_answer(batch)
  ce, _ = losses((logits, velocity), batch, draws)
  text = [[SPECIAL.text_start, 1, 2, 9, SPECIAL.text_start, 3, 9], [8, 4, 5, 6, 9]]
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for row, start, end in ((0, 4, 6), (1, 0, 4)):
    want = [-np.log(probability[row, i, text[row][i + 1]]) for i in range(start, end)]
    np.testing.assert_allclose(ce[row, start:end], want, rtol=1e-5)
    assert not np.delete(np.asarray(ce[row]), slice(start, end)).any()


def test_means_are_over_all_targets_of_the_batch_not_row_by_row(batch):
  ce = np.zeros(batch.text_weight.shape, np.float32)
  ce[batch.text_weight > 0] = [1, 2, 3, 4, 5, 9]  # two of the first row, four of the second
  error = np.zeros(batch.latent_weight.shape, np.float32)
  error[batch.latent_weight > 0] = [2, 4, 6, 8]
  got = mean_losses(ce, error, batch)
  assert {name: float(x) for name, x in got.items()} == {"ce": 4.0, "mse": 5.0, "loss": 9.0}


def test_tokens_without_a_loss_contribute_nothing(batch, draws):
  answer, other = random_answer(batch), random_answer(batch, seed=3)
  weights = batch.text_weight, batch.latent_weight
  mixed = [np.where(w[..., None] > 0, a, 100 * o) for w, a, o in zip(weights, answer, other)]
  want, got = (mean_losses(*losses(x, batch, draws), batch) for x in (answer, mixed))
  assert want == got
  loss = lambda x: mean_losses(*losses(x, batch, draws), batch)["loss"]
  for gradient, weight in zip(jax.grad(loss)(tuple(jnp.asarray(x) for x in answer)), weights):
    reached = np.asarray(gradient).any(-1)
    np.testing.assert_array_equal(reached, weight > 0)


def test_batch_without_targets_of_a_kind_has_zero_loss_of_it(batch, draws):
  none = dataclasses.replace(batch, text_weight=0 * batch.text_weight,
                             latent_weight=0 * batch.latent_weight)
  got = mean_losses(*losses(random_answer(batch), none, draws), none)
  assert {name: float(x) for name, x in got.items()} == {"ce": 0.0, "mse": 0.0, "loss": 0.0}
