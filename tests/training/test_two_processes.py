"""Two processes: what is recorded of their training, and what they print if one of them hangs."""

import json

import pytest

from tests import members

CONFIG = """
from tests import tiny

def get_config(row):
    config = tiny.config("DATA")
    config.training.metrics_to = ("tensorboard", "json", "wandb")
    config.training.sample_every_steps = 4
    config.training.checkpoint_every_steps = 4
    return config
"""

# Process 1 waits for a batch that never comes; process 0 waits for process 1.
HANG = """
gather, alive = pipeline.ArraySource.gather, watchdog.Watchdog.alive
read = 0

def dead_mount(self, indices):
    global read
    read += 1
    if INDEX == "1" and read > 3:
        import threading
        threading.Event().wait(300)
    return gather(self, indices)

def soon(self, step):
    alive(self, step)
    self._limit = 3.0  # Compiling is over.

pipeline.ArraySource.gather, watchdog.Watchdog.alive = dead_mount, soon
with distributed.joined():
    config = tiny.config(Path(DATA))
    config.training.num_steps = 10**6
    trainer.train(config, Path(WORKDIR))
"""


def test_a_profile_the_goodput_json_lines_and_weights_and_biases(tiny_data, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, workdir = tmp_path / "tiny_config.py", tmp_path / "run"
    config.write_text(CONFIG.replace("DATA", str(tiny_data)))
    # Of two updates alone: a profile of a save or of a grid takes seconds to write.
    arguments = f"--config={config}:any", f"--workdir={workdir}", "--profile=1,1"
    codes, started = members.program("train", *arguments, directory=tmp_path / "logs")
    assert codes == [0, 0], started.everything()
    out = started.output(0)
    assert "% of the time on updates (goodput), " in out and not started.output(1)

    traces = {
        path.name.partition(".")[0]: path
        for path in workdir.glob("profile/plugins/profile/update_1/*.xplane.pb")
    }
    assert set(traces) == {"0", "1"}
    assert all(b"PjitFunction(update)" in path.read_bytes() for path in traces.values())

    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert all(line["seconds/data"] >= 0 for line in lines if "loss" in line)
    (shares,) = [line for line in lines if "share/updates" in line]
    assert sum(value for name, value in shares.items() if name.startswith("share/")) == pytest.approx(1)

    (offline,) = workdir.glob("wandb/offline-run-*/run-*.wandb")
    content = offline.read_bytes()
    assert (workdir / "wandb_id").read_bytes() in content
    for name in (b"gradient_norm", b"seconds/data", b"share/updates", b"optimizer.learning_rate"):
        assert name in content, name


def test_a_hang_ends_both_with_their_stacks(tiny_data, tmp_path):
    code = HANG.replace("DATA", repr(str(tiny_data))).replace("WORKDIR", repr(str(tmp_path / "run")))
    with members.Members(code, count=2, devices=1, directory=tmp_path / "logs") as started:
        codes = started.codes(timeout=120)
        # JAX may end the second one, whose coordinator is gone, while it waits for the first to print.
        assert codes[0] == 1 and codes[1] in (1, -6), (codes, started.everything())
        for index, waits in ((0, "device_get"), (1, "in dead_mount")):
            printed = started.output(index, "err")
            assert "error: training hangs on " in printed and "(the last was update " in printed
            assert waits in printed, printed
