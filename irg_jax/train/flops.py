"""FLOPs that training needs, counted on paper; 2 for a multiplication with its addition.

Matrix products and attention only, each once: what a recomputed layer costs again is not
needed, and so is not counted. A backward pass needs twice what its forward pass does.
"""

from irg_jax.config import ModelConfig
from irg_jax.data.batch import BufferSizes
from irg_jax.weights.names import TIMESTEP_FEATURES

FORWARD_AND_BACKWARD = 3

BUFFERS = ("und", "gen", "vit", "text")
# What a row may use a share of: its buffers; the pairs of its tokens, and of its patches in the
# ViT, that see each other.
USES = (*BUFFERS, "pairs", "vit_pairs")


def token_flops(config: ModelConfig) -> dict[str, float]:
  """Matrix products of one forward pass, for one token of each buffer; no attention.

  Returns:
    dict by buffer as in `BufferSizes`: "und", "gen", "vit", and "text" (a predicted position).
  """
  llm, vit = config.llm, config.vit
  width = llm.hidden_size
  keys = llm.num_kv_heads * llm.head_dim
  layer = width * (2 * width + 2 * keys + 3 * llm.mlp_size)  # q and o, k and v, the gated MLP
  time = TIMESTEP_FEATURES * width + width**2
  vit_layer = vit.hidden_size * (4 * vit.hidden_size + 2 * vit.mlp_size)
  return {
      "und": 2.0 * llm.num_layers * layer,
      "gen": 2.0 * (llm.num_layers * layer + 2 * config.latent_dim * width + time),
      "vit": 2.0 * (vit.num_layers * vit_layer + 3 * vit.patch_size**2 * vit.hidden_size
                    + vit.hidden_size * width + width**2),
      "text": 2.0 * width * llm.vocab_size,
  }


def attention_flops(config: ModelConfig, sizes: BufferSizes) -> dict[str, float]:
  """Attention of one forward pass over one row, every token with every other of the row.

  Returns:
    dict: "decoder" and "vit".
  """
  llm, vit = config.llm, config.vit
  pairs = (sizes.und + sizes.gen) ** 2
  return {"decoder": 4.0 * llm.num_layers * llm.hidden_size * pairs,
          "vit": 4.0 * vit.num_layers * vit.hidden_size * sizes.vit**2}


def row_flops(config: ModelConfig, sizes: BufferSizes, used: dict | None = None) -> float:
  """What one update needs for one row, forward and backward.

  Args:
    used: shares by the names of `USES`; None counts full buffers and all pairs. Without
      shares of pairs each token that is there counts as seeing the whole row.
  """
  share = dict.fromkeys(BUFFERS, 1.0) | (used or {})
  total = sum(getattr(sizes, name) * share[name] * flops
              for name, flops in token_flops(config).items())
  attention = attention_flops(config, sizes)
  asking = (sizes.und * share["und"] + sizes.gen * share["gen"]) / max(sizes.und + sizes.gen, 1)
  total += attention["decoder"] * share.get("pairs", asking)
  total += attention["vit"] * share.get("vit_pairs", share["vit"])
  return FORWARD_AND_BACKWARD * total
