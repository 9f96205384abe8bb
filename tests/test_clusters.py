"""The launchers for pods, clusters and containers: their dry runs, and what they do with fake tools.

Each fake tool (gcloud, kubectl, srun, docker) is a script that logs its arguments; gcloud's also runs the
commands for a host in that host's home directory. Real tools of this machine are not on PATH.
"""

import atexit
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCHERS = sorted([*ROOT.glob("launch/**/*.sh"), *ROOT.glob("launch/*.sbatch")])
RUN = ("--config=openmoji:cd,steps=4", "--workdir=/mnt/mcm/runs/cd4")
IN_BUCKET = (RUN[0], "--workdir=gs://b/runs/cd4")


def launch(script, *arguments, tools=None, checkout=ROOT, **variables):
    """The finished launcher. tools: a directory of fake tools; without them only dry runs get far."""
    return subprocess.run(
        ["bash", checkout / "launch" / script, *arguments],
        env=environment(tools, **variables),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


# All other programs that the launchers and the fake tools need.
BASICS = """
bash cat cksum cp dirname grep gzip id mkdir mktemp paste python3 rm sed seq setsid sleep sort stat tail tar
touch wc
"""


@functools.cache
def basics():
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    for name in BASICS.split():
        (directory / name).symlink_to(
            os.path.realpath(sys.executable) if name == "python3" else shutil.which(name)
        )
    return directory


# All that the launcher and the fake hosts read; the whole checkout takes most of a second to pack and unpack.
READ = ("launch", "setup.cfg", "setup.py", "pyproject.toml")


@functools.cache
def small_checkout():
    directory = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, directory)
    subprocess.run(["cp", "-r", *READ, directory], cwd=ROOT, check=True)
    return directory


def environment(tools, **variables):
    path = basics() if tools is None else f"{tools}:{basics()}"
    home = {"HOME": "/nonexistent", "MCM_VENV": "/nonexistent/.venv"}
    return {"PATH": str(path), "LANG": "C.UTF-8", **home, **variables}


def commands(result):
    """The commands that a dry run prints."""
    assert result.returncode == 0, result.stderr
    return [line.removeprefix("+ ") for line in result.stdout.splitlines() if line.startswith("+ ")]


def make_tool(directory, name, code):
    path = directory / name
    path.write_text(f"#!/usr/bin/env bash\n{code}\n")
    path.chmod(0o755)


