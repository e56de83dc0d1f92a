"""Learning from rewards: the stochastic sampler, its densities, advantages, and the clipped loss."""


import jax
import jax.numpy as jnp
import numpy as np
import pytest

from irg_jax import flow
from irg_jax.rl import objective, sampler

TIMES = flow.schedule(20, 3.0)
STEPS = [(0, 1), (1, 2), (7, 8), (17, 18), (18, 19)]  # the first is at t = 1, the last ends at 0


@pytest.fixture(autouse=True)
def double():
  with jax.enable_x64(True):
    yield


@pytest.mark.parametrize("step", STEPS)
def test_densities_of_a_step_integrate_to_one(step):
  t, t_next = (np.float64(TIMES[i]) for i in step)
  mean, std = sampler.moments(0.7, -1.3, t, t_next, 0.8)
  x = jnp.linspace(mean - 9 * std, mean + 9 * std, 20_001)
  mass = jnp.trapezoid(jnp.exp(sampler.log_density(x, mean, std)), x)
  assert abs(float(mass) - 1) < 1e-9


@pytest.mark.parametrize("step", STEPS)
def test_without_noise_it_is_the_euler_step(step):
  t, t_next = (np.float64(TIMES[i]) for i in step)
  x, v, noise = np.random.default_rng(0).standard_normal((3, 4, 5))
  got = sampler.step(x, v, t, t_next, 0.0, noise)
  np.testing.assert_allclose(got, x - v * (t - t_next), rtol=1e-15, atol=1e-15)


def test_at_time_one_the_noise_is_that_of_the_next_time():
  assert float(sampler.sigma(1.0, 0.9, 0.7)) == pytest.approx(0.7 * np.sqrt(1 / 0.1))
  assert float(sampler.sigma(0.9, 0.8, 0.7)) == pytest.approx(0.7 * np.sqrt(0.9 / 0.1))


def test_a_step_has_the_drift_of_its_equation():
  t, t_next, a, x, v = 0.6, 0.55, 1.3, 0.4, -2.0
  s2, dt = a * a * t / (1 - t), t_next - t
  mean, std = sampler.moments(x, v, t, t_next, a)
  wanted = x * (1 + s2 / (2 * t) * dt) + v * (1 + s2 * (1 - t) / (2 * t)) * dt
  assert float(mean) == pytest.approx(wanted, rel=1e-12)
  assert float(std) == pytest.approx(np.sqrt(s2 * -dt), rel=1e-12)


def test_noise_keeps_the_distribution_at_every_time():
  # x_0 ~ N(1, 0.5^2): the velocity is known, and so is the distribution at every time.
  times, rng = np.linspace(1, 0, 801)[:-1], np.random.default_rng(0)
  x = rng.standard_normal(40_000)
  for t, t_next in zip(times, times[1:]):
    mean, var = 1 - t, (0.5 * (1 - t))**2 + t * t
    # E[e | x] - E[x_0 | x]
    v = (t - 0.25 * (1 - t)) / var * (x - mean) - 1
    x = np.asarray(sampler.step(x, v, t, t_next, 0.7, rng.standard_normal(len(x))))
  assert abs(x.mean() - 1) < 0.02
  assert abs(x.std() - 0.5) < 0.02


@pytest.mark.parametrize("step", STEPS)
def test_the_divergence_of_two_steps_is_that_of_their_normal_distributions(step):
  t, t_next = (np.float64(TIMES[i]) for i in step)
  (mean, std), (other, _) = (sampler.moments(0.3, v, t, t_next, 0.9) for v in (0.5, -0.2))
  wanted = (mean - other)**2 / (2 * std**2)
  assert float(sampler.divergence_scale(t, t_next, 0.9) * 0.7**2) == pytest.approx(
      float(wanted), rel=1e-9)


# --- advantages


def test_advantages_are_those_of_a_group():
  got = objective.advantages([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5]], 5.0)
  np.testing.assert_allclose(got, [[0.9998, -0.9998, -0.9998, 0.9998], [0, 0, 0, 0]], atol=1e-7)


def test_advantages_are_clipped():
  rewards = np.zeros(100)
  rewards[0] = 1
  assert objective.advantages(rewards, 3.0)[0] == 3.0


def test_a_round_that_was_not_drawn_has_no_advantage_and_counts_for_nothing():
  got = objective.advantages([1.0, np.nan, 0.0], 5.0)
  np.testing.assert_allclose(got, objective.advantages([1.0, 0.0], 5.0)[[0, 0, 1]] * [1, 0, 1])
  assert not objective.advantages([np.nan, np.nan], 5.0).any()


