"""Multi-process programs on this machine, as on the hosts of a cluster, but on CPUs and over loopback."""

import json
import os
import re
import socket
import subprocess
import time

from tests.forks import Process

# Prepended to the code of every member. `first_only` makes the other processes fail if they do what only the
# first process may do.
_PREAMBLE = """
import contextlib, json, os, sys, types
from pathlib import Path
import jax
from mcm_jax.runs import trainer
from mcm_jax.system import distributed, files, pictures, sharding
from mcm_jax.data import pipeline
from mcm_jax.system.errors import InputError
from mcm_jax.training import loop, observer, watchdog, writers
from tests import tiny

# JAX lets only the first process write compiled programs to its cache. On CPUs the keys of every process
# differ, so all others would compile everything in every test.
with contextlib.suppress(ImportError):
    from jax._src import compiler
    state = types.SimpleNamespace(process_id=0, client=None)
    compiler.distributed = types.SimpleNamespace(global_state=state)

INDEX = os.environ.get("MCM_PROCESS_ID", 0)  # jax.process_index() would start the backend.
# A separate file for Python's output, because Gloo writes to the process's stdout, in the middle of lines.
sys.stdout = open(Path(sys.argv[1]) / f"output.{INDEX}", "a", buffering=1)

def refuse(*_, **__):
    raise AssertionError("only the first process may do this")

def first_only():
    if jax.process_index() > 0:
        files.write_whole = files.append_line = observer.save_png = refuse
        writers.RecordWriter = refuse

def log(name, record):
    with open(Path(sys.argv[1]) / f"{name}.{INDEX}.jsonl", "a") as file:
        print(json.dumps(record), file=file)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Members:
    """The processes of one program; use it as a context manager, so that no process outlives a test."""

    def __init__(self, code, *, count, devices, directory, environment=None):
        """Starts the processes.

        Args:
          code: Python code that each process runs after the preamble.
          count: number of processes.
          devices: number of devices per process.
          directory: new directory for output and logs.
          environment: additional environment variables.
        """
        directory.mkdir()
        port = free_port()
        self.directory, self.processes = directory, []
        for index in range(count):
            variables = {
                # Follows the tests' own flags, because the last count wins.
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            }
            if count > 1:
                variables |= {
                    "MCM_COORDINATOR": f"127.0.0.1:{port}",
                    "MCM_NUM_PROCESSES": str(count),
                    "MCM_PROCESS_ID": str(index),
                }
            output, out, err = (directory / f"{stream}.{index}" for stream in ("output", "out", "err"))
            output.touch()
            process = Process(
                _PREAMBLE + code,
                directory,
                out=out,
                err=err,
                environment=variables | (environment or {}),
                parent=index,
            )
            self.processes.append(process)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, index, stream="output"):
        """What a process has printed so far; with stream="err", what it has written to stderr."""
        return (self.directory / f"{stream}.{index}").read_text()

    def wait_for(self, pattern, *, timeout=240):
        """Waits until the first process's output matches `pattern`."""
        until = time.monotonic() + timeout
        while not re.search(pattern, self.output(0)):
            assert time.monotonic() < until and self.processes[0].poll() is None, self.everything()
            time.sleep(0.05)

    def codes(self, *, timeout=300):
        """Waits for all processes and returns their exit codes; fails if they hang."""
        until = time.monotonic() + timeout
        try:
            return [process.wait(max(0.0, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the processes hang; {self.everything()}") from None

    def everything(self):
        files = sorted(self.directory.glob("*.*"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)


def logged(directory, name, index):
    """The records that a process has written with `log(name, ...)`."""
    return [json.loads(line) for line in (directory / f"{name}.{index}.jsonl").read_text().splitlines()]


# Runs a program with its own command line, after the preamble.
_PROGRAM = """
import runpy
place = sys.argv.pop()
sys.argv = ["program", *json.loads(ARGUMENTS)]
runpy.run_module("mcm_jax.PROGRAM", run_name="__main__")
"""


def program(name, *arguments, directory, count=2, before=""):
    """Runs `python -m mcm_jax.NAME ARGUMENTS` in every process; returns (exit codes, members).

    before: code that runs first.
    """
    code = before + _PROGRAM.replace("PROGRAM", name).replace("ARGUMENTS", repr(json.dumps(arguments)))
    with Members(code, count=count, devices=1, directory=directory) as members:
        return members.codes(), members
