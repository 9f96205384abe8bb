"""Train steps, sampling and features against PyTorch, eager and compiled, on one GPU.

    bash launch/gpu_check.sh

The network is that of ImageNet64 small, in bfloat16. PyTorch's is written independently; before anything is
timed, the losses and gradients of both are compared on a tiny network, on the CPU. Each library has a process
of its own; one after the other compiles, then they take turns. torch.compile runs in its default mode. In
bfloat16 programs, what remains in float32 uses TF32 in both libraries; features are computed in full float32
in both.

Writes one JSON file. A ratio below 1 means that JAX is faster. --small runs everything with a tiny network,
on any machine.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from tests.benchmarks import gpu_settings

# By variant, the process that runs it.
VARIANTS = {"jax": "jax", "torch eager": "torch", "torch.compile": "torch"}
CASES = ("ct", "cd", "sample", "features")
# Dense bfloat16 products, from NVIDIA's data sheets (SXM modules).
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}

_OUT = flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
_SMALL = flags.DEFINE_bool("small", False, "Use a tiny network and few turns.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images per train step and per sampling.", lower_bound=1)
_TURNS = flags.DEFINE_integer("turns", 7, "Turns of each variant that count.", lower_bound=1)
_TURN_SECONDS = flags.DEFINE_float("turn_seconds", 0.7, "Approximate duration of a turn.", lower_bound=0.0)
_CASES = flags.DEFINE_list("cases", list(CASES), f"Some of {', '.join(CASES)}.")
_COMPILED = flags.DEFINE_bool("compiled", True, "Include torch.compile.")
_TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", sys.executable, "The interpreter of the environment that has PyTorch."
)
_SERVE = flags.DEFINE_enum(
    "serve", None, sorted(set(VARIANTS.values())), "Internal: be one of the processes."
)

# Runs a program several times and waits for the last result.
Run = Callable[[int], None]


def main(_: list[str]) -> None:
    """The parent, or with --serve one of its processes."""
    if _SERVE.value is not None:
        _serve(_SERVE.value)
        return
    servers, record = {}, {}
    for name in sorted(set(VARIANTS.values())):
        servers[name] = _start(name)
        # Waits until its programs are compiled: XLA chooses kernels by their time on the GPU.
        line = servers[name].stdout.readline()
        if not line:
            sys.exit(f"error: the process of {name} has ended before its first answer")
        record[name] = json.loads(line)
    _check_devices(record["jax"]["platform"], record["torch"]["platform"])
    variants = [name for name in VARIANTS if _COMPILED.value or name != "torch.compile"]
    results: dict[str, Any] = {}
    record |= {"batch_size": _BATCH_SIZE.value, "turns": _TURNS.value, "results": results}
    Path(_OUT.value).parent.mkdir(parents=True, exist_ok=True)
    for case in _CASES.value:
        results[case] = _compare(servers, case, variants)
        _derive(record, case)
        Path(_OUT.value).write_text(json.dumps(record, indent=1) + "\n")
    for server in servers.values():
        server.kill()
    _print(record)
    if any("error" in found for case in results.values() for found in case.values()):
        sys.exit(1)


def _check_devices(ours: str, theirs: str) -> None:
    """Refuses a comparison of a GPU with a CPU, and one of two CPUs as if they were GPUs."""
    if ours != theirs or (ours != "gpu" and not _SMALL.value):
        sys.exit(f"error: JAX runs on a {ours} and PyTorch on a {theirs}; install both for the GPU")


def _start(name: str) -> subprocess.Popen:
    # JAX would otherwise take three quarters of the memory at its start.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    python = _TORCH_PYTHON.value if name == "torch" else sys.executable
    command = [python, "-m", "tests.benchmarks.gpu", *sys.argv[1:], f"--serve={name}"]
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def _ask(server: subprocess.Popen, variant: str, case: str, count: int) -> dict[str, Any]:
    try:
        server.stdin.write(json.dumps([variant, case, count]) + "\n")
        line = server.stdout.readline()
    except BrokenPipeError:
        line = ""
    return json.loads(line) if line else {"error": f"the process of {variant} has ended"}


def _compare(servers: dict[str, subprocess.Popen], case: str, variants: list[str]) -> dict[str, Any]:
    """By variant: seconds per call of every turn, or an error."""
    found: dict[str, Any] = {}
    counts = {}
    for variant in variants:
        # The second answer estimates how many calls fill a turn.
        for count in (1, 2):
            found[variant] = _ask(servers[VARIANTS[variant]], variant, case, count)
        if "error" not in found[variant]:
            counts[variant] = max(1, round(_TURN_SECONDS.value / found[variant]["seconds"]))
            found[variant]["turns"] = []
    for turn in range(_TURNS.value):
        for variant in variants if turn % 2 else reversed(variants):
            if variant in counts and "error" not in found[variant]:
                answer = _ask(servers[VARIANTS[variant]], variant, case, counts[variant])
                if "error" in answer:
                    found[variant] = answer
                else:
                    found[variant]["turns"].append(answer["seconds"])
    return found


def _derive(record: dict[str, Any], case: str) -> None:
    """Adds medians, images per second, shares of the card's peak, and ratios of JAX's time to the others'."""
    variants = record["results"][case]
    device = record["jax"]["device"]
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
    ours = variants["jax"].get("turns")
    images = record["batch_size"]
    if case == "features":
        images = gpu_settings.features_batch(small=_SMALL.value)
    flops = record["torch"]["flops"].get(case)
    for found in variants.values():
        if "error" in found:
            continue
        del found["seconds"]
        seconds = found["median_seconds"] = statistics.median(found["turns"])
        found["images_per_second"] = images / seconds
        if flops is not None:
            found["tflops_per_second"] = flops / seconds / 1e12
            found["share_of_peak"] = None if peak is None else flops / seconds / peak
        if ours:
            ratios = [a / b for a, b in zip(ours, found["turns"], strict=True)]
            found["ratio"] = [statistics.median(ratios), min(ratios), max(ratios)]