def test_the_shell_is_sound():
    found = subprocess.run(
        ["shellcheck", "--external-sources", *LAUNCHERS], cwd=ROOT, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout
    assert {path.name for path in LAUNCHERS} >= {"tpu_pod.sh", "slurm.sbatch", "train.sh", "docker.sh"}


POD = ("--name=mcm", "--zone=us-west4-a", "--type=v5litepod-16")
TPU = ("--name=cd4", "--image=r/mcm_jax:tpu", "--claim=shared", "--accelerator=tpu-v5-lite-podslice")
TPU = ("tpu", *TPU, "--topology=4x8", "--hosts=8", "--chips=4")
GPU = ("gpu", "--name=cd4", "--image=r/mcm_jax:gpu", "--claim=shared", "--accelerator=nvidia-h100-80gb")
GPU = (*GPU, "--hosts=4", "--chips=8")


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        *[
            (
                "tpu_pod.sh",
                [*(a for a in POD if not a.startswith(f"--{name}=")), "--", *IN_BUCKET],
                f"--{name}=",
            )
            for name in ("name", "zone", "type")
        ],
        ("tpu_pod.sh", [*POD, "--sport", "--", *IN_BUCKET], "--sport is not an option"),
        ("tpu_pod.sh", [*POD, *IN_BUCKET], f"{RUN[0]} is not an option"),
        ("tpu_pod.sh", [*POD], "--config=... is missing among the arguments of mcm_jax.train"),
        ("tpu_pod.sh", [*POD, "--", RUN[0]], "--workdir=... is missing"),
        ("tpu_pod.sh", [*POD, "--", RUN[0], "--workdir="], "--workdir=... is missing"),
        ("tpu_pod.sh", [*POD, "--type=v9-8", "--", *IN_BUCKET], "--type=v9-8 is unknown; set its runtime"),
        ("tpu_pod.sh", [*POD, "--attempts=0", "--", *IN_BUCKET], "--attempts=0 must be a number"),
        ("tpu_pod.sh", [*POD, "--", *IN_BUCKET], "gcloud is not installed"),
        ("tpu_pod.sh", [*POD, "--nfs=10.0.0.2", "--", *RUN], "--nfs=10.0.0.2 must be ADDRESS:/SHARE"),
        ("tpu_pod.sh", [*POD, "--flex-start=long", "--", *IN_BUCKET], "--flex-start=long must be a duration"),
        (
            "tpu_pod.sh",
            [*POD, "--spot", "--flex-start=2h", "--", *IN_BUCKET],
            "--spot --flex-start: choose one",
        ),
        ("tpu_pod.sh", [*POD, "--local-workdir", "--delete", "--", *RUN], "--delete would delete what"),
        # What is lost with the slice's boot disk.
        *[
            ("tpu_pod.sh", [*POD, *given], f"{path} would be on the boot disk, which is lost with the slice")
            for path, given in (
                (RUN[1], ["--", *RUN]),
                ("--workdir=runs/x", ["--", RUN[0], "--workdir=runs/x"]),
                ("--workdir=runs/x", ["--nfs=a:/b", "--setup=true", "--", RUN[0], "--workdir=runs/x"]),
                ("--workdir=/data/x", ["--nfs=a:/b", "--", RUN[0], "--workdir=/data/x"]),
                ("--workdir=/x", ["--program=evaluate", "--", "--workdir=gs://b/x,/x"]),
                ("--out=x.png", ["--program=sample", "--", "--workdir=gs://b/x", "--out=x.png"]),
                ("--data_dir=data", ["--program=prepare", "--", "--dataset=openmoji"]),
            )
        ],
        # Every program needs other arguments.
        *[
            (script, [*before, f"--program={program}", *after], message)
            for script, before, after in (
                ("tpu_pod.sh", POD, []),
                ("slurm.sbatch", (), []),
                (
                    "gke/train.sh",
                    ("gpu", "--name=a", "--image=b", "--accelerator=c", "--hosts=1", "--chips=8"),
                    [],
                ),
            )
            for program, message in (
                ("report", "--program=report must be train, evaluate, sample or prepare"),
                ("train", "--config=... is missing among the arguments of mcm_jax.train"),
                (
                    "evaluate",
                    "--workdir=... or --images=... is missing among the arguments of mcm_jax.evaluate",
                ),
                ("sample", "--workdir=... is missing among the arguments of mcm_jax.sample"),
                ("prepare", "--dataset=... or --inception=... is missing"),
            )
        ],
        (
            "tpu_host.sh",
            [],
            "use launch/tpu_host.sh mount, storage, install, train, evaluate, sample, prepare or stop",
        ),
        ("slurm.sbatch", [], "--config=... is missing"),
        ("slurm.sbatch", [*RUN], "this is not a SLURM job; submit it"),
        ("docker.sh", ["--imagine=x"], "--imagine=x is not an option"),
        ("docker.sh", [], "docker is not installed"),
        ("gke/train.sh", [], "specify tpu or gpu first"),
        ("gke/train.sh", ["cpu", *TPU[1:], "--", *RUN], "specify tpu or gpu first"),
        *[
            ("gke/train.sh", [*(a for a in TPU if not a.startswith(f"--{name}=")), "--", *RUN], f"--{name}=")
            for name in ("name", "image", "accelerator", "topology", "hosts", "chips")
        ],
        ("gke/train.sh", [*TPU, "--name=Cd4", "--", *RUN], "--name=Cd4 must be lower case"),
        ("gke/train.sh", [*TPU, f"--name={'a' * 41}", "--", *RUN], "at most 40"),
        ("gke/train.sh", [*TPU, "--hosts=four", "--", *RUN], "--hosts=four must be a number"),
        (
            "gke/train.sh",
            [*TPU, "--image=a b", "--", *RUN],
            "--image=a b contains characters that are not allowed",
        ),
        ("gke/train.sh", [*GPU, "--queue=a b", "--", *RUN], "--queue=a b contains characters"),
        ("gke/train.sh", [*GPU, "--service-account=a b", "--", *RUN], "--service-account=a b contains"),
        *[
            ("gke/train.sh", [*given, "--", *arguments], f"{arguments[1]} would be lost with the pod")
            for given, arguments in (
                ([a for a in GPU if not a.startswith("--claim=")], RUN),
                (GPU, (RUN[0], "--workdir=runs/cd4")),
            )
        ],
        (
            "gke/train.sh",
            [*GPU, "--program=prepare", "--", "--dataset=openmoji", "--data_dir=gs://b/data"],
            "--program=prepare runs in one pod",
        ),
        ("gke/train.sh", [*GPU, "--slices=2", "--", *RUN], "--topology and --slices are for tpu"),
        ("gke/train.sh", [*GPU, "--", RUN[0]], "--workdir=... is missing"),
        ("gke/train.sh", [*GPU, "--", *RUN], "kubectl is not installed"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(script, arguments, message):
    result = launch(script, *arguments)
    (line,) = result.stderr.splitlines()
    assert result.returncode == 2 and not result.stdout
    assert line.startswith("error: ") and message in line


# Cloud TPU.


def test_the_commands_of_a_pod():
    given = (
        *POD,
        "--project=p",
        "--spot",
        "--delete",
        "--setup=sudo mount x",
        "--dry-run",
        "--",
        *IN_BUCKET,
        "--config.x=a b",
    )
    create, forget, pack, copy, install, train, delete = commands(launch("tpu_pod.sh", *given))
    create_words = shlex.split(create)
    assert create_words[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "mcm"]
    assert set(create_words[6:]) == {
        *("--node-id=mcm", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"),
        *("--spot", "--zone=us-west4-a", "--project=p", "--quiet"),
    }
    # Whatever fails from here on, no exit code of an earlier program is taken for this one's.
    assert forget.startswith("gcloud compute tpus tpu-vm ssh mcm --worker=all --command=rm -f .mcm_run.code ")
    assert pack.startswith("tar ")
    assert re.match(
        r"gcloud compute tpus tpu-vm scp /.*/mcm_jax.tar.gz mcm:mcm_jax.tar.gz --worker=all ", copy
    )
    assert install.startswith("gcloud compute tpus tpu-vm ssh mcm --worker=all --command=sudo mount x && ")
    assert "bash mcm_jax/launch/tpu_host.sh install" in install
    assert r"--worker=all --command=bash mcm_jax/launch/tpu_host.sh train --config=" in train
    assert r"--workdir=gs://b/runs/cd4 --config.x=a\ b" in train
    assert delete.startswith("gcloud compute tpus queued-resources delete mcm --force ")
    for command in (create, forget, copy, install, train, delete):
        assert command.endswith("--zone=us-west4-a --project=p --quiet")


def test_what_a_request_passes_on():
    given = ("--internal-ips", "--network=n", "--subnetwork=s", "--service-account=a@b", "--reserved")
    given = (*given, "--labels=team=x", "--data-disk=source=d,mode=read-only")
    create, forget, _, copy, install, train = commands(
        launch("tpu_pod.sh", *POD, *given, "--dry-run", "--", *IN_BUCKET)
    )
    assert set(given) <= set(create.split())
    for command in (forget, copy, install, train):
        assert command.endswith(" --internal-ip --zone=us-west4-a --quiet")


def test_flex_start_is_requested_from_the_alpha_track():
    create, *others = commands(launch("tpu_pod.sh", *POD, "--flex-start=24h", "--dry-run", "--", *IN_BUCKET))
    assert create.startswith("gcloud alpha compute tpus queued-resources create mcm ")
    assert {"--provisioning-model=flex-start", "--max-run-duration=24h"} <= set(create.split())
    assert "--spot" not in create and not any("alpha" in other for other in others)


def test_the_proxy_is_reached_through_the_request():
    """`tpu-vm ssh` has no --tunnel-through-iap."""
    _, forget, _, *over = commands(
        launch("tpu_pod.sh", *POD, "--internal-ips", "--iap", "--dry-run", "--", *IN_BUCKET)
    )
    over = [forget, *over]
    assert [command.split()[4] for command in over] == ["ssh", "scp", "ssh", "ssh"]
    for command in over:
        assert command.startswith("gcloud compute tpus queued-resources s")
        assert " --worker=all " in command and " --node=0 --tunnel-through-iap --zone=" in command
        assert "--internal-ip " not in command


def test_a_share_is_mounted_before_anything_is_written():
    given = ("--nfs=10.0.0.2:/mcm", "--dry-run", "--", *RUN)
    install = commands(launch("tpu_pod.sh", *POD, *given))[4]
    steps = [step.removeprefix("bash mcm_jax/launch/tpu_host.sh ") for step in install.split(" && ")]
    assert steps[-3:-1] == ["mount 10.0.0.2:/mcm", "storage /mnt/mcm/runs/cd4"]
    assert steps[-1].startswith("install ")


def test_another_disk_may_be_mounted_by_setup():
    run = ("--", RUN[0], "--workdir=/data/runs/cd4")
    install = commands(launch("tpu_pod.sh", *POD, "--setup=sudo mount x", "--dry-run", *run))[4]
    assert " tpu_host.sh storage /data/runs/cd4 && " in install.replace("bash mcm_jax/launch/", "")


def test_a_local_workdir_is_kept_on_request():
    install = commands(launch("tpu_pod.sh", *POD, "--local-workdir", "--dry-run", "--", *RUN))[4]
    assert "storage" not in install and "mount" not in install


def test_a_pod_gets_neither_caches_nor_data(tmp_path):
    """A cache that is being written makes tar fail, too."""
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    hidden = [name.removesuffix("*") for name in ignored if name.startswith(".")]
    left_out = [*hidden, "data", "runs"]
    assert ".xla_cache" in left_out and ".hypothesis" in left_out
    for name in [*left_out, "mcm_jax"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    (pack,) = (
        one for one in commands(launch("tpu_pod.sh", *POD, "--dry-run", "--", *IN_BUCKET)) if one[:3] == "tar"
    )
    words = ["-cf" if word == "-czf" else word for word in shlex.split(pack)]
    words[words.index("-cf") + 1] = str(tmp_path.with_suffix(".tar"))
    subprocess.run(words, cwd=tmp_path, check=True)
    listed = subprocess.run(["tar", "-tf", tmp_path.with_suffix(".tar")], capture_output=True, text=True)
    assert sorted(listed.stdout.split()) == ["./", "./mcm_jax/", "./mcm_jax/file"]


def test_a_pod_is_deleted_only_on_request():
    create, *_, last = commands(launch("tpu_pod.sh", *POD, "--dry-run", "--", *IN_BUCKET))
    assert "--spot" not in create and " train " in last
    assert commands(launch("tpu_pod.sh", *POD, "--", *IN_BUCKET, MCM_DRY_RUN="1"))[0] == create


@pytest.mark.parametrize(
    ("type_", "version"),
    [("v4-32", "tpu-ubuntu2204-base"), ("v5p-16", "v2-alpha-tpuv5"), ("v6e-64", "v2-alpha-tpuv6e")],
)
def test_every_type_has_its_runtime(type_, version):
    create = commands(launch("tpu_pod.sh", *POD, f"--type={type_}", "--dry-run", "--", *IN_BUCKET))[0]
    assert f"--runtime-version={version} " in create
    create = commands(
        launch("tpu_pod.sh", *POD, f"--type={type_}", "--version=own", "--dry-run", "--", *IN_BUCKET)
    )[0]
    assert "--runtime-version=own " in create


# A slice of two hosts. Its state is in the files node and queue. Each line of plan tells how a program ends,
# and each line of plan.1 how it ends on host 1. Each line of create.errors, describe.errors or delete.errors
# is why one such call fails.
GCLOUD = r"""
echo "$*" >>"$TOOLS/calls"
verb=$([ "$1" = alpha ] && echo "$5" || echo "$4")
if [ -s "$TOOLS/$verb.errors" ]; then
  echo "ERROR: (gcloud.compute.tpus) $(sed -n 1p "$TOOLS/$verb.errors")" >&2
  sed -i 1d "$TOOLS/$verb.errors"
  exit 1
fi
[ "$1" != alpha ] || shift
absent() { echo "ERROR: (gcloud.compute.tpus) NOT_FOUND: Resource was not found" >&2; exit 1; }
case "$*" in
  "compute tpus tpu-vm describe"*) cat "$TOOLS/node" 2>/dev/null || absent ;;
  "compute tpus queued-resources describe"*failedData*) echo "no quota for v5e" ;;
  "compute tpus queued-resources describe"*)
    cat "$TOOLS/queue" 2>/dev/null || absent
    # Granted after two questions.
    if grep -qx WAITING_FOR_RESOURCES "$TOOLS/queue"; then
      echo PROVISIONING >"$TOOLS/queue"
    elif grep -qx PROVISIONING "$TOOLS/queue"; then
      echo ACTIVE >"$TOOLS/queue" && echo READY >"$TOOLS/node"
    fi ;;
  "compute tpus queued-resources create"*)
    [ ! -f "$TOOLS/queue" ]
    # Requests have other ends as long as the file of ends has lines.
    if [ -s "$TOOLS/ends" ]; then
      sed -n 1p "$TOOLS/ends" >"$TOOLS/queue" && sed -i 1d "$TOOLS/ends"
    else
      echo WAITING_FOR_RESOURCES >"$TOOLS/queue"
    fi ;;
  "compute tpus queued-resources delete"*) rm -rf "$TOOLS/queue" "$TOOLS/node" "$TOOLS"/host? ;;
  "compute tpus tpu-vm delete"*) rm -rf "$TOOLS/node" "$TOOLS"/host? ;;
  "compute tpus tpu-vm scp"* | "compute tpus queued-resources scp"*)
    cp "$5" "$TOOLS/host0" && cp "$5" "$TOOLS/host1" ;;
  "compute tpus tpu-vm ssh"* | "compute tpus queued-resources ssh"*)
    for word in "$@"; do
      case "$word" in --command=*) command="${word#*=}" ;; --worker=*) worker="${word#*=}" ;; esac
    done
    [ "$worker" = 0 ] && hosts=0 || hosts='0 1'
    running=()
    mkdir -p "$TOOLS/host0" "$TOOLS/host1"
    for host in $hosts; do
      (cd "$TOOLS/host$host" && HOME="$PWD" HOST=$host exec bash -c "$command") &
      running+=($!)
    done
    code=0
    # The connection is lost as soon as both hosts have the file that lost names.
    if [[ "$command" =~ tpu_host.sh\ (train|evaluate) ]] && [ -f "$TOOLS/lost" ]; then
      awaited=$(cat "$TOOLS/lost")
      rm "$TOOLS/lost"
      until [ -f "$TOOLS/host0/$awaited" ] && [ -f "$TOOLS/host1/$awaited" ]; do sleep 0.1; done
      kill "${running[@]}"
      exit 255
    fi
    for process in "${running[@]}"; do wait "$process" || code=1; done
    exit "$code" ;;
  *) echo "unknown: $*" >&2; exit 1 ;;
esac
"""

# A host's Python: training ends as the next line of plan says.
PYTHON = r"""
case "$*" in "-m mcm_jax."*) ;; *) exec python3 "$@" ;; esac
echo "$*" >>"$TOOLS/trained.$HOST"
echo "$JAX_PLATFORMS" >"$TOOLS/platforms"
plan="$TOOLS/plan.$HOST"
[ -f "$plan" ] || plan="$TOOLS/plan"
what=$(sed -n "$(wc -l <"$TOOLS/trained.$HOST")p" "$plan")
touch "$HOME/started"
case "$what" in
  done) echo "finished" ;;
  preempted) echo PREEMPTED >"$TOOLS/node"; echo SUSPENDED >"$TOOLS/queue"; sleep 0.3; exit 1 ;;
  deleted) rm "$TOOLS/node"; sleep 0.3; exit 1 ;;
  crash) exit 1 ;;
  unreachable) for _ in $(seq 100); do echo UNAVAILABLE >>"$TOOLS/describe.errors"; done; exit 1 ;;
  refused) echo "error: no such data" >&2; exit 2 ;;
  long) trap 'echo saved >>"$TOOLS/saved"; exit 130' TERM; for _ in $(seq 600); do sleep 0.1; done ;;
  found) until [ "$(grep -c "tpu_host.sh train" "$TOOLS/calls")" = 2 ]; do sleep 0.1; done
    sleep 1; echo "finished" ;;
esac
"""


@pytest.fixture
def tools(tmp_path):
    directory = tmp_path / "tools"
    (directory / "venv/bin").mkdir(parents=True)
    make_tool(directory, "gcloud", GCLOUD)
    make_tool(directory / "venv/bin", "python", PYTHON)
    make_tool(directory / "venv/bin", "pip", "exit 0")
    # Notices every 0.05 seconds, not every second, that the program has ended.
    make_tool(directory, "tail", f'exec {basics()}/tail --sleep-interval=0.05 "$@"')
    # As installed before.
    wanted = subprocess.run(
        "cat setup.cfg setup.py pyproject.toml launch/constraints.txt | cksum",
        shell=True,
        cwd=ROOT,
        capture_output=True,
    )
    (directory / "venv/installed-gcs,tpu").write_bytes(wanted.stdout)
    return directory


def pod_variables(tools):
    return {"TOOLS": str(tools), "MCM_VENV": str(tools / "venv"), "MCM_POLL_SECONDS": "0.05"}


def pod(tools, *plan, arguments=POD, run=("--", *IN_BUCKET), checkout=None):
    (tools / "plan").write_text("".join(f"{line}\n" for line in plan))
    how = {"tools": tools, "checkout": checkout or small_checkout(), **pod_variables(tools)}
    return launch("tpu_pod.sh", *arguments, *run, **how)


def requests(tools):
    """The requests that gcloud received, in order and in a word each, without questions about the state."""
    result = []
    for line in (tools / "calls").read_text().splitlines():
        words = line.removeprefix("alpha ").removeprefix("compute tpus ").split()
        command = re.search(r"tpu_host.sh (\w+)", line)
        if words[1] == "ssh":
            result.append(command[1] if command else "forget" if "rm -f .mcm_run.code" in line else "ask")
        elif words[1] != "describe":
            result.append(words[1])
    return result


def test_a_pod_is_created_and_trains(tools):
    result = pod(tools, "done", checkout=ROOT)
    assert result.returncode == 0, result.stderr
    assert requests(tools) == ["create", "forget", "scp", "install", "train"]
    trained = [(tools / f"trained.{host}").read_text() for host in (0, 1)]
    assert trained == [f"-m mcm_jax.train {' '.join(IN_BUCKET)}\n"] * 2
    assert result.stdout.count("finished") == 2
    assert "slice mcm: not there, its request: WAITING_FOR_RESOURCES" in result.stdout
    # The checkout is on every host, without its history.
    for host in (0, 1):
        assert (tools / f"host{host}/mcm_jax/mcm_jax/data/pipeline.py").exists()
        assert not (tools / f"host{host}/mcm_jax/.git").exists()


def test_an_existing_pod_is_used(tools):
    (tools / "node").write_text("READY\n")
    assert pod(tools, "done", arguments=(*POD, "--delete")).returncode == 0
    assert requests(tools) == ["forget", "scp", "install", "train", "delete"]


def test_a_preempted_pod_is_recreated_and_training_continues(tools):
    result = pod(tools, "preempted", "preempted", "done", arguments=(*POD, "--spot", "--attempts=1"))
    assert result.returncode == 0, result.stderr
    once = ["create", "forget", "scp", "install", "train", "ask", "delete"]
    assert requests(tools) == [*once, *once, *once[:5]]
    assert result.stdout.count("slice mcm was preempted; the run continues on another") == 2
    calls = (tools / "calls").read_text()
    assert calls.count("queued-resources delete mcm --force") == 2
    assert len(re.findall("queued-resources create .* --spot", calls)) == 3


def test_a_pod_found_preempted_is_recreated(tools):
    (tools / "node").write_text("PREEMPTED\n")
    assert pod(tools, "done").returncode == 0
    assert requests(tools) == ["delete", "create", "forget", "scp", "install", "train"]


def test_bad_input_is_not_tried_again(tools):
    result = pod(tools, "refused", "done")
    assert result.returncode == 2
    assert requests(tools) == ["create", "forget", "scp", "install", "train", "ask"]
    assert "error: no such data" in result.stdout
    assert result.stderr.splitlines()[-1] == "error: mcm_jax.train reports bad input, see above"


def test_it_does_not_try_for_ever(tools):
    result = pod(tools, "crash", "crash", "done", arguments=(*POD, "--attempts=2"))
    assert result.returncode == 1
    assert "mcm_jax.train failed 2 times in a row without a preemption" in result.stderr
    assert requests(tools) == ["create", *["forget", "scp", "install", "train", "ask"] * 2]


def test_a_run_survives_a_lost_connection_and_is_found_again(tools):
    (tools / "lost").write_text("started")
    result = pod(tools, "found", "never")
    assert result.returncode == 0, result.stderr + result.stdout
    assert requests(tools).count("train") == 2
    assert all(len((tools / f"trained.{host}").read_text().splitlines()) == 1 for host in (0, 1))


def runs(tools):
    """How often the program was started on each host."""
    return [len((tools / f"trained.{host}").read_text().splitlines()) for host in (0, 1)]


EVALUATION = ("--program=evaluate", "--", "--workdir=gs://b/runs/cd4")


def test_what_ends_while_the_connection_is_lost_is_not_started_again(tools):
    """Training would notice by itself that it is finished; an evaluation would begin again."""
    (tools / "lost").write_text(".mcm_run.code")
    result = pod(tools, "done", "done", run=EVALUATION)
    assert result.returncode == 0, result.stderr
    assert requests(tools) == [
        "create",
        "forget",
        "scp",
        "install",
        "evaluate",
        "ask",
        "scp",
        "install",
        "evaluate",
    ]
    assert runs(tools) == [1, 1] and "finished" in result.stdout
    # Who gives the command again wants another run.
    assert pod(tools, "done", "done", run=EVALUATION).returncode == 0
    assert runs(tools) == [2, 2]


@pytest.mark.parametrize("lost", [False, True])
def test_a_host_that_has_finished_starts_again_if_another_has_failed(lost, tools):
    """The other could not run without it."""
    if lost:
        (tools / "lost").write_text(".mcm_run.code")
    (tools / "plan.1").write_text("crash\ndone\n")
    result = pod(tools, "done", "done", run=EVALUATION)
    assert result.returncode == 0, result.stderr
    assert runs(tools) == [2, 2]
    assert re.search(r"mcm_jax.evaluate has failed \(exit codes of the hosts: (0 1|1 0)\)", result.stdout)


def test_bad_input_on_any_host_is_not_tried_again(tools):
    (tools / "plan.1").write_text("refused\n")
    result = pod(tools, "crash", "done")
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: mcm_jax.train reports bad input, see above"


@pytest.mark.parametrize("code", [0, 2])
def test_the_end_of_an_earlier_program_says_nothing_about_this_one(code, tools):
    (tools / "node").write_text("READY\n")
    for host in (0, 1):
        (tools / f"host{host}").mkdir()
        (tools / f"host{host}/.mcm_run.code").write_text(f"{code}\n")
    result = pod(tools, "never", arguments=(*POD, "--attempts=2", "--setup=false"))
    assert result.returncode == 1
    assert requests(tools) == ["forget", "scp", "install", "ask", "scp", "install", "ask"]
    assert "mcm_jax.train failed 2 times in a row without a preemption" in result.stderr


def waits(tools):
    """From now on the launcher's long waits are noted, and none takes long."""
    make_tool(
        tools, "sleep", f'[ "${{1%.*}}" -lt 60 ] || echo "$1" >>"{tools}/waits"; exec {basics()}/sleep 0.05'
    )


def test_a_failed_request_is_made_again_after_a_pause(tools):
    waits(tools)
    (tools / "ends").write_text("FAILED\n" * 3)
    result = pod(tools, "done")
    assert result.returncode == 0, result.stderr
    assert requests(tools) == [*["create", "delete"] * 3, "create", "forget", "scp", "install", "train"]
    assert (tools / "waits").read_text().split() == ["60", "120", "240"]
    assert "slice mcm: the request failed: no quota for v5e; asking again in 60 seconds" in result.stderr


def test_requests_that_fail_again_and_again_end_the_launcher(tools):
    waits(tools)
    (tools / "ends").write_text("FAILED\n" * 100)
    result = pod(tools, "done")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: slice mcm: 8 requests in a row failed; the last time, the request failed: no quota for v5e; "
        "ask for quota, or choose another --zone or --type"
    )
    assert (tools / "waits").read_text().split() == ["60", "120", "240", "480", "960", "1800", "1800"]


QUOTA = "RESOURCE_EXHAUSTED: Quota limit exceeded"


def test_a_request_that_is_refused_at_once_is_made_again_after_a_pause(tools):
    waits(tools)
    (tools / "create.errors").write_text(f"{QUOTA}\n" * 2)
    result = pod(tools, "done")
    assert result.returncode == 0, result.stderr
    assert requests(tools) == [*["create", "delete"] * 2, "create", "forget", "scp", "install", "train"]
    assert (tools / "waits").read_text().split() == ["60", "120"]
    reason = f"the request failed: ERROR: (gcloud.compute.tpus) {QUOTA}"
    assert f"slice mcm: {reason}; asking again in 60 seconds" in result.stderr


def test_requests_that_are_refused_again_and_again_end_the_launcher(tools):
    waits(tools)
    (tools / "create.errors").write_text(f"{QUOTA}\n" * 100)
    result = pod(tools, "done")
    assert result.returncode == 1
    assert requests(tools) == [*["create", "delete"] * 7, "create"]
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: slice mcm: 8 requests in a row failed; the last time, ") and QUOTA in last


def test_a_question_that_fails_is_asked_again(tools):
    (tools / "describe.errors").write_text("UNAVAILABLE: connection reset\n" * 4)
    result = pod(tools, "done")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("UNAVAILABLE: connection reset") == 4


def test_questions_that_fail_again_and_again_end_the_launcher(tools):
    (tools / "describe.errors").write_text("PERMISSION_DENIED\n" * 100)
    result = pod(tools, "done")
    assert result.returncode == 1 and result.stderr.count("PERMISSION_DENIED") == 6
    last = result.stderr.splitlines()[-1]
    assert last == "error: gcloud compute tpus tpu-vm describe mcm failed 6 times in a row, see above"
    assert "create" not in requests(tools)


def test_an_end_whose_circumstances_are_unknown_is_no_preemption(tools):
    result = pod(tools, "unreachable")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: gcloud compute tpus tpu-vm describe mcm failed")
    assert "preempted" not in result.stdout


def test_what_is_already_gone_is_deleted(tools):
    waits(tools)
    (tools / "queue").write_text("SUSPENDED\n")
    (tools / "delete.errors").write_text("NOT_FOUND: Resource was not found\n")
    result = pod(tools, "done", arguments=(*POD, "--delete"))
    assert result.returncode == 0, result.stderr
    assert requests(tools)[:3] == ["delete", "delete", "create"] and not (tools / "waits").exists()


def test_what_cannot_be_deleted_is_tried_again_after_a_pause(tools):
    waits(tools)
    (tools / "queue").write_text("SUSPENDED\n")
    (tools / "delete.errors").write_text("FAILED_PRECONDITION: busy\n" * 2)
    result = pod(tools, "done")
    assert result.returncode == 0, result.stderr
    assert requests(tools)[:4] == ["delete", "delete", "delete", "create"]
    assert (
        "slice mcm: it could not be deleted: ERROR: (gcloud.compute.tpus) FAILED_PRECONDITION: busy;"
        in result.stderr
    )


def test_a_slice_that_is_not_deleted_at_the_end_is_reported(tools):
    (tools / "delete.errors").write_text("FAILED_PRECONDITION: busy\n")
    result = pod(tools, "done", arguments=(*POD, "--delete"))
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == (
        "error: the run is finished, but slice mcm could not be deleted and may still cost money: "
        "ERROR: (gcloud.compute.tpus) FAILED_PRECONDITION: busy"
    )


def test_a_request_whose_slice_is_gone_is_made_again(tools):
    waits(tools)
    (tools / "queue").write_text("ACTIVE\n")
    result = pod(tools, "done")
    assert result.returncode == 0, result.stderr
    assert "slice mcm: the request is ACTIVE, but its slice is gone; asking again" in result.stderr
    assert requests(tools) == ["delete", "create", "forget", "scp", "install", "train"]


def test_a_slice_that_is_deleted_during_a_run_is_requested_again(tools):
    waits(tools)
    result = pod(tools, "deleted", "done")
    assert result.returncode == 0, result.stderr
    assert requests(tools).count("create") == 2
    assert "but its slice is gone" in result.stderr


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("evaluate", ["--workdir=gs://b/runs/cd4"]),
        ("sample", ["--workdir=gs://b/runs/cd4", "--out=gs://b/x.png"]),
        ("prepare", ["--dataset=openmoji", "--data_dir=gs://b/data"]),
    ],
)
def test_other_programs_than_training_run_on_a_pod(program, arguments, tools):
    result = pod(tools, "done", run=(f"--program={program}", "--", *arguments))
    assert result.returncode == 0, result.stderr
    assert requests(tools) == ["create", "forget", "scp", "install", program]
    # Preparing is work of one host, whose TPUs would wait for those of the others.
    alone = program == "prepare"
    assert (tools / "trained.0").read_text() == f"-m mcm_jax.{program} {' '.join(arguments)}\n"
    assert (tools / "trained.1").exists() != alone
    assert (tools / "platforms").read_text().strip() == ("cpu" if alone else "tpu,cpu")


def test_hosts_refuse_a_path_on_the_boot_disk(tools):
    """Although --setup could have mounted something there."""
    run = ("--setup=true", "--", RUN[0], "--workdir=/data/runs/cd4")
    result = pod(tools, "never", run=run)
    assert result.returncode == 2
    assert requests(tools) == ["create", "forget", "scp", "storage", "ask"]
    assert "error: /data/runs/cd4 is on the boot disk, which is lost with the slice" in result.stderr


@pytest.mark.skipif(
    os.stat("/dev/shm").st_dev == os.stat("/").st_dev, reason="needs a file system beside that of /"
)
def test_hosts_accept_a_path_on_another_disk(tools):
    result = pod(tools, "done", run=("--setup=true", "--", RUN[0], "--workdir=/dev/shm/none/cd4"))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("state", ["fresh", "client", "mounted"])
def test_hosts_mount_a_share_with_what_the_images_have(state, tools):
    """They have neither the client of NFS nor `mount --mkdir`."""
    make_tool(tools, "mountpoint", f"[ {state} = mounted ]")
    make_tool(tools, "sudo", f'echo "$*" >>"{tools}/calls"')
    if state != "fresh":
        make_tool(tools, "mount.nfs", "")
    # The share is the directory /mnt/mcm, which this machine need not have.
    result = launch("tpu_host.sh", "mount", "10.0.0.2:/mcm", tools=tools, HOME=str(tools))
    done = (tools / "calls").read_text().splitlines() if state != "mounted" else []
    client = ["update", "install --yes nfs-common"] if state == "fresh" else []
    assert [line.partition(" -qq ")[2] for line in done if line.startswith("apt-get")] == client
    mounting = ["mkdir -p /mnt/mcm", "mount -t nfs 10.0.0.2:/mcm /mnt/mcm"] if state != "mounted" else []
    assert [line for line in done if not line.startswith("apt-get")] == mounting
    if not os.access("/mnt/mcm", os.W_OK):
        assert result.returncode == 2 and "may not write to 10.0.0.2:/mcm" in result.stderr
        assert (tools / ".mcm_run.code").read_text() == "2\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_leaves_the_pod(number, tools):
    (tools / "plan").write_text("long\n")
    process = subprocess.Popen(
        ["bash", small_checkout() / "launch/tpu_pod.sh", *POD, "--", *IN_BUCKET],
        env=environment(tools, **pod_variables(tools)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # As in a terminal; pytest in the background would pass on an ignored SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    until = time.monotonic() + 60
    while not all((tools / f"host{host}/started").exists() for host in (0, 1)):
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(0.5)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "stopped: the same command continues" in said
    assert (tools / "saved").read_text() == "saved\n" * 2
    assert requests(tools)[-2:] == ["train", "stop"]


# SLURM.


# What follows srun's own options: the task, which the imitation runs.
SRUN = "--kill-on-bad-exit=1 --gpu-bind=none --cpus-per-task=8"


def slurm(tmp_path, code):
    make_tool(
        tmp_path, "srun", f'echo "$*" >>"{tmp_path}/calls"; shift 3; SLURM_PROCID=0 SLURM_NTASKS=1 exec "$@"'
    )
    make_tool(tmp_path, "scontrol", f'echo "$*" >>"{tmp_path}/calls"')
    make_tool(tmp_path, "pip", "")
    (tmp_path / "venv/bin").mkdir(parents=True)
    make_tool(tmp_path / "venv/bin", "python", f'[ "${{2:-}}" != mcm_jax.train ] || exit {code}')
    make_tool(tmp_path / "venv/bin", "pip", "")
    job = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "MCM_VENV": str(tmp_path / "venv")}
    result = launch("slurm.sbatch", *RUN, tools=tmp_path, **job)
    return result, (tmp_path / "calls").read_text().splitlines()


@pytest.mark.parametrize("code", [0, 1, 2, 130, 143])
def test_a_stopped_slurm_job_is_queued_again(code, tmp_path):
    """143 is the end of a program without a handler of SIGTERM, such as an evaluation."""
    result, calls = slurm(tmp_path, code)
    assert result.returncode == (0 if code in (130, 143) else code)
    assert calls[0] == f"{SRUN} bash launch/slurm.sbatch --task python -m mcm_jax.train {' '.join(RUN)}"
    assert calls[1:] == (["requeue 7"] if code in (130, 143) else [])
    assert not list(ROOT.glob("slurm-*"))


def test_the_commands_of_a_slurm_job():
    *install, run = commands(launch("slurm.sbatch", "--dry-run", *RUN))
    assert install[1].endswith("--editable .[gpu]")
    task = f"bash launch/slurm.sbatch --task python -m mcm_jax.train {' '.join(RUN)}"
    assert run == f"srun {SRUN} {task}"


@pytest.mark.parametrize(
    ("program", "arguments", "tasks"),
    [("evaluate", ["--workdir=x"], ""), ("prepare", ["--dataset=openmoji"], "--nodes=1 --ntasks=1 ")],
)
def test_other_programs_than_training_run_on_slurm(program, arguments, tasks):
    given = ("--dry-run", f"--program={program}", *arguments)
    task = f"bash launch/slurm.sbatch --task python -m mcm_jax.{program} {' '.join(arguments)}"
    assert commands(launch("slurm.sbatch", *given))[-1] == f"srun {SRUN} {tasks}{task}"


def test_a_slurm_job_requests_a_task_for_each_gpu_and_a_warning():
    text = (ROOT / "launch/slurm.sbatch").read_text()
    # sbatch stops reading at the first line that is neither empty nor a comment.
    head = text[: text.index("\nset ")]
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)$", head, re.MULTILINE))
    assert asked["gpus-per-node"] == asked["ntasks-per-node"]
    assert re.fullmatch(r"TERM@\d+", asked["signal"])
    assert "#SBATCH --requeue\n" in head and text.count("#SBATCH") == head.count("#SBATCH")


def test_a_slurm_job_from_elsewhere(tmp_path):
    result = launch("slurm.sbatch", *RUN, SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path))
    assert result.returncode == 2
    assert (
        result.stderr
        == f"error: {tmp_path} is not the checkout; submit from there: sbatch launch/slurm.sbatch ...\n"
    )


