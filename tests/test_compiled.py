"""The cache of compiled programs: where it is, what it keeps, and that nothing there can hurt.

That `irg generate` compiles once is tested in test_cli_run.
"""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

import irg_jax
from conftest import ROOT
from irg_jax import compiled

NAMES = ("jax_enable_compilation_cache", "jax_compilation_cache_dir",
         "jax_persistent_cache_min_compile_time_secs")


@pytest.fixture
def programs(tmp_path, monkeypatch):
  """The folder of the cache, which is not made yet, for a JAX whose cache is as users have it."""
  from jax._src import lru_cache
  monkeypatch.setattr(lru_cache.LRUCache, "put", lru_cache.LRUCache.put)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  before = [getattr(jax.config, name) for name in NAMES]
  for name, value in zip(NAMES, (True, None, 1.0)):
    jax.config.update(name, value)
  compilation_cache.reset_cache()
  yield tmp_path / "cache" / "irg_jax" / "programs"
  for name, value in zip(NAMES, before):
    jax.config.update(name, value)
  compilation_cache.reset_cache()


def compile_anew(number=1.5):
  jax.clear_caches()
  return float(jax.jit(lambda x: x * number + 1)(jnp.float32(2)))


def kept(programs):
  return {path.name for path in programs.iterdir()}


def test_python_keeps_programs_once_it_is_told_to_and_not_before(programs):
  """Even after other programs were compiled; they are found by a process that is told to as well."""
  assert compile_anew() == 4 and not programs.exists()
  assert "keep_programs" in dir(irg_jax)
  irg_jax.keep_programs()
  assert compile_anew(2.5) == 6 and kept(programs)
  found, events = kept(programs), []
  listen = lambda event, **_: events.append(event.rpartition("/")[2])
  jax.monitoring.register_event_listener(listen)
  assert compile_anew(2.5) == 6
  jax.monitoring.unregister_event_listener(listen)
  assert "cache_hits" in events and "cache_misses" not in events and kept(programs) == found


def test_neither_importing_nor_loading_changes_settings_of_jax():
  code = """
import jax
before = dict(jax.config.values)
import irg_jax
irg_jax.load()
changed = {name for name, value in jax.config.values.items() if before[name] != value}
assert not changed, changed
"""
  kept_variables = {k: v for k, v in os.environ.items() if not k.startswith("JAX_ENABLE")}
  subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=kept_variables)


def test_settings_of_jax_win(programs, tmp_path, monkeypatch):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  compiled.keep_programs()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
  jax.config.update("jax_compilation_cache_dir", None)
  jax.config.update("jax_enable_compilation_cache", False)
  compiled.keep_programs()
  assert jax.config.jax_compilation_cache_dir is None and not programs.exists()


def test_the_folder_is_the_users_own_for_caches(monkeypatch):
  monkeypatch.setenv("HOME", "/home/ada")
  monkeypatch.setattr("sys.platform", "linux")
  for root, folder in ((None, "/home/ada/.cache"), ("relative", "/home/ada/.cache"), ("/x", "/x")):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if root:
      monkeypatch.setenv("XDG_CACHE_HOME", root)
    assert compiled.folder() == pathlib.Path(folder, "irg_jax", "programs")


def test_a_folder_that_cannot_be_used_is_named_once_and_the_command_goes_on(
    programs, tmp_path, capsys):
  (tmp_path / "cache").write_text("a file")
  compiled.keep_programs()
  line, = capsys.readouterr().err.splitlines()
  assert "programs are not kept" in line and "not a folder" in line
  assert jax.config.jax_compilation_cache_dir is None and compile_anew() == 4


def test_a_full_disk_is_named_once_and_leaves_no_half_of_a_program(programs, capsys, monkeypatch):
  compiled.keep_programs()
  def full(path, data):
    raise OSError(28, "No space left on device", str(path))
  monkeypatch.setattr(compiled.storage, "write_bytes", full)
  assert [compile_anew(number) for number in (1.5, 2.5, 3.5)] == [4, 6, 8]
  line, = capsys.readouterr().err.splitlines()
  assert "No space left" in line and not kept(programs)


def test_a_damaged_program_is_compiled_anew_and_replaced(programs):
  compiled.keep_programs()
  compile_anew()
  for path in programs.iterdir():
    path.write_bytes(path.read_bytes()[:100])
  with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
    assert compile_anew() == 4
  assert all(path.stat().st_size > 100 for path in programs.iterdir())
  assert compile_anew() == 4


def test_remains_of_killed_commands_and_the_oldest_programs_go(programs, monkeypatch):
  compiled.keep_programs()
  for age, name in enumerate(("new", "old", "older")):
    path = programs / f"{name}-cache"
    path.write_bytes(b"x" * 100)
    os.utime(path, (1e9 - age, 1e9 - age))
  (programs / ".01234567.partial").write_bytes(b"half")
  monkeypatch.setattr(compiled, "_LIMIT", 250)
  compiled._tidy(programs)
  assert kept(programs) == {"new-cache", "old-cache"}
