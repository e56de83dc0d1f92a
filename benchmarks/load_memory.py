"""Host memory of reading a checkpoint, relative to the size of its arrays.

  python benchmarks/load_memory.py
  python benchmarks/load_memory.py --gigabytes 4

Writes random checkpoints of at least so many gigabytes and reads each in a new process: onto one
device, onto 8 virtual devices, with a cast, and from Orbax. Prints the rise of the process's peak
resident size after the start of JAX, divided by the bytes of the arrays. CPU arrays are host
memory, so 1 is the minimum. Exit status 1 if a case is above the bar.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
import tempfile

import numpy as np

from irg_jax import config as config_lib
from irg_jax.weights import convert, names, published

BAR = 1.2
DEVICES = 8


def main():
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--gigabytes", type=float, default=1.0, metavar="X",
                      help="least size of a checkpoint (1.0)")
  parser.add_argument("--folder", type=pathlib.Path, metavar="DIR",
                      help="where to put the checkpoints for the time being")
  parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    print(json.dumps(_measure(*args.measure)))
    return 0
  with tempfile.TemporaryDirectory(dir=args.folder) as folder:
    return _run(pathlib.Path(folder), args.gigabytes * 1e9)


def _run(folder, size):
  _write(folder / "float32", size, np.dtype("float32"))
  _write(folder / "bfloat16", size, np.dtype("bfloat16"))
  convert(folder / "bfloat16", folder / "orbax", to="orbax")
  cases = [("float32", 1, "stored"), ("bfloat16", 1, "stored"), ("float32", 1, "bfloat16"),
           ("float32", DEVICES, "stored"), ("bfloat16", DEVICES, "stored"),
           ("orbax", 1, "stored"), ("orbax", DEVICES, "stored")]
  print(f"{'checkpoint':12}{'devices':>8}  {'dtype':10}{'arrays GB':>10}{'peak GB':>10}"
        f"{'ratio':>8}")
  worst = 0.0
  for name, devices, dtype in cases:
    peak, arrays = _in_fresh_process(folder / name, devices, dtype)
    worst = max(worst, peak / arrays)
    print(f"{name:12}{devices:8}  {dtype:10}{arrays / 1e9:10.3f}{peak / 1e9:10.3f}"
          f"{peak / arrays:8.3f}", flush=True)
  print(f"worst ratio {worst:.3f}, bar {BAR}")
  return int(worst > BAR)


def _write(folder, size, dtype):
  """A checkpoint of finite noise; every parameter repeats the same block."""
  config = _config(size, dtype.itemsize)
  block = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(dtype)
  leaves = {r.path: np.resize(block[:math.prod(r.shape)], r.shape) for r in names.rows(config)}
  published.save(folder, names.unflatten(leaves), config)


def _config(size, itemsize):
  """A model of the fewest layers that make a checkpoint of `size` bytes."""
  for layers in range(1, 1000):
    config = config_lib.ModelConfig(
        llm=config_lib.LlmConfig(vocab_size=32000, hidden_size=1024, mlp_size=4096,
                                 num_layers=layers, num_heads=8, num_kv_heads=2),
        vit=config_lib.VitConfig(hidden_size=512, mlp_size=2048, num_layers=4, num_heads=8),
        vae=config_lib.VaeConfig(ch=64))
    if sum(math.prod(r.shape) for r in names.rows(config)) * itemsize >= size:
      return config
  raise ValueError(f"--gigabytes {size / 1e9} is too much for this benchmark")


def _in_fresh_process(folder, devices, dtype):
  command = [sys.executable, __file__, "--measure", str(folder), str(devices), dtype]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def _measure(folder, devices, dtype):
  """(peak above the baseline, size of the arrays), bytes."""
  import jax
  from irg_jax import sharding, weights
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_num_cpu_devices", int(devices))
  mesh = sharding.make_mesh({"fsdp": int(devices)})
  place = lambda params: sharding.parameter_shardings(params, mesh)
  jax.numpy.zeros(1).block_until_ready()
  before = _status("VmRSS")
  _, params = weights.load_checkpoint(
      folder, dtype=None if dtype == "stored" else dtype,
      shardings_fn=place if int(devices) > 1 else None)
  return _status("VmHWM") - before, _array_bytes(jax.tree.leaves(params))


def _array_bytes(arrays):
  """Bytes of the buffers of `arrays`; devices may share one."""
  shards = [s.data for x in arrays for s in x.addressable_shards]
  return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


def _status(field):
  """Resident bytes of this process: now (VmRSS) or at most so far (VmHWM). Linux only."""
  # Not getrusage: its maximum includes the process that started this one.
  for line in pathlib.Path("/proc/self/status").read_text().splitlines():
    if line.startswith(field + ":"):
      return int(line.split()[1]) * 1024
  raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
  sys.exit(main())
