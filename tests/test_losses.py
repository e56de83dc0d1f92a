"""The losses with a stand-in for the model: targets, weights, and the divisors of the means."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax import flow
from irg_jax.config import LlmConfig, ModelConfig, SpecialTokens, VaeConfig, VitConfig
from irg_jax.data.batch import BufferSizes, pack_row, stack_rows
from irg_jax.data.records import MODES
from irg_jax.data.samples import ImageSplit, TextSplit, sample_features
from irg_jax.train.loss import loss_sums, mean_losses, token_losses

VOCAB = 12
CONFIG = ModelConfig(
    llm=LlmConfig(vocab_size=VOCAB), vit=VitConfig(patch_size=1, grid_size=5),
    vae=VaeConfig(z_channels=3), max_latent_size=4, latent_patch_size=1)
SPECIAL = SpecialTokens(text_start=8, text_end=9, image_start=10, image_end=11)


class StandIn:
  """A model whose `apply` returns given outputs and stores its inputs.

  Its hidden states are its logits: the text head is the identity.
  """

  def __init__(self, logits, velocity):
    self._answer = logits, velocity
    self.most_logits = 0

  def apply(self, variables, *args, method="__call__"):
    if method == "text_logits":
      self.most_logits = max(self.most_logits, args[0].shape[1])
      return args[0]
    _, self.latents, self.timestep = args
    return self._answer


@pytest.fixture
def batch():
  """Two rows: 2 text and 4 latent targets in the first, 4 text and none in the second."""
  rng = np.random.default_rng(0)
  image = ImageSplit(rng.standard_normal((2, 2, 3)), None, need_loss=True, need_vae=True)
  rows = [[TextSplit([1, 2]), TextSplit([3], need_loss=True), image],
          [TextSplit([4, 5, 6], need_loss=True), dataclasses.replace(image, need_loss=False)]]
  sizes = BufferSizes(und=13, gen=9, vit=0, text=6, samples=2)
  features = [sample_features(r, CONFIG, SPECIAL, mode=m) for m, r in zip((2, 5), rows)]
  return stack_rows([pack_row([f], sizes) for f in features])


@pytest.fixture
def samples(batch):
  """(timestep, noise) of the batch."""
  rng = np.random.default_rng(1)
  t = rng.uniform(0.1, 0.9, batch.latent_weight.shape) * (batch.latent_weight > 0)
  return t.astype(np.float32), rng.standard_normal(batch.latents.shape, np.float32)


def random_answer(batch, seed=2):
  rng = np.random.default_rng(seed)
  return (rng.standard_normal((*batch.text_ids.shape, VOCAB), np.float32),
          rng.standard_normal(batch.latents.shape, np.float32))


def losses(answer, batch, samples, **kwargs):
  return token_losses(StandIn(*answer), {}, batch, *samples, **kwargs)


def means(answer, batch, samples):
  """ce and mse as floats."""
  got = mean_losses(loss_sums(*losses(answer, batch, samples), batch))
  return {name: float(got[name]) for name in ("ce", "mse")}


def test_interpolation_goes_from_image_to_noise_with_the_target_as_its_velocity():
  latents, noise = np.random.default_rng(0).standard_normal((2, 4, 3), np.float32)
  np.testing.assert_array_equal(flow.interpolate(latents, noise, 0.0), latents)
  np.testing.assert_array_equal(flow.interpolate(latents, noise, 1.0), noise)
  _, slope = jax.jvp(lambda t: flow.interpolate(latents, noise, t), (0.3,), (1.0,))
  np.testing.assert_allclose(slope, noise - latents, rtol=1e-6)


def test_model_sees_targets_noised_and_conditions_clean(batch, samples):
  model = StandIn(*random_answer(batch))
  token_losses(model, {}, batch, *samples)
  t, noise = samples
  target = batch.latent_weight > 0
  np.testing.assert_array_equal(model.latents[~target], batch.latents[~target])
  want = (1 - t[..., None]) * batch.latents + t[..., None] * noise
  np.testing.assert_allclose(model.latents[target], want[target], rtol=1e-6)
  np.testing.assert_array_equal(model.timestep, t)


def test_velocity_target_is_noise_minus_image(batch, samples):
  logits, _ = random_answer(batch)
  right = samples[1] - batch.latents
  _, error = losses((logits, right), batch, samples)
  assert not np.asarray(error).any()
  _, error = losses((logits, right + np.array([0.0, 1.0, 2.0])), batch, samples)
  np.testing.assert_allclose(error, batch.latent_weight * 5 / 3, rtol=1e-5)  # mean over channels


def test_cross_entropy_is_that_of_the_next_token(batch, samples):
  logits, velocity = random_answer(batch)
  ce, _ = losses((logits, velocity), batch, samples)
  text = [[SPECIAL.text_start, 1, 2, 9, SPECIAL.text_start, 3, 9], [8, 4, 5, 6, 9]]
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  for row, start, end in ((0, 4, 6), (1, 0, 4)):
    want = [-np.log(probability[row, i, text[row][i + 1]]) for i in range(start, end)]
    np.testing.assert_allclose(ce[row, :end - start], want, rtol=1e-5)
    assert not np.asarray(ce[row, end - start:]).any()


@pytest.mark.parametrize("chunk", [1, 2, 4, 5])
def test_logits_exist_for_one_chunk_at_most_and_chunks_change_no_loss(batch, samples, chunk):
  most = {}

  def summed(answer, chunk):
    model = StandIn(*answer)
    ce, _ = token_losses(model, {}, batch, *samples, text_chunk=chunk)
    most[chunk] = model.most_logits
    return jnp.sum(ce * batch.text_weight)

  answer = tuple(map(jnp.asarray, random_answer(batch)))
  want, want_gradient = jax.value_and_grad(summed)(answer, 6)
  got, gradient = jax.value_and_grad(summed)(answer, chunk)
  assert most[6] == 6 and 0 < most[chunk] <= chunk
  np.testing.assert_allclose(got, want, rtol=1e-6)
  np.testing.assert_allclose(gradient[0], want_gradient[0], rtol=1e-5, atol=1e-7)


def numbered_losses(batch):
  """Two text targets in the first row, four in the second; four latents in the first."""
  ce = np.zeros(batch.text_weight.shape, np.float32)
  ce[batch.text_weight > 0] = [1, 2, 3, 4, 5, 9]
  error = np.zeros(batch.latent_weight.shape, np.float32)
  error[batch.latent_weight > 0] = [2, 4, 6, 8]
  return ce, error


def test_means_are_over_all_targets_of_the_batch_not_row_by_row(batch):
  got = mean_losses(loss_sums(*numbered_losses(batch), batch))
  assert (float(got["ce"]), float(got["mse"])) == (4.0, 5.0)


def test_losses_are_also_measured_mode_by_mode(batch):
  got = mean_losses(loss_sums(*numbered_losses(batch), batch))
  want = {("ce", 2): (1.5, 2), ("ce", 5): (21 / 4, 4), ("mse", 2): (5.0, 4)}
  for loss in ("ce", "mse"):
    for number, mode in enumerate(MODES):
      mean, weight = want.get((loss, number), (0.0, 0))
      assert float(got[f"{loss}/{mode}"]) == mean, (loss, mode)
      assert float(got[f"weight/{loss}/{mode}"]) == weight, (loss, mode)


def test_weights_of_texts_count_in_the_mean(batch):
  ce, error = numbered_losses(batch)
  weight = batch.text_weight * np.array([[3.0], [0.5]], np.float32)
  got = mean_losses(loss_sums(ce, error, dataclasses.replace(batch, text_weight=weight)))
  np.testing.assert_allclose(got["ce"], (3 * 3 + 21 / 2) / (6 + 2), rtol=1e-6)


def test_tokens_without_a_loss_contribute_nothing(batch, samples):
  answer, other = random_answer(batch), random_answer(batch, seed=3)
  predicted = np.zeros(batch.text_ids.shape, np.float32)
  rows = np.arange(len(predicted))[:, None]
  np.maximum.at(predicted, (rows, batch.text_place), batch.text_weight)
  assert predicted.sum() == batch.text_weight.sum() == 6
  weights = predicted, batch.latent_weight
  mixed = [np.where(w[..., None] > 0, a, 100 * o) for w, a, o in zip(weights, answer, other)]
  assert means(answer, batch, samples) == means(mixed, batch, samples)

  def loss(answer):
    sums = loss_sums(*losses(answer, batch, samples), batch)
    return sums["ce"] + sums["mse"]

  for gradient, weight in zip(jax.grad(loss)(tuple(jnp.asarray(x) for x in answer)), weights):
    reached = np.asarray(gradient).any(-1)
    np.testing.assert_array_equal(reached, weight > 0)


def test_batch_without_targets_of_a_kind_has_zero_loss_of_it(batch, samples):
  none = dataclasses.replace(batch, text_weight=0 * batch.text_weight,
                             latent_weight=0 * batch.latent_weight)
  assert means(random_answer(batch), none, samples) == {"ce": 0.0, "mse": 0.0}
