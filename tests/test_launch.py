"""Scripts that start many hosts: they lint, parse, and do what they say with stand-in tools."""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT
from irg_jax import commands

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
DOCKERFILES = sorted(LAUNCH.glob("*.Dockerfile"))
# Variables that the launchers want, and values of them.
WANTED = {
    "tpu.sh": {"IRG_JOB": "irg-1", "IRG_ZONE": "us-east5-a", "IRG_LOGS": "gs://bucket/logs/",
               "IRG_TYPE": "v5p-128", "IRG_IMAGE": "us-docker.pkg.dev/p/r/irg:1"},
    "xpk.sh": {"IRG_JOB": "irg-1", "IRG_CLUSTER": "c", "IRG_TYPE": "v6e-64", "IRG_IMAGE": "image"},
    "gke.sh": {"IRG_JOB": "irg-1", "IRG_ACCELERATOR": "tpu-v5p-slice", "IRG_TOPOLOGY": "4x4x4",
               "IRG_IMAGE": "image"},
    "slurm.sh": {},
}
TRAIN = ["irg", "train", "--out", "gs://bucket/runs", "--distributed", 'two  "words"; $(x) \\n']


def _tool(name):
  """A program beside Python, or on the path; None if it is not installed."""
  beside = pathlib.Path(sys.executable).with_name(name)
  return str(beside) if beside.exists() else shutil.which(name)


@pytest.mark.skipif(not _tool("shellcheck"), reason="shellcheck is not installed (extra `test`)")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_passes_shellcheck(script):
  done = subprocess.run([_tool("shellcheck"), "-x", "-P", "SCRIPTDIR", script],
                        capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not _tool("hadolint"), reason="hadolint is not installed (extra `test`)")
@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda p: p.name)
def test_a_dockerfile_passes_hadolint(file):
  done = subprocess.run([_tool("hadolint"), file], capture_output=True, text=True)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda p: p.name)
def test_an_image_gets_files_that_exist_and_extras_that_are_declared(file):
  lines = [line.split() for line in file.read_text().splitlines()]
  sources = {word for line in lines if line[:1] == ["COPY"] for word in line[1:-1]}
  assert sources >= {"setup.cfg", "irg_jax", "configs"}
  kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
  for source in sources:
    assert (ROOT / source).exists() and source.split("/")[0] in kept, source
  declared = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2]
  for extra in re.search(r'"\.\[(.+)\]"', file.read_text())[1].split(","):
    assert re.search(rf"^{extra} =", declared, re.MULTILINE), extra


# --- stand-ins

# Keeps arguments, one a line, and standard input where there is one for it.
RECORD = 'printf "%s\\n" "$@" >"$FAKE/NAME.args"\n'
# The queue of Cloud TPU: `state` holds the states it answers one after another, "none" for no
# request; "ends N" is the moment in which the command ends with status N.
GCLOUD = """\
echo "$*" >>"$FAKE/gcloud.log"
case "$*" in
  *"queued-resources list"*)
    now=$(head -n 1 "$FAKE/states")
    sed -i 1d "$FAKE/states"
    [[ $now == fails ]] && exit 1
    if [[ $now == ends* ]]; then echo "${now#ends }" >"$FAKE/ended"; now=ACTIVE; fi
    [[ $now == none ]] || echo "$now"
    ;;
  *"queued-resources create"*)
    [[ -e $FAKE/refuse ]] && { echo "ERROR: no quota" >&2; exit 1; }
    script=$(grep -o 'startup-script=[^ ]*' <<<"$*")
    cp "${script#*=}" "$FAKE/startup"
    ;;
  "storage cat"*) cat "$FAKE/ended" ;;
  "storage rm"*) rm "$FAKE/ended" ;;
  "storage cp - "*) cat >"$FAKE/ended" ;;
esac
"""


