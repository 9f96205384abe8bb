"""Several processes sample and evaluate together what one does alone, and agree on what that is."""

import json
import shutil

import numpy as np

from mcm_jax.runs.run import load_run
from tests.evaluation import pixels
from tests.members import Members, logged, program


def test_several_sample_what_one_does(teacher, tmp_path):
    arguments = (f"--workdir={teacher}", "--num=5", f"--out={tmp_path / 'x.npz'}")
    codes, members = program("sample", *arguments, directory=tmp_path / "logs")
    assert codes == [0, 0], members.everything()
    assert "5 images" in members.output(0) and not members.output(1)
    images, labels = load_run(teacher).sample(5)
    with np.load(tmp_path / "x.npz") as found:
        np.testing.assert_array_equal(found["arr_1"], labels)
        assert np.abs(found["arr_0"].astype(int) - images).max() <= 1


def test_several_evaluate_what_one_does(teacher, tmp_path):
    """One result, one voice, from the same features; the second time nothing is measured."""
    arguments = [f"--workdir={tmp_path / 'run'}", "--num=6", "--untrained_num=4", "--metrics=frechet,nearest"]
    shutil.copytree(teacher, tmp_path / "run")

    def evaluated(name, count):
        how = {"count": count, "directory": tmp_path / f"logs {name}", "before": pixels.IN_A_PROGRAM}
        codes, members = program("evaluate", *arguments, f"--cache_dir={tmp_path / name}", **how)
        assert codes == [0] * count, members.everything()
        assert not any(members.output(index) for index in range(1, count)), members.everything()
        return members.output(0)

    assert "sampling 6 images" in evaluated("several", 2)
    assert "measured before" in evaluated("several again", 2)
    (tmp_path / "run/evaluation/results.jsonl").rename(tmp_path / "several.jsonl")
    evaluated("alone", 1)
    found, expected = (
        json.loads(path.read_text())  # One line each.
        for path in (tmp_path / "several.jsonl", tmp_path / "run/evaluation/results.jsonl")
    )
    assert found.keys() == expected.keys() and len(found["bounds"]) == 4
    for part in ("metrics", "bounds"):
        assert found[part].keys() == expected[part].keys()
        for name, value in expected[part].items():
            # Of six samples, in which a few pixels differ by one grey level.
            np.testing.assert_allclose(found[part][name], value, rtol=2e-2, err_msg=name)
    same = expected.keys() - {"metrics", "bounds", "created", "sampling_seconds", "features_seconds"}
    assert {name: found[name] for name in same} == {name: expected[name] for name in same}


MOMENTS = """
import numpy as np
from mcm_jax.evaluation.features import Extractor, FeatureNetwork
from mcm_jax.evaluation.metrics import ClassScores, Moments

def exact(_, images):  # Small integers: the same in any batch.
    rows = images.reshape(len(images), -1, 4).astype("float32")
    return {"pool": rows.sum(1), "logits": rows[:, 0] / 64}

network = FeatureNetwork({}, exact, {"pool": 4, "logits": 4}, "fid", {})
images = np.random.default_rng(0).integers(0, 256, (101, 4, 4, 3), np.uint8)
with distributed.joined():
    extractor = Extractor(network, batch_per_device=BATCH)
    moments, scores = Moments(4), ClassScores(101, 4)
    for start in range(0, 101, BLOCK):
        block = images[start : start + BLOCK]
        found = extractor(block)
        moments.update(found["pool"])
        scores.update(found["logits"], start + np.arange(len(block)))
    numbers = {"count": moments.count, "mean": moments.mean.tolist(), "cov": moments.covariance.tolist()}
    log("moments", {**numbers, "score": scores.score})
"""