def test_rounds_have_advantages_of_their_own():
  rewards = np.array([[1.0, 0.0], [0.0, 1.0]])  # [rounds, G]
  got = objective.advantages(rewards, 5.0)
  assert (np.sign(got) == [[1, -1], [-1, 1]]).all()


def test_a_round_is_worth_its_reward_and_a_share_of_the_next_rounds():
  got = objective.discounted([[1.0, 0.5, 2.0], [1.0, 0.5, np.nan]], 0.5)
  np.testing.assert_allclose(got[0], [1 + 0.5 * (0.5 + 1.0), 0.5 + 1.0, 2.0])
  np.testing.assert_allclose(got[1, :2], [1.25, 0.5])


# --- loss


@pytest.mark.parametrize("advantage, ratio, wanted", [
    (1.0, 1.0, -1.0), (1.0, 1.5, -1.2), (1.0, 0.5, -0.5), (-1.0, 1.5, 1.5), (-1.0, 0.5, 0.8)])
def test_the_loss_is_clipped_where_a_ratio_went_further_than_it_should(advantage, ratio, wanted):
  got = objective.clipped_loss(np.log(ratio), advantage, 0.2)
  assert float(got) == pytest.approx(wanted)


def test_the_gradient_over_tokens_is_that_of_the_expected_reward():
  # Every action once, weighted by the probability with which it is sampled.
  rewards, logits = jnp.array([0.3, 1.0, -0.5]), jnp.array([0.2, -0.4, 0.1])
  old = jax.nn.log_softmax(logits)
  expected = lambda logits: jnp.sum(jax.nn.softmax(logits) * rewards)
  loss = lambda logits: jnp.sum(jnp.exp(old) * objective.clipped_loss(
      jax.nn.log_softmax(logits) - old, rewards - expected(old), 0.2))
  got, h = jax.grad(loss)(logits), 1e-5
  for i in range(3):
    ahead, behind = (expected(logits.at[i].add(d)) for d in (h, -h))
    assert float(-got[i]) == pytest.approx(float(ahead - behind) / (2 * h), abs=1e-9)


def test_the_gradient_over_images_is_that_of_the_expected_reward():
  # A velocity of two parameters, two stochastic steps of one number, a reward of the last one.
  t, a, h = np.array([0.9, 0.7, 0.4]), 0.8, 1e-5
  velocity = lambda theta, x, t: theta[0] * x + theta[1] * t
  reward = lambda x: jnp.sin(2 * x) + x
  grid = jnp.linspace(-6, 6, 801)
  weight = grid[1] - grid[0]

  def densities(theta):
    """Log-densities of the first step from x = 0.5 [S], and of the second from each [S, S]."""
    first = sampler.log_density(grid, *sampler.moments(0.5, velocity(theta, 0.5, t[0]), *t[:2], a))
    mean, std = sampler.moments(grid, velocity(theta, grid, t[1]), *t[1:], a)
    return first, sampler.log_density(grid[None], mean[:, None], std)

  def expected(theta):
    first, second = densities(theta)
    return jnp.sum(jnp.exp(first[:, None] + second) * reward(grid)) * weight**2

  theta = jnp.array([0.4, -0.3])
  old = densities(theta)
  sampled = jnp.exp(old[0][:, None] + old[1]) * weight**2
  worth = reward(grid)[None] - expected(theta)

  def loss(theta):
    ratios = (new - before for new, before in zip(densities(theta), old))
    first, second = (r[:, None] if r.ndim == 1 else r for r in ratios)
    return sum(jnp.sum(sampled * objective.clipped_loss(r, worth, 0.2)) for r in (first, second))

  got = jax.grad(loss)(theta)
  for i in range(2):
    ahead, behind = (expected(theta.at[i].add(d)) for d in (h, -h))
    assert float(-got[i]) == pytest.approx(float(ahead - behind) / (2 * h), rel=1e-5)


def test_the_divergence_of_tokens_is_unbiased_and_never_negative():
  p, q = (jax.nn.log_softmax(jnp.array(x)) for x in ([0.1, 1.0, -0.5], [0.4, 0.2, 0.0]))
  each = objective.token_divergence(p, q)
  assert (each >= 0).all()
  wanted = jnp.sum(jnp.exp(p) * (p - q))
  assert float(jnp.sum(jnp.exp(p) * each)) == pytest.approx(float(wanted), rel=1e-12)


def test_values_without_weight_do_not_count_whatever_they_are():
  values, weights = jnp.array([1.0, np.inf, np.nan]), jnp.array([2.0, 0.0, 0.0])
  assert float(objective.weighted_mean(values, weights, 4.0)) == 0.5
  gradient = jax.grad(lambda x: objective.weighted_mean(x, weights, 4.0))(values)
  np.testing.assert_array_equal(gradient, [0.5, 0, 0])