@pytest.fixture
def fake(tmp_path):
  """Runs scripts of launch/ where the platforms' tools are stand-ins, with files in `folder`."""
  home, tools = tmp_path / "fake", tmp_path / "tools"
  home.mkdir()
  tools.mkdir()

  def tool(name, body):
    (tools / name).write_text(f"#!/usr/bin/env bash\n{body}")
    (tools / name).chmod(0o755)

  for name in ("xpk", "kubectl", "sbatch", "docker", "pip", "tensorboard"):
    tool(name, RECORD.replace("NAME", name))
  tool("gcloud", GCLOUD)
  tool("kubectl", 'cat >"$FAKE/jobset.yaml"\n')
  tool("sleep", "exit 1\n")
  tool("curl", "echo 0\n")
  clean = {k: v for k, v in os.environ.items() if not k.startswith(("IRG_", "SBATCH_", "SLURM_"))}
  clean |= {"PATH": f"{tools}:{os.environ['PATH']}", "FAKE": str(home), "HOME": str(tmp_path)}

  def run(script, *args, cwd=ROOT, **variables):
    return subprocess.run(["bash", script if "/" in script else LAUNCH / script, *args],
                          env=clean | variables, cwd=cwd, capture_output=True, text=True,
                          timeout=120)

  run.folder, run.tool = home, tool
  return run


# --- all launchers


@pytest.mark.parametrize("script", WANTED)
def test_help_names_every_variable_of_a_launcher(fake, script):
  text = fake(script, "--help").stdout
  assert text.startswith("One command on every")
  used = set(re.findall(r"\bIRG_[A-Z]+", (LAUNCH / script).read_text()))
  assert used >= set(WANTED[script])
  assert not {name for name in used if name not in text}


@pytest.mark.parametrize("script", [s for s in WANTED if WANTED[s]])
def test_all_missing_variables_are_named_at_once(fake, script):
  verb = ["run"] if script == "tpu.sh" else []
  done = fake(script, *verb, *TRAIN)
  needed = ["IRG_JOB", "IRG_ZONE"] if verb else WANTED[script]
  assert done.returncode == 1
  for name in needed:
    assert name in done.stderr


@pytest.mark.parametrize("script", WANTED)
@pytest.mark.parametrize("command, message", [
    ([], "the command is missing"),
    (["env", "A=b", "irg", "train", "--out", "gs://b/r"], "add --distributed"),
    (["irg", "train\n"], "line break")])
def test_a_command_that_cannot_work_is_refused(fake, script, command, message):
  done = fake(script, *["run"] * (script == "tpu.sh"), *command, **WANTED[script])
  assert done.returncode == 1 and message in done.stderr
  assert not list(fake.folder.iterdir())


@pytest.mark.parametrize("script", [s for s in WANTED if WANTED[s]])
@pytest.mark.parametrize("out", [["--out", "out/irg"], ["--out=/data/irg"]])
def test_results_that_would_be_lost_with_a_host_are_refused(fake, script, out):
  command = ["irg", "train", "--distributed", *out]
  done = fake(script, *["run"] * (script == "tpu.sh"), *command, **WANTED[script])
  assert done.returncode == 1 and "give a folder in a bucket" in done.stderr


@pytest.mark.parametrize("script", WANTED)
def test_a_dry_run_prints_and_starts_nothing(fake, script):
  done = fake(script, "--dry-run", *["run"] * (script == "tpu.sh"), *TRAIN, **WANTED[script])
  assert done.returncode == 0 and "gs://bucket/runs" in done.stdout
  assert not list(fake.folder.iterdir())


@pytest.mark.parametrize("script, name, value", [
    ("gke.sh", "IRG_TOPOLOGY", "64"), ("gke.sh", "IRG_TOPOLOGY", "3x3"),
    ("gke.sh", "IRG_JOB", "Irg_1"), ("xpk.sh", "IRG_JOB", "1st"), ("tpu.sh", "IRG_LOGS", "/logs"),
    ("tpu.sh", "IRG_TYPE", "tpu7x-8")])
