"""A stochastic step of the rectified flow, and its log-probability. Pure functions.

With x_t = (1 - t) x_0 + t e and v = e - x_0, time falls from 1 to 0: dt = t_next - t < 0, and an
Euler step is x + v dt. The stochastic step adds noise, and takes it back on average, so that x_t
keeps its distribution at every time (Flow-GRPO, arXiv:2505.05470):

    sigma = a sqrt(t / (1 - t))                   at t = 1, t_next stands in the denominator
    mean  = x (1 + sigma^2 / (2 t) dt) + v (1 + sigma^2 (1 - t) / (2 t)) dt
    x'    = mean + sigma sqrt(-dt) xi             xi standard normal

With a = 0 it is the Euler step. Times broadcast against x.
"""

import jax.numpy as jnp

_LOG_TWO_PI = 1.8378770664093453


def sigma(t, t_next, a):
  """Noise level of a step from time t > 0 to t_next < t."""
  return a * jnp.sqrt(t / (1 - jnp.where(t < 1, t, t_next)))


def moments(x, v, t, t_next, a):
  """Mean, of the shape of x, and standard deviation, of that of t, of x after a step."""
  dt, half = t_next - t, sigma(t, t_next, a) ** 2 / (2 * t)
  mean = x * (1 + half * dt) + v * (1 + half * (1 - t)) * dt
  return mean, sigma(t, t_next, a) * jnp.sqrt(-dt)


def step(x, v, t, t_next, a, noise):
  """x after a stochastic step; `noise` is standard normal, of the shape of x."""
  mean, std = moments(x, v, t, t_next, a)
  return mean + std * noise


def log_density(x, mean, std):
  """Log-density of each number of x under a normal distribution."""
  return -0.5 * ((x - mean) / std) ** 2 - jnp.log(std) - 0.5 * _LOG_TWO_PI


def divergence_scale(t, t_next, a):
  """The factor s with which s (v - v')^2 is the divergence of two steps with velocities v and v'.

  Both have the same standard deviation, so it is (mean - mean')^2 / (2 sigma^2 (-dt)).
  """
  dt, half = t_next - t, sigma(t, t_next, a) ** 2 / (2 * t)
  return (1 + half * (1 - t)) ** 2 * -dt / (2 * sigma(t, t_next, a) ** 2)
