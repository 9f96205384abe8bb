"""Processes that start quickly: forks of a process that has already imported the libraries.

In a new interpreter, importing JAX and Orbax takes longer than most tests. There are two parents
with different hash seeds, so that the processes of one program iterate over sets in different orders, as they
would on two hosts.
"""

import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]

# The parent imports the libraries, then forks a child for every request, with the request's environment,
# working directory and files. The child runs the request's code and exits like any interpreter.
_PARENT = """
import gc, json, os, sys, warnings
import jax, numpy, scipy.linalg, matplotlib.figure, PIL.Image, safetensors.numpy
import mcm_jax.runs.trainer, mcm_jax.training.observer, mcm_jax.evaluation.evaluator, mcm_jax.data.preparation
import tests.tiny

def serve():
    # Returns only in children, with the code to run.
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # JAX warns of forks, but its backend has not started yet.
            pid = os.fork()
        if pid > 0:
            print(pid, flush=True)
            continue
        files = (os.devnull, "r"), (request["out"], "a"), (request["err"], "a")
        for number, (name, mode) in enumerate(files):
            with open(name, mode) as file:
                os.dup2(file.fileno(), number)
        os.environ.clear()
        os.environ.update(request["environment"])
        os.chdir(request["cwd"])
        sys.argv = ["-c", *request["arguments"]]
        return request["code"]
    os._exit(0)

# Otherwise a child that exits searches all objects of the libraries for garbage, and so copies their memory.
gc.collect()
gc.freeze()
print("ready", flush=True)
exec(compile(serve(), "<string>", "exec"), {"__name__": "__main__"})
"""


@functools.cache
def _parent(number: int) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(number + 1)}
    command = [sys.executable, "-c", _PARENT]
    parent = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout.readline() == "ready\n"
    return parent


def _request(number: int, **request) -> int | None:
    parent = _parent(number)
    print(json.dumps(request), file=parent.stdin, flush=True)
    return json.loads(parent.stdout.readline())


class Process:
    """A running `python -c CODE ARGUMENTS`, with the methods of subprocess.Popen that tests use."""

    def __init__(self, code, *arguments, out, err, environment=None, cwd=ROOT, parent=0):
        """Starts the process.

        Args:
          out, err: files to which stdout and stderr are appended.
          environment: variables to add to this process's environment.
          parent: number of the parent, taken modulo 2.
        """
        self._parent, self.returncode = parent % 2, None
        self.pid = _request(
            self._parent,
            code=code,
            arguments=[str(argument) for argument in arguments],
            out=str(out),
            err=str(err),
            environment=os.environ | (environment or {}),
            cwd=str(cwd),
        )

    def poll(self):
        """The exit code, negative after a signal; None while the process runs."""
        if self.returncode is None:
            self.returncode = _request(self._parent, wait=self.pid)
        return self.returncode

    def wait(self, timeout=300):
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(code, *arguments, **how) -> subprocess.CompletedProcess:
    """Runs `python -c CODE ARGUMENTS` to the end and captures its output; how: arguments of Process."""
    with tempfile.TemporaryDirectory() as directory:
        out, err = (Path(directory) / name for name in ("out", "err"))
        returncode = Process(code, *arguments, out=out, err=err, **how).wait()
        return subprocess.CompletedProcess(arguments, returncode, out.read_text(), err.read_text())


def program(name, *arguments, before="", **how) -> subprocess.CompletedProcess:
    """Runs `python -m mcm_jax.NAME ARGUMENTS` to the end, after code `before`, and captures its output."""
    code = f"{before}\nimport runpy; runpy.run_module('mcm_jax.{name}', run_name='__main__', alter_sys=True)"
    return run(code, *arguments, **how)
