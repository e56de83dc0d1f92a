"""Checkpoints of a run: save and restore on any mesh, damaged checkpoints, failed saves."""

import dataclasses
import gc
import json
import os
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import train_runs
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.path import gcs_utils

from irg_jax import sharding
from irg_jax.train import checkpoints
from irg_jax.train.checkpoints import Checkpoints
from irg_jax.weights import orbax
from irg_jax.weights.names import CheckpointError

# Of a read that fails, Orbax leaves the others unawaited.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

@pytest.fixture(autouse=True)
def collect():
  yield
  gc.collect()


DATA = {0: {"next": 7}, 1: {"next": 9, "bins": [[1, 2], []]}}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
  step: jax.Array
  params: dict
  half: jax.Array


def place(shape, **arrays):
  """A state on a mesh of `shape`, the first axis of its arrays split over fsdp."""
  mesh = sharding.make_mesh(shape)
  split = lambda x: NamedSharding(mesh, PartitionSpec(*("fsdp",) * bool(x.ndim)))
  put = lambda x: jax.device_put(x, split(x))
  kernel = jax.random.normal(jax.random.key(0), (64, 64))
  return jax.tree.map(put, State(
      step=jnp.int32(arrays.get("step", 0)), params={"kernel": kernel},
      half=jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16)))


def abstract(state):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def saved(folder, steps, keep=3):
  with Checkpoints(folder, keep) as c:
    for step in steps:
      c.save(step, place({"fsdp": 8}, step=step), DATA)
  return folder


def test_a_state_is_restored_on_another_mesh(tmp_path):
  saved(tmp_path / "run", [3])
  want = place({"data": 2, "fsdp": 2, "tensor": 2}, step=3)
  with Checkpoints(tmp_path / "run", 3) as c:
    step, state, data = c.restore(abstract(want))
  assert step == 3 and data == DATA
  assert_same(state, want)


def test_an_empty_folder_has_no_checkpoint_and_is_no_error(tmp_path):
  with Checkpoints(tmp_path / "run", 3) as c:
    assert c.restore(abstract(place({"fsdp": 8}))) is None
    assert "no good checkpoint" in c.last_good()


def test_only_the_newest_are_kept_and_a_step_is_saved_once(tmp_path):
  saved(tmp_path, [1, 2, 3, 4, 4], keep=2)
  assert checkpoints.steps_in(tmp_path) == [3, 4]


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
  spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
  state = place({"fsdp": 8}, step=1)
  with Checkpoints(tmp_path, 3) as c:
    c.save(1, state, DATA)
    state = spoil(state)
    jax.block_until_ready(state)
    _, found, _ = c.restore(abstract(state))
  assert_same(found, place({"fsdp": 8}, step=1))


def largest_file(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip_a_bit(folder):
  # In the stored numbers, so that lengths and headers stay right.
  path = largest_file(folder / "state")
  content = bytearray(path.read_bytes())
  content[len(content) // 3] ^= 4
  path.write_bytes(content)


def truncate(folder):
  path = largest_file(folder / "state")
  os.truncate(path, path.stat().st_size // 2)


def lose_the_run(folder):
  for path in (folder / "run").iterdir():
    path.unlink()


def change_the_place_in_the_data(folder):
  path = folder / "run" / "metadata"
  path.write_text(path.read_text().replace('"next": 9', '"next": 8'))


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, lose_the_run,
                                    change_the_place_in_the_data])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, damage):
  saved(tmp_path, [5, 6])
  damage(tmp_path / "6")
  lines = []
  with Checkpoints(tmp_path, 3, lines.append) as c:
    step, state, _ = c.restore(abstract(place({"fsdp": 8})))
    assert step == 5
    assert_same(state, place({"fsdp": 8}, step=5))
    c.save(6, state, DATA)  # the damaged folder is out of the way
  assert len(lines) == 1 and str(tmp_path / "6") in lines[0] and "step 5 is used" in lines[0]
  assert checkpoints.steps_in(tmp_path) == [5, 6]
  assert (tmp_path / "damaged" / "6").is_dir()


def test_if_every_checkpoint_is_damaged_none_is_removed(tmp_path):
  saved(tmp_path, [6])
  truncate(tmp_path / "6")
  with Checkpoints(tmp_path, 3) as c:
    with pytest.raises(CheckpointError, match="6 is damaged .* there is no other one"):
      c.restore(abstract(place({"fsdp": 8})))
  assert checkpoints.steps_in(tmp_path) == [6]


@pytest.mark.parametrize("index", [0, 77, 4095])
def test_any_changed_number_changes_the_checksum_whatever_the_mesh(index):
  state = place({"fsdp": 8})
  other = place({"fsdp": 2, "tensor": 4})
  assert checkpoints.checksums(state) == checkpoints.checksums(other)
  other.params["kernel"] = other.params["kernel"].at[index // 64, index % 64].add(1e-3)
  differ = {k for k, v in checkpoints.checksums(other).items()
            if checkpoints.checksums(state)[k] != v}
  assert differ == {"params/kernel"}


def test_swapped_numbers_change_the_checksum():
  x = jnp.asarray([1.0, 2.0, 3.0])
  assert checkpoints.checksums([x]) != checkpoints.checksums([x[::-1]])


FULL = """
    import resource, sys
    import numpy as np
    from irg_jax.train.checkpoints import Checkpoints
    with Checkpoints(sys.argv[1], 3) as c:
      c.save(1, {"x": np.zeros(4, np.float32)}, {})
      c.wait()
      # Limits the size of files: acts like a full disk, for this process only.
      resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
      c.save(2, {"x": np.random.default_rng(0).standard_normal(100000, np.float32)}, {})
"""


def test_a_full_disk_is_named_with_the_last_good_checkpoint(tmp_path):
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path)],
                        capture_output=True, text=True)
  error = done.stderr.strip().splitlines()[-1]
  assert "checkpoint of step 2 cannot be saved" in error and "File too large" in error
  assert f"the last good checkpoint is {tmp_path / '1'}" in error
  assert checkpoints.steps_in(tmp_path) == [1]


