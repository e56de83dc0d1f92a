"""Token metadata and the attention mask (docs/spec.md, section 3).

Whether a query may look at a key is a pure function of four integers that every token carries
(`Tokens`). `allowed` is the only place where the rule is written: the dense, blockwise and kernel
forms of attention call it on the pieces that they hold, so no mask of a whole row needs to exist
and the order of tokens in memory does not matter.
"""

import dataclasses

import jax

# Kinds of split.
CAUSAL, FULL, NOISE = 0, 1, 2

PADDING = -1  # the `sample` of a token that is not there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
  """What the mask needs to know of each token; int32 arrays of one shape [..., T].

  Attributes:
    sample: tokens see each other only within a sample; PADDING sees and is seen by nothing.
    index: order within the sample. "Causal" goes by index, never by rotary position.
    split: number of the split (one text, one image) within the sample.
    kind: CAUSAL, FULL or NOISE, the same for all tokens of a split.
  """

  sample: jax.Array
  index: jax.Array
  split: jax.Array
  kind: jax.Array


def allowed(query: Tokens, key: Tokens):
  """The mask: bool [..., Tq, Tk], true where the query may look at the key.

  allowed = same sample and (key is not later, or both are in one FULL or NOISE split)
            and not (key is in a NOISE split that is not the query's)

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
