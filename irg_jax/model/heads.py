"""What is predicted from the decoder's hidden states.

The text head reads the understanding buffer, the velocity head the generation buffer. A
fork that predicts something else adds a line here (and a row for its parameters in
`weights/names.py` and `sharding.py`) and calls it as `model.heads.<name>(hidden)`.
"""

import flax.linen as nn

from irg_jax.config import ModelConfig


class Heads(nn.Module):
  """Linear maps from [..., D].

  text: next-token logits [..., vocab_size].
  velocity: flow-matching velocity of a latent token, [..., latent_dim].
  """

  config: ModelConfig

  def setup(self):
    c = self.config
    dense = lambda features, bias: nn.Dense(
        features, use_bias=bias, dtype=c.dtype, param_dtype=c.param_dtype)
    self.text = dense(c.llm.vocab_size, bias=False)
    self.velocity = dense(c.latent_dim, bias=True)