# Kubernetes.

# The fields of JobSet that the manifests use, as in its definition; others are refused.
JOBSET = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "additionalProperties": False,
    "properties": {
        "apiVersion": {"const": "jobset.x-k8s.io/v1alpha2"},
        "kind": {"const": "JobSet"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["replicatedJobs"],
            "additionalProperties": False,
            "properties": {
                "network": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "enableDNSHostnames": {"type": "boolean"},
                        "publishNotReadyAddresses": {"type": "boolean"},
                    },
                },
                "failurePolicy": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "maxRestarts": {"type": "integer"},
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "required": ["action", "name"],
                                "additionalProperties": False,
                                "properties": {
                                    "name": {
                                        "type": "string",
                                        "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$",
                                    },
                                    "action": {
                                        "enum": [
                                            "FailJobSet",
                                            "RestartJobSet",
                                            "RestartJobSetAndIgnoreMaxRestarts",
                                        ]
                                    },
                                    "onJobFailureReasons": {
                                        "type": "array",
                                        "items": {"const": "PodFailurePolicy"},
                                    },
                                },
                            },
                        },
                    },
                },
                "replicatedJobs": {
                    "type": "array",
                    "minItems": 1,
                    "items": {
                        "type": "object",
                        "required": ["name", "template"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string"},
                            "replicas": {"type": "integer"},
                            "template": {"type": "object"},
                        },
                    },
                },
            },
        },
    },
}