def test_moments_do_not_depend_on_processes_devices_or_batches(tmp_path):
    """Against float64 of all features at once, in every process; 101 images fill no batch and no block."""
    images = np.random.default_rng(0).integers(0, 256, (101, 4, 4, 3), np.uint8)
    rows = images.reshape(101, -1, 4).sum(1, dtype=np.float64)
    scores = []
    for count, devices, batch, block in ((1, 1, 64, 101), (1, 8, 3, 40), (4, 1, 5, 33)):
        code = MOMENTS.replace("BATCH", str(batch)).replace("BLOCK", str(block))
        place = tmp_path / f"{count} x {devices}"
        with Members(code, count=count, devices=devices, directory=place) as members:
            assert members.codes() == [0] * count, members.everything()
        for index in range(count):
            (found,) = logged(place, "moments", index)
            assert found["count"] == 101
            np.testing.assert_allclose(found["mean"], rows.mean(0), rtol=1e-10)
            np.testing.assert_allclose(found["cov"], np.cov(rows, rowvar=False), rtol=1e-10, atol=1e-7)
            scores.append(found["score"])
    np.testing.assert_allclose(scores, scores[0], rtol=1e-10)
    assert scores[0] > 1.01


def test_processes_that_are_given_other_images_are_told(tmp_path):
    """Of one name, as a file in every host's own /tmp would be."""
    code = """
from mcm_jax.evaluation import scoring
from mcm_jax.evaluation.features import FeatureNetwork
import numpy as np
place = Path(sys.argv[1]) / str(INDEX)
place.mkdir()
np.savez(place / "samples.npz", np.full((4, 8, 8, 3), 2 + int(INDEX), np.uint8))
np.savez(place / "reference.npz", mu=np.zeros(2), sigma=np.eye(2))
os.chdir(place)
network = FeatureNetwork({}, lambda _, x: {"pool": x[:, 0, 0, :2]}, {"pool": 2}, "fid", {"network": "toy"})
scoring._feature_network = lambda options: network
options = scoring.Options(
    images=Path("samples.npz"), reference=Path("reference.npz"), features="inception", metrics=("frechet",),
    cache_dir=Path(sys.argv[1]) / "cache",
)
with distributed.joined():
    try:
        scoring.evaluate_images(options)
    except InputError as error:
        log("error", str(error))
"""
    with Members(code, count=2, devices=1, directory=tmp_path / "logs") as members:
        assert members.codes() == [0, 0], members.everything()
    for index in (0, 1):
        (message,) = logged(tmp_path / "logs", "error", index)
        assert "flags, weights and images of processes 0 and 1 differ" in message


def test_a_cache_that_one_process_cannot_read_is_computed_by_all(tmp_path):
    code = """
from mcm_jax.evaluation import references
directory = Path(sys.argv[1]) / "cache"
with distributed.joined():
    for turn in range(3):
        if turn == 2 and INDEX == "1":
            references._load_numbers = lambda path: 1 / 0
        ran = []
        numbers = references.Cache(directory).numbers({"of": "x"}, lambda: ran.append(1) or {"n": 1.0})
        log("turns", [numbers["n"], len(ran)])
    try:
        references.Cache(directory).numbers({"of": INDEX}, lambda: {"n": 2.0})
    except InputError as error:
        log("turns", str(error))
"""
    with Members(code, count=2, devices=1, directory=tmp_path / "logs") as members:
        assert members.codes() == [0, 0], members.everything()
    for index in (0, 1):
        *turns, refused = logged(tmp_path / "logs", "turns", index)
        assert turns == [[1.0, 1], [1.0, 0], [1.0, 1]]
        # What is of other things in each process is kept as none of them.
        assert "data sets, weights or flags of processes 0 and 1 differ" in refused
    assert len(list((tmp_path / "logs/cache").glob("numbers_*"))) == 1


def test_a_mistake_in_evaluation_is_told_by_all(tmp_path):
    codes, members = program("evaluate", f"--workdir={tmp_path / 'none'}", directory=tmp_path / "logs")
    assert codes == [2, 2], members.everything()
    assert all("there is no such directory" in members.output(index, "err") for index in (0, 1))
