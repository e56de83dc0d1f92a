"""`benchmarks/device.py` at tiny sizes: what it writes, and how it fails."""

import json
import pathlib
import types

import jax
import jax.numpy as jnp
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def benchmark(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / "benchmarks")
  import device
  import device_report
  monkeypatch.setattr(device, "prepare_device", lambda small: None)
  return types.SimpleNamespace(device=device, report=device_report, patch=monkeypatch.setattr)


def run(benchmark, folder, *flags):
  """(exit status, JSON) of a run at tiny sizes."""
  out = folder / "new" / "device.json"
  status = benchmark.device.main(["--small", "--repeat", "1", "--out", str(out), *flags])
  return status, json.loads(out.read_text())


def by_part(content, part):
  return [row for row in content["rows"] if row["part"] == part]


@pytest.mark.long
def test_a_run_prints_its_tables_and_writes_device_versions_and_rows(benchmark, tmp_path, capsys):
  timed = benchmark.report.timed

  def mostly_traced(function, *args, lower=None, flops=0.0, tokens=0, again=None, repeat=3):
    """Compiles the matrix product; only traces the other programs, which takes less time."""
    if function is jnp.dot:
      return timed(function, *args, flops=flops, repeat=repeat)
    lower() if lower else jax.eval_shape(function, *args)
    return {"seconds": 2.0} | benchmark.report.rates(2.0, flops, tokens, 100.0)

  def traced(tolerance, passes, *args):
    """Only traces the kernel and the dense form."""
    kernel, dense = (jax.eval_shape(lambda *x: passes(form, *x), *args)
                     for form in ("kernel", "dense"))
    assert kernel == dense
    return benchmark.device.judged(dict.fromkeys(kernel, 0.0), tolerance)

  benchmark.patch(benchmark.report, "timed", mostly_traced)
  benchmark.patch(benchmark.device, "compared", traced)
  status, content = run(benchmark, tmp_path)
  assert not [row for row in content["rows"] if "skipped" in row]
  assert status == 0 and content["passed"]
  assert content["device"]["platform"] == "cpu" and content["versions"]["jax"] == jax.__version__
  assert list(content["parts"]) == ["oracle", "attention", "think", "denoise", "train"]
  errors = [row["errors"] for row in by_part(content, "oracle")]
  assert [sorted(e) for e in errors] == [["dk", "dq", "dv", "out"]] * 2 + [["out"]]
  product = by_part(content, "attention")[0]
  assert product["seconds"] > 0 and product["compile_seconds"] > 0 and product["tflops"] > 0
  names = [row["name"] for row in by_part(content, "attention")]
  for form in ("kernel", "chunked", "jax.nn, xla"):
    assert sum(f": {form}, forward" in name for name in names) >= 2
    assert sum(f": {form}, both passes" in name for name in names) == 2
  assert [row["rate"] for row in by_part(content, "think")] == [2.0]  # 4 tokens in 2 seconds
  flops = [row["tflops"] for row in by_part(content, "denoise")]
  assert len(flops) == 3 and flops == sorted(flops)
  assert by_part(content, "train")[0]["share"] > 0
  shown = capsys.readouterr().out
  assert "| packed row, float32" in shown and "of peak" in shown and "peak GiB so far" in shown


def test_a_part_that_fails_is_a_row_with_its_reason_and_the_others_go_on(benchmark, tmp_path,
                                                                        capsys):
  def full(*_):
    raise RuntimeError("RESOURCE_EXHAUSTED: 30 GiB\nmore")

  def two(run, _):
    run.attempt("first", lambda: full())
    run.attempt("second", lambda: {"seconds": 1.0})

  passed = lambda run, _: run.attempt("row", lambda: benchmark.device.judged({"out": 0.0}, 1e-4))
  benchmark.patch(benchmark.device, "oracle", passed)
  benchmark.patch(benchmark.device, "PARTS", {"think": full, "denoise": two})
  status, content = run(benchmark, tmp_path, "--parts", "think,denoise")
  reason = "out of memory (RESOURCE_EXHAUSTED): RuntimeError: RESOURCE_EXHAUSTED: 30 GiB more"
  assert status == 0
  assert by_part(content, "think") == [{"part": "think", "name": "all", "skipped": reason}]
  assert [row.get("seconds") for row in by_part(content, "denoise")] == [None, 1.0]
  assert f"skipped: think: all: {reason}" in capsys.readouterr().out
  status, content = run(benchmark, tmp_path, "--parts", "denoise", "--limit", "-1")
  assert status == 1 and "out of time" in by_part(content, "denoise")[1]["skipped"]


@pytest.mark.parametrize("wrong", [1.001, float("nan")])
def test_a_kernel_out_of_tolerance_is_exit_status_1(benchmark, tmp_path, wrong):
  def passes(form, x):
    return {"out": x * (wrong if form == "kernel" else 1.0), "dq": x}

  def oracle(run, _):
    run.attempt("right", lambda: benchmark.device.judged({"out": 1e-5}, 1e-4))
    run.attempt("wrong", lambda: benchmark.device.compared(1e-4, passes, jnp.ones(8)))

  benchmark.patch(benchmark.device, "oracle", oracle)
  benchmark.patch(benchmark.device, "PARTS", {"none": lambda *_: None})
  status, content = run(benchmark, tmp_path, "--parts", "none")
  assert status == 1 and not content["passed"]
  assert [row["within"] for row in by_part(content, "oracle")] == [True, False]


def test_a_kernel_that_could_not_be_compared_is_exit_status_1(benchmark, tmp_path):
  def oracle(*_):
    raise NotImplementedError("no such kernel")

  benchmark.patch(benchmark.device, "oracle", oracle)
  benchmark.patch(benchmark.device, "PARTS", {"none": lambda *_: None})
  status, content = run(benchmark, tmp_path, "--parts", "none")
  assert status == 1
  assert by_part(content, "oracle")[0]["skipped"] == "NotImplementedError: no such kernel"


def test_the_tolerances_pass_rounding_and_nothing_else(benchmark):
  judged, most = benchmark.device.judged, benchmark.device.TOLERANCES
  assert judged({"out": 3e-3, "dq": 5e-3}, most["bfloat16"])["within"]
  assert not judged({"out": 3e-3, "dq": 5e-2}, most["bfloat16"])["within"]
  assert not judged({"out": 3e-4}, most["float32"])["within"]  # a product in TF32
  assert benchmark.device.relative_error(jnp.ones(4), 2 * jnp.ones(4)) == 0.5


@pytest.mark.long
def test_all_parts_run_on_a_cpu(benchmark, tmp_path):
  status, content = run(benchmark, tmp_path)
  assert status == 0 and not [row for row in content["rows"] if "skipped" in row]
  assert all(row["seconds"] > 0 for row in content["rows"] if row["part"] != "oracle")
