"""Table 6 beside made-up results: ours stand in their cells, and nothing else does."""

import pytest

from mcm_jax.reporting import paper, results, text_to_image_table
from tests.reporting.made_up import config, write
from tests.reporting.test_paper_tables import fid, lines_of

MODEL = {"model": {"widths": [128, 256, 1024, 2048, 4096], "blocks": [3, 3, 3, 3, 16]}}
COCO = {
    **{"resolution": 512, "num_samples": 30_000, "label_rule": "test_captions"},
    "reference": {"split": "test", "count": 40_504, "sha256": "abcdef01" * 8},
}
TEACHER = {"objective": "diffusion", "student_steps": None, "steps": 256, "sampler": "ddpm", "guidance": 0.5}
GUIDANCE = TEACHER | {"objective": "guidance", "sampler": "ddim", "guidance": 0.0}
CD = {"objective": "cd", "student_steps": 8, "steps": 8, "sampler": "ddim"}
DISTILLED = {"objective": "guidance", "guidance": {"teacher_guidance": 3.0}}


def table(tmp_path, **runs):
    """Lines by label; each run is (settings of its config, changes of its record)."""
    for name, (settings, changes) in runs.items():
        made = fid(8.25, **(COCO | changes))
        made["metrics"] = {f"fid_{made['num_samples']}": 8.25}
        write(tmp_path / name, made, config=config() | MODEL | settings)
    return "\n".join(text_to_image_table.markdown(results.collect(tmp_path)))


def ours(text):
    """(label, calls, column) of each of our numbers."""
    labels = [row[0] for row in paper.tables()["table6"]["rows"]]
    return {
        (cells[0], cells[1], column)
        for label in labels
        for cells in lines_of(text, label)
        for column, place in (("FID-30k", 3), ("FID-5k", 5), ("CLIP", 7))
        if cells[place] in ("8.25", "0.312 (ViT-g-14)")
    }


@pytest.mark.parametrize(
    ("settings", "changes", "cell"),
    [
        ({"objective": "diffusion"}, TEACHER, ("teacher g=0.5 (ddpm)", "256", "FID-30k")),
        ({"objective": "diffusion"}, TEACHER | {"guidance": 3.0}, ("teacher g=3 (ddpm)", "256", "FID-30k")),
        (DISTILLED, GUIDANCE, ("guidance distilled g=3 (ddim)", "256", "FID-30k")),
        (DISTILLED, GUIDANCE | {"num_samples": 5_000}, ("guidance distilled g=3 (ddim)", "256", "FID-5k")),
    ],
)
def test_ours_stand_in_their_cells(settings, changes, cell, tmp_path):
    assert ours(table(tmp_path, run=(settings, changes))) == {cell}


def test_the_clip_score_names_its_clip(tmp_path):
    made = fid(8.25, **(COCO | TEACHER | {"num_samples": 2000}))
    made["metrics"] = {"clip_score_ViT-g-14_2000": 0.3123}
    write(tmp_path / "run", made, config=config() | MODEL | {"objective": "diffusion"})
    text = "\n".join(text_to_image_table.markdown(results.collect(tmp_path)))
    assert ours(text) == {("teacher g=0.5 (ddpm)", "256", "CLIP")}


def test_two_teachers_of_one_name_are_no_teacher(tmp_path):
    student = {"objective": "cd", "teacher_checkpoint": "elsewhere/distilled"}
    runs = {"a/distilled": (DISTILLED, GUIDANCE | {"num_samples": 100}), "student": (student, CD)}
    runs["b/distilled"] = runs["a/distilled"]
    assert not ours(table(tmp_path, **runs))


def test_a_students_guidance_is_its_teachers(tmp_path):
    student = {"objective": "cd", "teacher_checkpoint": "elsewhere/distilled"}
    text = table(tmp_path, distilled=(DISTILLED, GUIDANCE | {"num_samples": 100}), student=(student, CD))
    assert ours(text) == {("multistep CD g=3", "8", "FID-30k")}


@pytest.mark.parametrize(
    ("settings", "changes"),
    [
        ({"objective": "diffusion"}, TEACHER | {"steps": 128}),
        ({"objective": "diffusion"}, TEACHER | {"guidance": 1.0}),
        ({"objective": "diffusion"}, TEACHER | {"sampler": "addim"}),
        ({"objective": "diffusion"}, TEACHER | {"num_samples": 10_000}),
        ({"objective": "diffusion"}, TEACHER | {"resolution": 256}),
        ({"objective": "diffusion"}, TEACHER | {"label_rule": "heldout_captions"}),
        ({"objective": "diffusion"}, TEACHER | {"reference": COCO["reference"] | {"split": "train"}}),
        ({"objective": "guidance"}, GUIDANCE),
        ({"objective": "diffusion"}, TEACHER | {"parameters": "raw"}),
        ({"objective": "diffusion", "model": {"widths": [128, 256]}}, TEACHER),
        ({"objective": "cd", "teacher_checkpoint": "unknown"}, CD),
    ],
)
def test_what_the_paper_has_not_is_left_out(settings, changes, tmp_path):
    assert not ours(table(tmp_path, run=(settings, changes)))


def test_every_number_of_the_paper_stands_there(tmp_path):
    text = table(tmp_path, run=({}, CD))
    for label, calls, *values in paper.tables()["table6"]["rows"]:
        cells = [one for one in lines_of(text, label) if one[1] == str(calls)]
        assert cells[0][2:8:2] == ["" if value is None else f"{value:g}" for value in values]
