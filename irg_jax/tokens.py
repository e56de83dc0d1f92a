"""Token metadata, the attention mask (docs/spec.md, section 3) and the legend of dimensions.

Whether a query may see a key is a pure function of four integers that every token carries
(`Tokens`). `allowed` is the only implementation of the rule. The dense, blockwise and kernel
forms of attention call it on the tokens that they hold, so the mask of a whole row is never
needed and the order of tokens in memory is free.

Dimensions. An array's name ends in its axes: `x_BTD` is [B, T, D]. Where leading axes are free,
the suffix names the trailing ones. Fields of dataclasses have their axes in the docstring
instead, since layers, rows or accumulated batches may be stacked in front of them.

  A  batches accumulated into one update
  B  rows of a batch: one conversation, or several packed training samples
  C  channels of a pixel, of a latent token or of a flattened patch
  D  model width
  E  text positions of a row whose next token is predicted
  F  MLP width
  G  tokens of the gen buffer (VAE latents)
  H  head dimension
  I  samples of a packed row
  J  query heads that share one key-value head, N = K * J
  K  key-value heads
  L  layers
  M  points of the flow schedule
  N  query heads
  P  patches: ViT patches of a row, or latent tokens of an image
  R  query rows, R = B * W
  S  keys of a row, for example the slots of the KV cache
  T  tokens of a row (queries), T = U + G where both buffers run
  U  tokens of the und buffer (text, special and ViT tokens)
  V  vocabulary
  W  views of the context: full, no text, no image
  X  columns of an image or of its grid of latents or patches
  Y  rows of the same
  Z  blocks that a long axis is cut into
"""

import dataclasses

import jax

# Kinds of split.
CAUSAL, FULL, NOISE = 0, 1, 2

PADDING = -1  # `Tokens.sample` of padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """Metadata of tokens, as the mask needs it: int32 arrays of one shape [..., T].

  Attributes:
    sample: number of the sample. Tokens of different samples never see each other; PADDING
      sees nothing and is seen by nothing.
    index: order within the sample. Causality goes by the index, not by the rotary position.
    split: number of the split (one text or one image) within the sample.
    kind: CAUSAL, FULL or NOISE, the same for all tokens of a split.
  """

  sample: jax.Array
  index: jax.Array
  split: jax.Array
  kind: jax.Array


def allowed(query: Tokens, key: Tokens):
  """The attention mask: bool [..., T, S], true where the query may see the key.

  allowed = same sample and (key is not later, or both are in the same FULL or NOISE split)
            and not (key is in a NOISE split other than the query's)

  Worked example, one sample: text `a b` (CAUSAL), a condition image `p q` (FULL), a noised
  image `x y` (NOISE), text `c` (CAUSAL). Rows are queries:

        a b p q x y c
      a 1 . . . . . .     text is causal
      b 1 1 . . . . .
      p 1 1 1 1 . . .     an image sees all of itself and everything before it
      q 1 1 1 1 . . .
      x 1 1 1 1 1 1 .     so does a noised image
      y 1 1 1 1 1 1 .
      c 1 1 1 1 . . 1     but nobody else sees a noised image

  Second example, two samples `a b` and `c` and a padding token `_` in one row:

        a b c _
      a 1 . . .
      b 1 1 . .
      c . . 1 .           samples never see each other
      _ . . . .           padding sees nothing and is seen by nothing
  """
  q = jax.tree.map(lambda x: x[..., :, None], query)
  k = jax.tree.map(lambda x: x[..., None, :], key)
  same_sample = (q.sample == k.sample) & (k.sample != PADDING)
  same_split = q.split == k.split
  visible = (k.index <= q.index) | (same_split & (k.kind != CAUSAL))
  return same_sample & visible & (same_split | (k.kind != NOISE))
