"""Reading weights in a bucket by several hosts: bytes read and memory needed."""

import json
import math
import socket
import subprocess
import sys
import zlib

import bucket_server
import numpy as np
import pytest
import train_runs
from bucket_server import bucket

from irg_jax import config, sharding, storage, weights
from irg_jax.weights import init, names

pytestmark = bucket_server.needed

# Loads a checkpoint as one of several processes; prints sums of its shards, and memory.
WORKER = """
import json, pathlib, sys, threading, zlib
import jax, numpy as np
address, count, index, folder, mesh = sys.argv[1:]
if int(count) > 1:
  jax.distributed.initialize(address, int(count), int(index))
from irg_jax import sharding, weights
mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | json.loads(mesh))
place = lambda tree: sharding.parameter_shardings(tree, mesh)
weights.read_config(folder)
held = lambda: int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096
peak, done = [0], threading.Event()
def watch():
  while not done.wait(0.005):
    peak[0] = max(peak[0], held())
threading.Thread(target=watch, daemon=True).start()
before = held()
_, params = weights.load_checkpoint(folder, shardings_fn=place)
done.set()
sums = {}
for path, x in jax.tree.leaves_with_path(params):
  sums[jax.tree_util.keystr(path, simple=True, separator="/")] = [
      [[s.indices(n)[:2] for s, n in zip(shard.index, x.shape)],
       zlib.crc32(np.asarray(shard.data).tobytes())] for shard in x.addressable_shards]
size = sum(s.data.nbytes for x in jax.tree.leaves(params) for s in x.addressable_shards)
print(json.dumps({"sums": sums, "raised": peak[0] - before, "arrays": size}))
"""


def load(folder, shape, processes, devices):
  """The output of each process."""
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{s.getsockname()[1]}"
  workers = [subprocess.Popen(
      [sys.executable, "-c", WORKER, address, str(processes), str(i), str(folder),
       json.dumps(shape)], env=train_runs.environment("/nowhere", devices) | {
           "JAX_ENABLE_COMPILATION_CACHE": "false"},
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(processes)]
  found = [worker.communicate() for worker in workers]
  assert not any(worker.returncode for worker in workers), found
  return [json.loads(out.splitlines()[-1]) for out, _ in found]


def copy(folder, name):
  there = storage.path(f"gs://{bucket_server.BUCKET}/{name}")
  for path in folder.iterdir():
    (there / path.name).upload(path)
  return there


def limit(folder, shape) -> float:
  """Bytes of ema.safetensors that two processes may read: those of split tensors, and 10 % of
  them, and twice what both need: other tensors, tables of positions, and headers.
  """
  path = folder / "ema.safetensors"
  tree = names.abstract_params(weights.read_config(folder), np.float32)
  mesh = sharding.make_mesh(dict.fromkeys(sharding.MESH_AXES, 1) | shape)
  placed = names.flatten(sharding.parameter_shardings(tree, mesh))
  split = sum(4 * math.prod(x.shape) for name, x in names.flatten(tree).items()
              if name.startswith("transformer") and placed[name].shard_shape(x.shape) != x.shape)
  header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
  return 1.1 * split + 2 * (path.stat().st_size - header - split) + 2 * 4 * header


@pytest.mark.parametrize("shape", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}])
def test_two_processes_read_each_byte_of_a_split_tensor_once(bucket, tmp_path, shape):
  init.write_random_checkpoint(tmp_path / "tiny", config.read_model("configs/tiny.py", []), 0)
  there = copy(tmp_path / "tiny", f"two{len(shape)}")
  bucket.read.clear()
  found = load(there, shape, 2, 4)
  assert bucket.read[f"{there.name}/ema.safetensors"] <= limit(tmp_path / "tiny", shape)
  _, params = weights.load_checkpoint(tmp_path / "tiny")
  for name, x in names.flatten(params).items():
    for bounds, checksum in found[0]["sums"][name] + found[1]["sums"][name]:
      part = np.asarray(x)[tuple(slice(*b) for b in bounds)]
      assert zlib.crc32(part.tobytes()) == checksum, name


@pytest.mark.long
def test_a_checkpoint_of_a_gigabyte_raises_the_peak_by_little_more_than_its_arrays(
    bucket, tmp_path):
  sizes = {"llm.hidden_size": 1024, "llm.mlp_size": 4096, "llm.num_layers": 8, "llm.num_heads": 8}
  model = config.read_model("configs/tiny.py", [f"model.{k}={v}" for k, v in sizes.items()])
  init.write_random_checkpoint(tmp_path / "large", model, 0)
  there = copy(tmp_path / "large", "large")
  bucket.read.clear()
  found, = load(there, {"fsdp": 8}, 1, 8)
  print(found["raised"] / found["arrays"], found["arrays"])
  assert found["arrays"] > 1e9 and found["raised"] <= 1.2 * found["arrays"]
  size = (tmp_path / "large" / "ema.safetensors").stat().st_size
  assert bucket.read["large/ema.safetensors"] <= 1.02 * size
  bucket.read.clear()
  load(there, {"fsdp": 8}, 2, 4)
  print(bucket.read["large/ema.safetensors"] / size)
  allowed = limit(tmp_path / "large", {"fsdp": 8})
  assert bucket.read["large/ema.safetensors"] <= allowed < 1.15 * size
