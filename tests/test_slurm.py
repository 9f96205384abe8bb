"""launch/slurm.sbatch on a real SLURM: one made-up node on this machine."""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.members import free_port

ROOT = Path(__file__).parents[1]
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, PROGRAMS)),
    reason="needs SLURM (on Debian, apt-get install slurm-wlm) and root",
)

# Without accounts, encryption or limits on processes.
_CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/none
CredType=cred/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
GresTypes=gpu
ReturnToService=2
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 Gres=gpu:2
PartitionName=all Nodes=ALL Default=YES
"""

# A training that is told to stop ends with 130, its tasks a moment apart; once started again, it finishes.
_PYTHON = """#!/bin/bash
[ "${{2:-}}" = mcm_jax.train ] || exit 0
trap 'sleep "0.$SLURM_PROCID"; echo "task $SLURM_PROCID stops"; exit 130' TERM
echo "task $SLURM_PROCID of $SLURM_NTASKS with $SLURM_CPUS_PER_TASK CPUs, restart ${{SLURM_RESTART_COUNT:-0}}"
[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || exit 0
{then}
while true; do sleep 0.05; done
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The environment for SLURM's commands."""
    directory = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (directory / name).mkdir()
    ports = [free_port() for _ in range(2)]
    config = directory / "slurm.conf"
    config.write_text(_CONFIG.format(host=socket.gethostname(), ports=ports, directory=directory))
    for number in range(2):
        (directory / f"gpu{number}").touch()
    (directory / "gres.conf").write_text(f"Name=gpu File={directory}/gpu[0-1]\n")
    environment = {**os.environ, "SLURM_CONF": str(config)}
    servers = [
        subprocess.Popen(
            [program, "-D", "-f", str(config)],
            env=environment,
            stdout=(directory / f"{program}.log").open("w"),
            stderr=subprocess.STDOUT,
        )
        for program in ("slurmctld", "slurmd")
    ]
    try:
        wait_for(lambda: "idle" in run(environment, "sinfo", "--noheader", "--format=%T"))
        yield environment
    finally:
        for server in servers:
            server.terminate()
            server.wait(timeout=20)


def run(environment, *command):
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False).stdout


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def submit(environment, directory, *, then=":"):
    """Submits a job of two tasks; returns (job ID, function that reads its output)."""
    tools = directory / "venv/bin"
    tools.mkdir(parents=True)
    for name, code in (("python", _PYTHON.format(then=then)), ("pip", "#!/bin/sh\n")):
        (tools / name).write_text(code)
        (tools / name).chmod(0o755)
    output = directory / "out"
    sizes = ["--nodes=1", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--time=5"]
    command = ["sbatch", "--parsable", f"--output={output}", *sizes, "launch/slurm.sbatch"]
    result = subprocess.run(
        [*command, "--config=openmoji:teacher", f"--workdir={directory}/run"],
        env={**environment, "MCM_VENV": str(directory / "venv")},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip(), lambda: output.read_text() if output.exists() else ""


def state(environment, job):
    return run(environment, "squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T").strip()


def test_a_stopped_job_is_queued_again_and_finishes(cluster, tmp_path):
    job, output = submit(cluster, tmp_path)
    wait_for(lambda: output().count("restart 0") == 2)
    assert "task 0 of 2 with 1 CPUs" in output()
    run(cluster, "scancel", "--signal=TERM", job)
    # SLURM waits two minutes before it starts a job again.
    wait_for(lambda: state(cluster, job) == "COMPLETED", seconds=180)
    assert output().count("stops") == output().count("restart 1") == 2
    assert "stopped; queued again" in output()
    assert not list(ROOT.glob("slurm-*.stopped"))


def test_a_failed_task_ends_the_job(cluster, tmp_path):
    job, output = submit(cluster, tmp_path, then='[ "$SLURM_PROCID" = 0 ] || exit 1')
    wait_for(lambda: state(cluster, job) == "FAILED")
    assert "queued again" not in output()
