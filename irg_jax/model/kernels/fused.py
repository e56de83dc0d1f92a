"""Attention by the platform's fused kernel: the mask prepared once a step, the mesh, the merge.

`prepare` turns the tokens' metadata into what a kernel takes; it depends on no layer. `attend` runs
the kernel for each source of keys, on each device of a mesh: heads split over `tensor`, queries
over `sequence`, rows over the rest. It merges the sources by their log-sum-exp.
"""

import functools
import importlib
import math

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec

from irg_jax.model.kernels import visible
from irg_jax.model.kernels.blockwise import named
from irg_jax.sharding import attention_specs, partition_spec, platform
from irg_jax.tokens import Tokens


def kernel():
  """The module of the kernel for the platform; a CPU interprets the one for TPUs.

  It is imported here: Pallas takes its time, and most runs on a CPU need none.
  """
  return importlib.import_module(
      f"irg_jax.model.kernels.{'gpu' if platform() == 'gpu' else 'tpu'}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(kernel, q_BWKJTH, k_BKSH, v_BKSH, prepared):
  """Softmax attention by a kernel, differentiable in q, k and v.

  Args:
    kernel: the module, `tpu` or `gpu`.
    prepared: `visible.Prepared`; T and S are multiples of its block sizes, H is as the kernel's
      `head_size` gives it.

  Returns:
    (output [B, W, K, J, T, H] in q's dtype, zeros for queries that see nothing; log-sum-exp
    float32 [B, W, K, J, T], not differentiable).
  """
  return _forward(kernel, q_BWKJTH, k_BKSH, v_BKSH, prepared)[0]


def _forward(kernel, *inputs):
  out, lse = named(*kernel.forward(*inputs))
  return (out, lse), (*inputs, out, lse)


def _backward(kernel, residuals, gradients):
  *inputs, out, lse = residuals
  inner = jnp.sum(gradients[0].astype(jnp.float32) * out.astype(jnp.float32), -1)
  return *kernel.backward(*inputs, gradients[0], lse, inner), None


attention.defvjp(_forward, _backward)


def prepare(query: Tokens, keys: list[Tokens], rows: list[int], group: int,
            head_dim: int) -> list[visible.Prepared]:
  """The mask of each source of keys in the form that the kernel takes.

  Args:
    query: [R, T].
    keys: of each source, [R, S].
    rows: B of each source, see `attention.KeyValues`.
    group: query heads that share a key-value head.
    head_dim: H.
  """
  mesh = jax.sharding.get_abstract_mesh()
  query_R3T, prepared = visible.query_words(query), []
  for tokens, B in zip(keys, rows):
    words = [rearrange(x, "(b w) i t -> b w i t", b=B)
             for x in (query_R3T, visible.key_words(tokens))]
    specs = [partition_spec(x.shape, ("batch", None, None, length), mesh)
             for x, length in zip(words, ("length", None))] if mesh.size > 1 else [()] * 2
    split = _axes(specs[0][3]) if mesh.size > 1 else ()
    _, W, _, T = words[0].shape
    sizes = kernel().block_sizes(T // math.prod(mesh.shape[axis] for axis in split),
                                 words[1].shape[-1], group * W)
    one = lambda q, k, sizes=sizes: visible.prepare(q, k, *sizes, head_dim)
    if mesh.size > 1:
      listed = PartitionSpec(_axes(specs[0][0]) + split)
      one = jax.shard_map(one, in_specs=tuple(specs), out_specs=visible.Prepared(
          *specs, listed, listed, *sizes, head_dim))
    prepared.append(one(*words))
  return prepared


def attend(q_RTNH, kvs, prepared):
  """Attention over all sources (k, v), each [B, K, S, H], as prepared; see `attention.attend`."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.size <= 1:
    return _attend(q_RTNH, kvs, prepared)
  q, kv = attention_specs(q_RTNH, kvs[0][0], mesh)
  listed = PartitionSpec(_axes(q[0]) + _axes(q[1]))
  words = PartitionSpec(q[0], None, None, q[1]), PartitionSpec(q[0])
  specs = [visible.Prepared(*words, listed, listed, p.query_size, p.key_size, p.head_dim)
           for p in prepared]

  # Interpreted kernels know no varying types. Without the check, the transpose sums the gradients
  # of keys over all axes that split only queries.
  return jax.shard_map(_attend, in_specs=(q, kv, specs), out_specs=q, check_vma=False)(
      q_RTNH, kvs, prepared)


def _axes(entry) -> tuple[str, ...]:
  """The mesh axes of one entry of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else entry or ()


def _attend(q_RTNH, kvs, prepared):
  T, H = q_RTNH.shape[1], q_RTNH.shape[3]
  width = kernel().head_size(H)
  parts = []
  for (k_BKSH, v_BKSH), mask in zip(kvs, prepared):
    B, K = k_BKSH.shape[:2]
    q_BWKJTH = rearrange(q_RTNH, "(b w) t (k j) h -> b w k j t h", b=B, k=K)
    k_BKSH, v_BKSH = (_padded(x, mask.key_words.shape[-1], width) for x in (k_BKSH, v_BKSH))
    q_BWKJTH = _padded(q_BWKJTH, mask.query_words.shape[-1], width)
    out, lse = attention(kernel(), q_BWKJTH, k_BKSH, v_BKSH, mask)
    parts.append([rearrange(out, "b w k j t h -> (b w) k j t h"),
                  rearrange(lse, "b w k j t -> (b w) k j t 1")])
  # Padding of the queries differs, as sizes of blocks may.
  parts = [(out[..., :T, :H], lse[..., :T, :]) for out, lse in parts]
  out_RKJTH, lse_RKJT1 = parts[0]
  for other_RKJTH, other_RKJT1 in parts[1:]:
    # A query that sees nothing in a source has the lowest log-sum-exp there, and output 0.
    share_RKJT1 = jax.nn.sigmoid(lse_RKJT1 - other_RKJT1)
    out_RKJTH = (share_RKJT1 * out_RKJTH.astype(jnp.float32)
                 + (1 - share_RKJT1) * other_RKJTH.astype(jnp.float32))
    lse_RKJT1 = jnp.logaddexp(lse_RKJT1, other_RKJT1)
  return rearrange(out_RKJTH.astype(q_RTNH.dtype), "r k j t h -> r t (k j) h")


def _padded(x_TH, length, width):
  """x [..., T, H] with zeros up to whole blocks and the kernel's width."""
  T, H = x_TH.shape[-2:]
  return jnp.pad(x_TH, [(0, 0)] * (x_TH.ndim - 2) + [(0, length - T), (0, width - H)])