def test_a_value_that_the_platform_would_refuse_is_an_error(fake, script, name, value):
  verb = ["run"] * (script == "tpu.sh")
  done = fake(script, *verb, *TRAIN, **WANTED[script] | {name: value})
  assert done.returncode == 1 and f"{name}={value}" in done.stderr


# --- each platform


@pytest.fixture
def jobset(fake):
  yaml = pytest.importorskip("yaml", reason="PyYAML is not installed (extra `test`)")

  def applied(**variables):
    done = fake("gke.sh", *TRAIN, **WANTED["gke.sh"] | variables)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load((fake.folder / "jobset.yaml").read_text())

  return applied


def test_the_jobset_asks_for_whole_slices_and_runs_the_command(jobset):
  job = jobset(IRG_SLICES="2")
  assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  slices, = job["spec"]["replicatedJobs"]
  pods = slices["template"]["spec"]
  assert slices["replicas"] == 2
  assert pods["parallelism"] == pods["completions"] == 16  # 64 chips, 4 a host
  spec = pods["template"]["spec"]
  assert spec["nodeSelector"] == {"cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
                                  "cloud.google.com/gke-tpu-topology": "4x4x4"}
  container, = spec["containers"]
  assert [word.replace("$$(", "$(") for word in container["command"]] == TRAIN
  assert "$$(x)" in container["command"][-1]  # else Kubernetes expands it
  assert container["resources"]["limits"]["google.com/tpu"] == 4


