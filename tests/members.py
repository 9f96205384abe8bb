"""Programs of several processes on this machine, as the hosts of a cluster run them, on CPU over loopback."""

import json
import os
import re
import socket
import subprocess
import time

from tests.forks import Process

# Written before the code of every member. What only the first process may do, the others can't.
_PREAMBLE = """
import json, os, sys
from pathlib import Path
import jax
from mcm_jax.runs import trainer
from mcm_jax.system import distributed, files, pictures, sharding
from mcm_jax.data import pipeline
from mcm_jax.system.errors import InputError
from mcm_jax.training import loop, observer
from tests import tiny

INDEX = os.environ.get("MCM_PROCESS_ID", 0)  # To ask JAX would start its back end.
# Gloo writes to the process's own output, in the middle of lines.
sys.stdout = open(Path(sys.argv[1]) / f"said.{INDEX}", "a", buffering=1)

def refuse(*_, **__):
    raise AssertionError("only the first process may do this")

def first_only():
    if jax.process_index() > 0:
        files.write_whole = files.append_line = observer.save_png = refuse
        observer.EventFileWriter = refuse

def log(name, record):
    with open(Path(sys.argv[1]) / f"{name}.{INDEX}.jsonl", "a") as file:
        print(json.dumps(record), file=file)
"""


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


class Members:
    """The processes of one program; use it as a context, so that none outlives a test."""

    def __init__(self, code, *, count, devices, directory, environment=None):
        """code: what each runs, after the preamble; devices: of each; directory: made for its `log`s."""
        directory.mkdir()
        port = free_port()
        self.directory, self.processes = directory, []
        for index in range(count):
            variables = {
                # After the tests' own flags: the last count holds.
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
            }
            if count > 1:
                variables |= {
                    "MCM_COORDINATOR": f"127.0.0.1:{port}",
                    "MCM_NUM_PROCESSES": str(count),
                    "MCM_PROCESS_ID": str(index),
                }
            said, out, err = (directory / f"{stream}.{index}" for stream in ("said", "out", "err"))
            said.touch()
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

    def said(self, index, stream="said"):
        """What a process has printed, or written to "err"."""
        return (self.directory / f"{stream}.{index}").read_text()

    def wait_for(self, pattern, *, timeout=240):
        """Until the first process has said it."""
        until = time.monotonic() + timeout
        while not re.search(pattern, self.said(0)):
            assert time.monotonic() < until and self.processes[0].poll() is None, self.everything()
            time.sleep(0.05)

    def codes(self, *, timeout=300):
        """The exit codes; fails where the processes hang."""
        until = time.monotonic() + timeout
        try:
            return [process.wait(max(0.0, until - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"they hang; {self.everything()}") from None

    def everything(self):
        files = sorted(self.directory.glob("*.*"))
        return "\n".join(f"== {path.name}\n{path.read_text()[-3000:]}" for path in files)


def logged(directory, name, index):
    """What a process has put there by `log(name, ...)`."""
    return [json.loads(line) for line in (directory / f"{name}.{index}.jsonl").read_text().splitlines()]


# A program's own command line, after the preamble.
_PROGRAM = """
import runpy
place = sys.argv.pop()
sys.argv = ["program", *json.loads(ARGUMENTS)]
runpy.run_module("mcm_jax.PROGRAM", run_name="__main__")
"""


def program(name, *arguments, directory, count=2):
    """Runs `python -m mcm_jax.NAME ARGUMENTS` in every process; returns (exit codes, members)."""
    code = _PROGRAM.replace("PROGRAM", name).replace("ARGUMENTS", repr(json.dumps(arguments)))
    with Members(code, count=count, devices=1, directory=directory) as members:
        return members.codes(), members