def manifest(*arguments):
    """The manifest of a dry run, checked against Kubernetes' own definition of a Job."""
    result = launch(
        "gke/train.sh", *arguments, "--dry-run", "--", *RUN, '--config.model.widths=(64, "\\1", ${NAME})'
    )
    assert result.returncode == 0, result.stderr
    (found,) = yaml.safe_load_all(result.stdout)
    jsonschema.validate(found, JOBSET)
    (job,) = found["spec"]["replicatedJobs"]
    whole = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    kubernetes_validate.validate(whole, kubernetes_validate.latest_version(), strict=True)
    assert "${" not in re.sub(r"^ *args:.*", "", result.stdout, flags=re.MULTILINE)
    return found, job


def pod_of(job):
    return job["template"]["spec"]["template"]["spec"]


def check_restarts(found, job):
    """All pods restart together: after every preemption, and a few times after other failures."""
    policy = found["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (rule,) = policy["rules"]
    assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    spec = job["template"]["spec"]
    # The pods of other nodes than the preempted one have stopped without that condition.
    codes = {"containerName": pod_of(job)["containers"][0]["name"], "operator": "In", "values": [130, 143]}
    assert spec["podFailurePolicy"]["rules"] == [
        {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "FailJob", "onExitCodes": codes},
    ]
    # When a node vanishes, the other pods fail before its own has that condition. Each is replaced once, and
    # the replacements wait for it. A second failure is the end of the job.
    assert spec["backoffLimitPerIndex"] == 1 and spec["maxFailedIndexes"] == 0 and "backoffLimit" not in spec
    assert spec["completionMode"] == "Indexed" and "podReplacementPolicy" not in spec
    assert spec["parallelism"] == spec["completions"]
    assert pod_of(job)["restartPolicy"] == "Never" and pod_of(job)["terminationGracePeriodSeconds"] >= 120


def check_container(job, image):
    (container,) = pod_of(job)["containers"]
    assert container["image"] == image
    assert container["command"] == ["python", "-m", "mcm_jax.train"]
    assert container["args"] == [*RUN, '--config.model.widths=(64, "\\1", ${NAME})']
    (volume,) = [volume for volume in pod_of(job)["volumes"] if "persistentVolumeClaim" in volume]
    assert volume["persistentVolumeClaim"] == {"claimName": "shared"}
    assert {"name": volume["name"], "mountPath": "/mnt/mcm"} in container["volumeMounts"]
    return container


def test_slices_of_tpu():
    found, job = manifest(*TPU, "--slices=2")
    check_restarts(found, job)
    container = check_container(job, "r/mcm_jax:tpu")
    assert found["metadata"]["name"] == "cd4"
    assert found["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert job["replicas"] == 2 and job["template"]["spec"]["parallelism"] == 8
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod_of(job)["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    # GKE names the processes; our variables would take precedence.
    assert not container.get("env")


def test_nodes_with_gpus():
    found, job = manifest(*GPU)
    check_restarts(found, job)
    container = check_container(job, "r/mcm_jax:gpu")
    assert job["replicas"] == 1 and job["template"]["spec"]["parallelism"] == 4
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    assert pod_of(job)["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    variables = {variable.pop("name"): variable for variable in container["env"]}
    index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    port = container["ports"][0]["containerPort"]
    assert variables == {
        "MCM_COORDINATOR": {"value": f"cd4-{job['name']}-0-0.cd4:{port}"},
        "MCM_NUM_PROCESSES": {"value": "4"},
        "MCM_PROCESS_ID": {"valueFrom": {"fieldRef": {"fieldPath": index}}},
    }


@pytest.mark.parametrize("kind", [TPU, GPU])
def test_a_bucket_needs_no_claim(kind):
    given = [argument for argument in kind if not argument.startswith("--claim=")]
    result = launch("gke/train.sh", *given, "--dry-run", "--", *IN_BUCKET)
    assert result.returncode == 0, result.stderr
    assert "/mnt/mcm" not in result.stdout and "persistentVolumeClaim" not in result.stdout
    (job,) = yaml.safe_load(result.stdout)["spec"]["replicatedJobs"]
    spec = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job["template"]}
    kubernetes_validate.validate(spec, kubernetes_validate.latest_version(), strict=True)
    mounts = {mount["name"] for mount in pod_of(job)["containers"][0].get("volumeMounts", [])}
    assert mounts == {volume["name"] for volume in pod_of(job).get("volumes", [])}


@pytest.mark.parametrize(("kind", "chips"), [(TPU, {"google.com/tpu": 4}), (GPU, {"nvidia.com/gpu": 8})])
def test_pods_with_requests_an_account_and_a_queue(kind, chips):
    options = ("--cpu=24", "--memory=80Gi", "--service-account=trainer", "--queue=team")
    found, job = manifest(*kind, *options)
    requested = pod_of(job)["containers"][0]["resources"]["requests"]
    assert requested == {**chips, "cpu": 24, "memory": "80Gi"}
    assert pod_of(job)["serviceAccountName"] == "trainer"
    assert found["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    found, job = manifest(*kind)
    assert pod_of(job)["containers"][0]["resources"]["requests"] == chips
    assert "serviceAccountName" not in pod_of(job) and "labels" not in found["metadata"]


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("evaluate", ["--workdir=gs://b/x"]),
        ("sample", ["--workdir=gs://b/x", "--out=gs://b/x.png"]),
        ("prepare", ["--dataset=openmoji", "--data_dir=gs://b/data"]),
    ],
)
def test_other_programs_than_training_run_on_gke(program, arguments):
    given = (*GPU, "--hosts=1", f"--program={program}", "--dry-run", "--", *arguments)
    (job,) = yaml.safe_load(launch("gke/train.sh", *given).stdout)["spec"]["replicatedJobs"]
    (container,) = pod_of(job)["containers"]
    assert container["command"] == ["python", "-m", f"mcm_jax.{program}"]
    assert container["args"] == arguments


@pytest.mark.parametrize("kind", [TPU, GPU])
def test_spot_nodes(kind):
    assert pod_of(manifest(*kind, "--spot")[1])["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert "cloud.google.com/gke-spot" not in pod_of(manifest(*kind)[1])["nodeSelector"]


def test_a_manifest_is_applied(tmp_path):
    make_tool(tmp_path, "kubectl", f'echo "$*" >"{tmp_path}/calls"; cat >"{tmp_path}/manifest"')
    result = launch("gke/train.sh", *GPU, "--", *RUN, tools=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "calls").read_text() == "apply --filename=-\n"
    printed = launch("gke/train.sh", *GPU, "--dry-run", "--", *RUN).stdout
    assert yaml.safe_load((tmp_path / "manifest").read_text()) == yaml.safe_load(printed)


# Containers.


@pytest.mark.parametrize(
    ("accelerator", "devices"),
    [("cpu", []), ("gpu", ["--gpus=all"]), ("tpu", ["--privileged", "--network=host"])],
)
def test_an_image_is_built_pushed_and_run(accelerator, devices):
    given = ("--image=r/x:1", "--push", "--dry-run", "--", "python", "-m", "mcm_jax.train")
    build, push, _, run = commands(launch("docker.sh", *given, MCM_ACCELERATOR=accelerator))
    assert build == f"docker build --build-arg ACCELERATOR={accelerator} --tag r/x:1 ."
    assert push == "docker push r/x:1"
    assert run.startswith("docker run --rm --init ") and run.endswith(" r/x:1 python -m mcm_jax.train")
    assert set(devices) <= set(run.split())
    for directory in ("data", "runs"):
        assert f"--volume {ROOT}/{directory}:/opt/mcm_jax/{directory}" in run


def test_an_image_is_only_built_by_default():
    assert commands(launch("docker.sh", "--dry-run")) == [
        "docker build --build-arg ACCELERATOR=cpu --tag mcm_jax:cpu ."
    ]


def test_docker_is_called(tmp_path):
    make_tool(tmp_path, "docker", f'echo "$*" >>"{tmp_path}/calls"')
    assert launch("docker.sh", tools=tmp_path).returncode == 0
    assert (tmp_path / "calls").read_text() == "build --build-arg ACCELERATOR=cpu --tag mcm_jax:cpu .\n"


def test_the_image_is_installed_by_the_launchers_function():
    """All files that the installation reads exist and are copied before it."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    steps = [line.split(None, 1) for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    install = next(number for number, (step, rest) in enumerate(steps) if step == "RUN")
    # Every variant of the image reads and writes buckets.
    assert "mcm_environment gcs" in steps[install][1]
    copied = [word for step, rest in steps[:install] if step == "COPY" for word in rest.split()[:-1]]
    needed = {"setup.cfg", "setup.py", "pyproject.toml", "launch/constraints.txt", "launch/environment.sh"}
    # setup.py names configs/ as a package, setup.cfg reads the version.
    assert needed | {"configs/__init__.py", "mcm_jax/__init__.py"} <= set(copied)
    assert all((ROOT / path).exists() for path in copied)
    assert ["COPY", ". ."] in steps[install:]
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", "/data", "/runs", ".venv*"} <= set(ignored)
    assert json.loads(dict(steps)["CMD"])[:3] == ["python", "-m", "mcm_jax.train"]


def test_the_page_of_clusters_has_every_variable_and_no_other():
    page = (ROOT / "docs/clusters.md").read_text()
    rows = page[page.index("## Variables") :]
    used = set()
    for pattern in ("mcm_jax/**/*.py", "launch/**/*", "tests/**/*.py", "Dockerfile"):
        for path in ROOT.glob(pattern):
            if path.is_file() and path.suffix != ".pyc":
                used |= set(re.findall(r"\bMCM_[A-Z_]+\b", path.read_text()))
    assert used == set(re.findall(r"`(MCM_[A-Z_]+)", rows))