# The nth call of a function, and all later ones, fail while step 2 is saved.
SWEEP = """
    import builtins, errno, json, os, re, sys, threading, time
    import numpy as np
    from irg_jax.train.checkpoints import Checkpoints, steps_in
    root, armed = sys.argv[1], None
    state = {f"x{i}": np.full(1000, i, np.float32) for i in range(50)}

    def break_(module, name):
      real, calls = getattr(module, name), [0]
      def broken(*args, **kwargs):
        if armed and armed[0] == name and any(root in str(x) for x in args[:2]):
          calls[0] += 1
          if calls[0] >= armed[1]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
        return real(*args, **kwargs)
      setattr(module, name, broken)
      return calls

    calls = {name: break_(module, name) for module, name in (
        (os, "mkdir"), (os, "rename"), (builtins, "open"))}
    for name, counted in calls.items():
      for nth in range(1, 9):
        folder = f"{root}/{name}{nth}"
        try:
          with Checkpoints(folder, 3) as c:
            c.save(1, state, {0: 1})
            c.wait()
            counted[0], armed, start = 0, (name, nth), time.monotonic()
            c.save(2, state, {0: 2})
            c.wait()
        except ValueError as e:
          error = str(e)
        else:
          error = None
        armed, took = None, time.monotonic() - start
        left = [t for t in threading.enumerate() if t is not threading.main_thread()
                and not t.daemon and not re.match("asyncio_|metadata_store", t.name)  # idle pools
                and t.join(5) is None and t.is_alive()]
        print(json.dumps([name, nth, error, took, len(left)]), flush=True)
        if error is None:
          break
        with Checkpoints(folder, 3) as c:
          assert c.restore(state)[0] == 1 == steps_in(folder)[-1], folder
          c.save(2, state, {0: 2})
        assert steps_in(folder) == [1, 2] and not any("tmp" in p for p in os.listdir(folder))
    print(time.time())
"""


def test_a_save_that_fails_at_any_call_ends_at_once_with_one_line_and_the_start_after_it_is_well(
    tmp_path):
  done = subprocess.run([sys.executable, "-c", textwrap.dedent(SWEEP), str(tmp_path)],
                        capture_output=True, text=True)
  ended = time.time()
  assert done.returncode == 0 and not done.stderr, done.stderr
  *lines, end = map(json.loads, done.stdout.splitlines())
  assert ended - end < 5  # no thread is waited for
  failed = [line for line in lines if line[2]]
  assert {line[0] for line in failed} == {"mkdir", "rename", "open"} and len(failed) >= 9
  for name, nth, error, seconds, threads in failed:
    assert "No space left on device" in error and seconds < 5 and not threads
    assert f"the last good checkpoint is {tmp_path / f'{name}{nth}' / '1'}" in error


# Two processes; the second one (the last argument is 1) cannot read, and later not write.
PAIR = """
    import resource, sys, time
    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from irg_jax import sharding
    from irg_jax.train.checkpoints import Checkpoints
    from irg_jax.train.distributed import fail_together

    folder, _, coordinator, *_, process = sys.argv[1:]
    jax.distributed.initialize(coordinator, 2, int(process))
    split = jax.sharding.NamedSharding(sharding.make_mesh(), jax.sharding.PartitionSpec("fsdp"))
    x = np.random.default_rng(0).standard_normal((64, 1000), np.float32)
    put = lambda y: {"x": jax.make_array_from_callback(x.shape, split, lambda index: y[index])}
    wanted = {"x": jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)}
    with fail_together("pair"), Checkpoints(folder, 3) as c:
      for step in (1, 2):
        c.save(step, put(step * x), {process: step})
      c.wait()
      if process == "1":
        read = ocp.StandardCheckpointHandler.restore
        def restore(self, path, *args, **kwargs):
          if path.parent.name == "2":
            raise OSError("Input/output error")
          return read(self, path, *args, **kwargs)
        ocp.StandardCheckpointHandler.restore = restore
      step, state, data = c.restore(wanted)
      assert step == 1 and data == {0: 1, 1: 1}
      assert all((s.data == x[s.index]).all() for s in state["x"].addressable_shards)
      if process == "1":  # as in FULL
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
      c.save(2, state, {})
      while True:
        c.check()
        time.sleep(0.1)
"""


def test_two_processes_skip_a_checkpoint_that_one_cannot_read_and_fail_together(tmp_path):
  pair = train_runs.two_processes([str(tmp_path / "run")], tmp_path,
                                  programs=[("-c", textwrap.dedent(PAIR))] * 2)
  for number, process in enumerate(pair):
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 2, text
    assert "2 is damaged (process 1: Input/output error)" in text and "step 1 is used" in text
    assert "pair: error: " + "process 1 has stopped: " * (number == 0) + (
        "checkpoint of step 2 cannot be saved") in text
    assert "File too large" in text
    assert f"the last good checkpoint is {tmp_path / 'run' / '1'}" in text


def test_a_version_of_orbax_that_cannot_keep_checkpoints_in_s3_is_refused_by_name(monkeypatch):
  monkeypatch.delattr(gcs_utils, "get_kvstore_for_gcs")
  orbax._know_s3.cache_clear()
  with pytest.raises(ValueError, match=r"Orbax 0\S+ cannot keep checkpoints in s3://.*'orbax-check"):
    orbax.know_store("s3://bucket/run")
  orbax.know_store("gs://bucket/run")
