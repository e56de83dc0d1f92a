"""Scripts that start many hosts: they lint, parse, and do what they say with stand-in tools."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import pytest

from conftest import ROOT

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


def _shellcheck():
  beside = pathlib.Path(sys.executable).with_name("shellcheck")
  return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(_shellcheck() is None, reason="shellcheck is not installed (extra `test`)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_passes_shellcheck(script):
  done = subprocess.run([_shellcheck(), "-x", "-P", "SCRIPTDIR", script], capture_output=True,
                        text=True)
  assert done.returncode == 0, done.stdout


def test_the_jobset_parses_and_asks_for_whole_hosts_together():
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra `test`)")
  job = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
  assert job["kind"] == "JobSet"
  pods = job["spec"]["replicatedJobs"][0]["template"]["spec"]
  assert pods["parallelism"] == pods["completions"] == "${IRG_HOSTS}"
  container, = pods["template"]["spec"]["containers"]
  assert container["command"][:2] == ["irg", "train"] and "--distributed" in container["command"]
  assert container["resources"]["limits"]["google.com/tpu"] == "${IRG_CHIPS_PER_HOST}"


@pytest.mark.parametrize("file", ["gke_jobset.yaml", "tpu_pod.sh", "slurm.sbatch"])
def test_every_variable_is_explained(file):
  readme = (LAUNCH / "README.md").read_text()
  for name in set(re.findall(r"\bIRG_[A-Z_]+", (LAUNCH / file).read_text())):
    assert name in readme, name


def tools(folder, **scripts):
  """A folder of stand-in commands, and an environment that finds them first."""
  for name, body in scripts.items():
    path = folder / name
    path.write_text("#!/usr/bin/env bash\n" + body)
    path.chmod(0o755)
  return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}


# A slice of one host, which is this one: runs what follows --command in $HOST.
GCLOUD = """\
while [[ $# -gt 1 ]]; do
  if [[ $1 == --command ]]; then cd "$HOST" && exec bash -c "$2"; fi
  shift
done
"""


@pytest.fixture
def pod(tmp_path):
  """Runs tpu_pod.sh against the stand-in host; its folder is `host/irg_jax`."""
  home = tmp_path / "host" / "irg_jax"
  (home / ".venv" / "bin").mkdir(parents=True)
  (home / ".venv" / "bin" / "activate").write_text("")
  env = tools(tmp_path, gcloud=GCLOUD) | {
      "HOST": str(tmp_path / "host"), "IRG_TPU": "slice", "IRG_ZONE": "zone"}
  run = lambda *args: subprocess.run(
      ["bash", LAUNCH / "tpu_pod.sh", *args], env=env, capture_output=True, text=True, timeout=60)
  yield home, run
  run("stop")


def wait_for(path, text):
  for _ in range(600):
    if path.exists() and text in path.read_text():
      return
    time.sleep(0.05)
  raise AssertionError(f"{text!r} never came: {path.read_text() if path.exists() else 'no file'}")


def test_a_started_command_keeps_its_arguments_and_ends_with_sigterm(pod):
  home, run = pod
  loop = "trap 'echo saved; exit 143' TERM; echo \"got <$1>\"; while :; do sleep 0.05; done"
  assert run("start", "bash", "-c", loop, "name", "two  words; $HOME").returncode == 0
  wait_for(home / "run.log", "got <two  words; $HOME>")
  again = run("start", "echo", "second")
  assert again.returncode == 1 and "already running" in again.stderr
  assert "running" in run("status").stdout
  run("stop")
  wait_for(home / "run.log", "saved")


def test_the_pod_script_says_what_is_missing():
  env = {k: v for k, v in os.environ.items() if not k.startswith("IRG_")}
  run = lambda **more: subprocess.run(["bash", LAUNCH / "tpu_pod.sh"], env=env | more,
                                      capture_output=True, text=True)
  assert "set IRG_TPU" in run().stderr
  usage = run(IRG_TPU="slice", IRG_ZONE="zone")
  assert usage.returncode == 2 and "tpu_pod.sh start" in usage.stderr


@pytest.mark.parametrize("status, requeued", [(143, True), (0, False), (2, False)])
def test_a_slurm_job_goes_back_into_the_queue_only_if_it_was_stopped(tmp_path, status, requeued):
  env = tools(tmp_path, srun='shift; exec "$@"', scontrol='echo "$@" >requeued')
  env |= {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
  done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "bash", "-c", f"exit {status}"], env=env)
  assert done.returncode == status
  assert (tmp_path / "requeued").exists() == requeued