def _print(record: dict[str, Any]) -> None:
    print(f"{record['jax']['device']}, batch {record['batch_size']}")
    columns = "".join(f"{name:>10}" for name in ("ms", "images/s", "TFLOP/s", "of peak"))
    print(f"{'':<25}{columns}  JAX's time / this (least, most)")
    for case, variants in record["results"].items():
        for variant, found in variants.items():
            if "error" in found:
                print(f"{case:<10}{variant:<15}{found['error']}")
                continue
            rate, share = found.get("tflops_per_second"), found.get("share_of_peak")
            columns = (
                f"{1e3 * found['median_seconds']:.2f}",
                f"{found['images_per_second']:.1f}",
                "" if rate is None else f"{rate:.1f}",
                "" if share is None else f"{share:.1%}",
            )
            ratios = "{:.3f} ({:.3f}, {:.3f})".format(*found["ratio"]) if "ratio" in found else ""
            print(f"{case:<10}{variant:<15}{''.join(f'{column:>10}' for column in columns)}  {ratios}")


def _serve(name: str) -> None:
    """Prints a description, then answers every line [variant, case, count] with seconds per call."""
    # Libraries print on stdout too.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if name == "jax":
        from tests.benchmarks import gpu_jax as programs
    else:
        from tests.benchmarks import gpu_torch as programs
    server = programs.Programs(small=_SMALL.value, batch_size=_BATCH_SIZE.value)
    runs: dict[tuple[str, str], Run] = {}
    failed: dict[tuple[str, str], str] = {}
    for variant, process in VARIANTS.items():
        if process != name or (variant == "torch.compile" and not _COMPILED.value):
            continue
        for case in _CASES.value:
            begin = time.perf_counter()
            try:
                runs[variant, case] = server.program(variant, case)
                runs[variant, case](1)
            except Exception as error:
                failed[variant, case] = f"{type(error).__name__}: {error}"[:500]
            took = time.perf_counter() - begin
            print(f"{variant}, {case}: first call after {took:.1f} s", file=sys.stderr, flush=True)
    print(json.dumps(server.description()), file=answers)
    for line in sys.stdin:
        variant, case, count = json.loads(line)
        if (variant, case) in failed:
            print(json.dumps({"error": failed[variant, case]}), file=answers)
            continue
        begin = time.perf_counter()
        try:
            runs[variant, case](count)
            answer = {"seconds": (time.perf_counter() - begin) / count}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    app.run(main)
