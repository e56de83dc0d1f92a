"""Token sampling: allowed tokens, their frequencies, independence of rows.

Not jitted: the settings are static, and compiling for each would take longer than all samples.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax.generate.steps import next_token
from irg_jax.generate.settings import Sampling

PROBABILITY = np.array([0.05, 0.5, 0.15, 0.3], np.float32)  # likeliest: 1, 3, 2, 0
DRAWS = 4096


def keys(count, seed=0):
  return jax.random.split(jax.random.key(seed), count)


def frequencies(**settings):
  """Frequency of each token in DRAWS samples from PROBABILITY."""
  logits = jnp.broadcast_to(jnp.log(PROBABILITY), (DRAWS, 4))
  drawn = next_token(logits, keys(DRAWS), Sampling(**settings))
  assert drawn.dtype == jnp.int32
  return np.bincount(drawn, minlength=4) / DRAWS


def drawn_set(**settings):
  return set(np.flatnonzero(frequencies(**settings)))


def test_temperature_zero_takes_the_likeliest_whatever_the_key():
  logits = jax.random.normal(jax.random.key(0), (8, 50))
  sampling = Sampling(temperature=0.0)
  want = np.argmax(logits, -1)
  for seed in range(2):
    np.testing.assert_array_equal(next_token(logits, keys(8, seed), sampling), want)


def test_frequencies_follow_the_probabilities():
  np.testing.assert_allclose(frequencies(temperature=1.0), PROBABILITY, atol=0.025)


def test_temperature_sharpens():
  want = PROBABILITY**2 / np.sum(PROBABILITY**2)  # temperature 1/2 doubles the logits
  np.testing.assert_allclose(frequencies(temperature=0.5), want, atol=0.025)


@pytest.mark.parametrize("top_k, kept", [
    (0, {0, 1, 2, 3}), (1, {1}), (2, {1, 3}), (3, {1, 2, 3}), (4, {0, 1, 2, 3}),
    (100, {0, 1, 2, 3})])
def test_top_k_keeps_exactly_the_k_likeliest(top_k, kept):
  assert drawn_set(temperature=1.0, top_k=top_k) == kept


@pytest.mark.parametrize("top_p, kept", [
    (0.01, {1}),  # never empty
    (0.45, {1}),
    (0.55, {1, 3}),  # the token that passes the bound is the last one kept
    (0.75, {1, 3}),
    (0.85, {1, 2, 3}),
    (0.97, {0, 1, 2, 3}),
    (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_exactly_the_likeliest_that_reach_it(top_p, kept):
  assert drawn_set(temperature=1.0, top_p=top_p) == kept


def test_top_p_is_measured_after_temperature_and_top_k():
  # Temperature 2 flattens to .12, .38, .21, .29: two tokens no longer reach .7.
  assert drawn_set(temperature=1.0, top_p=0.7) == {1, 3}
  assert drawn_set(temperature=2.0, top_p=0.7) == {1, 2, 3}
  # Of two tokens, the first has .5 / .8 of the probability.
  assert drawn_set(temperature=1.0, top_p=0.6) == {1, 3}
  assert drawn_set(temperature=1.0, top_p=0.6, top_k=2) == {1}


def test_kept_tokens_keep_their_proportions():
  got = frequencies(temperature=1.0, top_k=2)
  np.testing.assert_allclose(got, [0, 0.625, 0, 0.375], atol=0.025)


@pytest.mark.parametrize("settings", [dict(), dict(top_k=5), dict(top_p=0.7)], ids=str)
def test_what_a_row_draws_depends_on_its_own_key_and_logits_alone(settings):
  logits, rows = jax.random.normal(jax.random.key(1), (6, 50)), keys(6)
  sampling = Sampling(temperature=1.0, **settings)
  together = np.asarray(next_token(logits, rows, sampling))
  assert len(set(together)) > 1
  order = np.array([3, 0, 5, 1, 4, 2])
  np.testing.assert_array_equal(next_token(logits[order], rows[order], sampling),
                                together[order])
  others = logits.at[1:].multiply(-1.0)
  assert next_token(others, rows, sampling)[0] == together[0]
  alone = next_token(logits[:1], rows[:1], sampling)
  np.testing.assert_array_equal(alone, together[:1])