def test_a_preempted_jobset_restarts_without_limit_and_a_failing_one_with_it(jobset):
  spec = jobset(IRG_RESTARTS="3")["spec"]
  rule, = spec["failurePolicy"]["rules"]
  assert spec["failurePolicy"]["maxRestarts"] == 3
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  pods = spec["replicatedJobs"][0]["template"]["spec"]
  lost, ended = pods["podFailurePolicy"]["rules"]
  assert lost["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
  assert ended["onExitCodes"] == {"operator": "In", "values": [143]}
  assert pods["backoffLimit"] == 0 and pods["template"]["spec"]["restartPolicy"] == "Never"


def test_a_jobset_takes_spot_nodes_a_service_account_and_a_queue(jobset):
  job = jobset(IRG_SPOT="1", IRG_ACCOUNT="irg", IRG_QUEUE="team")
  assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
  spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
  assert spec["serviceAccountName"] == "irg"
  assert spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
  assert spec["tolerations"][0]["key"] == "cloud.google.com/gke-spot"


def test_xpk_gets_the_command_as_one_flag_that_a_shell_reads_back(fake):
  done = fake("xpk.sh", *TRAIN, **WANTED["xpk.sh"], IRG_SLICES="2", IRG_SPOT="1",
              IRG_FLAGS="--priority=high --env=A=b")
  assert done.returncode == 0, done.stderr
  flags = (fake.folder / "xpk.args").read_text().splitlines()
  assert flags[:2] == ["workload", "create"] and flags[-1].startswith("--command=exec irg train")
  assert shlex.split(flags[-1].removeprefix("--command=exec ")) == TRAIN
  assert {"--workload=irg-1", "--cluster=c", "--tpu-type=v6e-64", "--num-slices=2", "--spot",
          "--docker-image=image", "--max-restarts=100", "--priority=high",
          "--env=A=b"} <= set(flags)


@pytest.mark.parametrize("status, requeued", [(143, True), (0, False), (2, False)])
def test_a_slurm_job_goes_back_into_the_queue_only_if_it_was_stopped(fake, status, requeued):
  fake.tool("srun", 'shift; exec "$@"\n')
  fake.tool("scontrol", 'echo "$@" >"$FAKE/requeued"\n')
  # Runs a copy elsewhere, as SLURM does.
  fake.tool("sbatch", 'while [[ $1 == --* ]]; do shift; done; cp "$1" "$FAKE/job"; shift\n'
                      'SLURM_JOB_ID=7 SLURM_SUBMIT_DIR=$PWD bash "$FAKE/job" "$@"\n')
  done = fake("slurm.sh", "bash", "-c", 'echo "got <$1>"; exit $2', "x", "two  words", str(status))
  assert done.returncode == status and "got <two  words>" in done.stdout
  assert (fake.folder / "requeued").exists() == requeued


def test_slurm_runs_a_process_for_every_gpu(fake):
  assert fake("slurm.sh", *TRAIN, IRG_NODES="4", IRG_GPUS="2").returncode == 0
  flags = (fake.folder / "sbatch.args").read_text().splitlines()
  assert flags[:3] == ["--nodes=4", "--gpus-per-node=2", "--ntasks-per-node=2"]
  assert flags[-len(TRAIN):] == TRAIN


# --- Cloud TPU: the queue, and what a host does


@pytest.fixture
def queue(fake):
  """Runs tpu.sh where the queue has the given states; returns (what it did, calls of gcloud)."""
  def run(verb, states, *command, **variables):
    (fake.folder / "states").write_text("".join(f"{state}\n" for state in states))
    done = fake("tpu.sh", verb, *command, **WANTED["tpu.sh"] | {"IRG_POLL": "0"} | variables)
    log = (fake.folder / "gcloud.log").read_text()
    return done, [words for words in re.findall(r"(?:resources|storage) (\w+)", log)]

  fake.tool("sleep", "")
  run.fake = fake
  return run


def test_preempted_slices_are_asked_for_again_until_the_command_has_ended(queue):
  (queue.fake.folder / "ended").write_text("2\n")  # of an earlier run of the same name
  done, calls = queue("run", ["none", "PROVISIONING", "ACTIVE", "fails", "SUSPENDING", "SUSPENDED",
                              "ACTIVE", "ends 0"], *TRAIN, IRG_SPOT="1", IRG_SLICES="2")
  assert done.returncode == 0 and "ended with status 0" in done.stderr
  assert [c for c in calls if c in ("create", "delete")] == ["create", "delete", "create", "delete"]
  create = re.search(r".* create .*", (queue.fake.folder / "gcloud.log").read_text())[0].split()
  assert {"--accelerator-type=v5p-128", "--runtime-version=v2-alpha-tpuv5", "--spot",
          "--node-count=2", "--node-prefix=irg-1", "--zone=us-east5-a"} <= set(create)


def test_the_status_of_the_command_is_that_of_run(queue):
  done, calls = queue("run", ["none", "ACTIVE", "ends 2"], *TRAIN)
  assert done.returncode == 2 and calls[-1] == "delete"


def test_slices_that_are_there_are_watched_not_asked_for(queue):
  done, calls = queue("run", ["ACTIVE", "ACTIVE", "ends 0"], *TRAIN)
  assert done.returncode == 0 and "is there" in done.stderr and "create" not in calls


def test_a_request_that_is_refused_ends_run(queue):
  (queue.fake.folder / "refuse").touch()
  done, calls = queue("run", ["none"], *TRAIN)
  assert done.returncode == 1 and "no quota" in done.stderr and calls.count("create") == 1


def test_stop_tells_run_first_and_gives_the_slices_back_last(queue):
  done, calls = queue("stop", [])
  assert done.returncode == 0, done.stderr
  assert calls == ["cp", "ssh", "delete"]
  assert (queue.fake.folder / "ended").read_text() == "143\n"
  done, _ = queue("run", ["ACTIVE", "none"], *TRAIN)
  assert done.returncode == 143


@pytest.fixture
def host(queue):
  """Boots a host whose command ends with the given statuses, one start after another."""
  def boot(*statuses, **variables):
    queue("run", ["none", "ends 0"], *TRAIN, **variables)
    folder = queue.fake.folder
    (folder / "ended").unlink()
    (folder / "statuses").write_text("".join(f"{status}\n" for status in statuses))
    # With `stopped` for a status, somebody stops the run meanwhile.
    queue.fake.tool("docker", """[[ $1 == run ]] || exit 0
while [[ $1 != us-docker* ]]; do shift; done
shift; printf "%s\\n" "$@" >"$FAKE/command"; echo start >>"$FAKE/starts"
status=$(head -n 1 "$FAKE/statuses"); sed -i 1d "$FAKE/statuses"
[[ $status == stopped ]] && { echo 143 >"$FAKE/ended"; status=143; }
exit "$status"
""")
    queue.fake.tool("sleep", "exit 1\n")  # ends the loop that sends the output
    done = queue.fake(str(folder / "startup"), IRG_LOG=str(folder / "log"))
    ended = (folder / "ended").read_text().strip() if (folder / "ended").exists() else None
    return len((folder / "starts").read_text().split()), ended, done

  boot.folder = queue.fake.folder
  return boot


def test_a_host_runs_the_command_with_its_arguments_as_they_were(host):
  starts, ended, done = host(0)
  assert (starts, ended) == (1, "0"), (host.folder / "log").read_text()
  assert (host.folder / "command").read_text().splitlines() == TRAIN


def test_a_host_starts_again_after_failures_up_to_a_limit_and_after_sigterm_always(host):
  starts, ended, _ = host(143, 134, 143, 143, 2, 0, IRG_RESTARTS="2")
  assert (starts, ended) == (6, "0")


def test_a_command_that_fails_every_time_ends_the_run_with_its_status(host):
  starts, ended, _ = host(2, 2, 2, 2, IRG_RESTARTS="2")
  assert (starts, ended) == (3, "2")


def test_a_host_that_was_stopped_stays_stopped(host):
  starts, ended, _ = host("stopped")
  assert (starts, ended) == (1, "143")


# --- the guide


def test_the_guide_runs_from_top_to_bottom_with_stand_ins(fake):
  guide = (LAUNCH / "README.md").read_text()
  (fake.folder / "states").write_text("none\nACTIVE\nends 0\nACTIVE\n")
  fake.tool("sleep", "")
  fake.tool("kubectl", '[[ $1 != apply ]] || cat >"$FAKE/jobset.yaml"\n')
  fake.tool("irg", 'printf "%s\\0" "$@" >>"$FAKE/irg"; echo >>"$FAKE/irg"\n')
  lines = re.findall(r"^    (\S.*|\s+\S.*)$", guide, re.MULTILINE)
  script = fake.folder / "guide"
  script.write_text("set -e\n" + "\n".join(lines) + "\n")
  done = fake(str(script))
  assert done.returncode == 0, done.stdout + done.stderr
  for name in ("docker.args", "xpk.args", "jobset.yaml", "sbatch.args", "tensorboard.args"):
    assert (fake.folder / name).exists(), name
  assert "replicas: 2" in (fake.folder / "jobset.yaml").read_text()
  calls = [line.split("\0")[:-1] for line in (fake.folder / "irg").read_text().splitlines()]
  calls.append((fake.folder / "sbatch.args").read_text().split("\nirg\n")[1].splitlines())
  calls.append(shlex.split((fake.folder / "xpk.args").read_text().partition("--command=exec env")[2]
                           .partition(" irg ")[2]))
  assert {words[0] for words in calls} == {"fetch", "data", "plan", "train", "generate"}
  for words in calls:
    flags = [word.replace("gs:/", "") for word in words if not word.startswith("--config.")]
    assert callable(commands.make_parser().parse_args(flags).run)


def test_what_the_guide_names_is_there():
  guide = (LAUNCH / "README.md").read_text()
  for target in re.findall(r"\]\((?!https?://)([^)#]+)", guide):
    assert (LAUNCH / target).exists(), target
  for name in re.findall(r"\b[\w.]+\.(?:sh|Dockerfile)\b", guide):
    assert (LAUNCH / name).is_file(), name
