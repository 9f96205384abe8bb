import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from mcm_jax.data import captions, folder, preparation
from mcm_jax.system.errors import InputError

NAMES = ["cats/1.png", "cats/2.png", "dogs/3.png", "dogs/4.jpg"]


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name in NAMES:
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).save(path)
    return tmp_path / "images"


def write_lines(root, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (root / "captions.jsonl").write_text("\n".join(texts), encoding="utf-8")


def line(name, caption="a pet"):
    return {"file": name, "caption": caption}


def listed(root):
    return folder.list_images(root, single_class="x")


def test_lines_of_json(root):
    write_lines(
        root, line("cats/1.png", "a grey\n cat "), "", line("./dogs/3.png", "ünï 犬"), line("dogs/4.jpg")
    )
    listing = listed(root)
    assert listing.captions == {
        "cats/1.png": "a grey cat",
        "cats/2.png": "",
        "dogs/3.png": "ünï 犬",
        "dogs/4.jpg": "a pet",
    }
    assert listing.notes == ("1 images without a caption get an empty one: cats/2.png",)


def test_text_files_beside_the_images(root):
    (root / "cats/1.txt").write_bytes("\ufeffa grey cat\r\n".encode())
    (root / "cats/2.txt").write_bytes(b"\xff\xfe")
    (root / "dogs/4.txt").write_bytes(b" \n")
    (root / "dogs/readme.txt").touch()
    listing = listed(root)
    assert listing.captions == {name: "a grey cat" if name == NAMES[0] else "" for name in NAMES}
    skipped, broken, missing = listing.notes
    assert skipped == "skipped: 1 .txt"
    assert broken.startswith("2 text files are skipped: cats/2.txt: 'utf-8' codec can't decode")
    assert broken.endswith("; dogs/4.txt: an empty caption")
    assert missing == "3 images without a caption get an empty one: cats/2.png; dogs/3.png; dogs/4.jpg"


def test_images_of_one_name_share_a_text_file(root):
    (root / "dogs/4.jpg").rename(root / "dogs/3.jpg")
    (root / "dogs/3.txt").write_text("a dog")
    listing = listed(root)
    assert listing.captions["dogs/3.png"] == listing.captions["dogs/3.jpg"] == "a dog"
    assert [note.partition(" ")[0] for note in listing.notes] == ["2"]


def test_lines_go_before_text_files(root):
    (root / "cats/1.txt").write_text("from a file")
    write_lines(root, *map(line, NAMES))
    assert set(listed(root).captions.values()) == {"a pet"}
    assert listed(root).notes == ("skipped: 1 .txt",)


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("{", "Expecting property name"),
        ('{"file": 1, "caption": "a"}', "not of the form"),
        ('["cats/1.png", "a"]', "not of the form"),
        (line("cats/9.png"), "there is no image cats/9.png"),
        (line("cats/2.png"), "a second caption of cats/2.png"),
        (line("cats/1.png", " "), "an empty caption"),
        (line("cats/1.png", "x" * 10_001), "a caption of 10,001 characters, more than 10,000"),
        ('{"file": "cats/1.png", "caption": "\\ud800"}', "surrogates not allowed"),
        ("[" * 60 + "]" * 60, "JSON of more than 50 levels"),
    ],
)
def test_broken_lines_are_named_by_number(root, broken, reason):
    write_lines(root, line("cats/2.png"), "", broken, line("dogs/3.png"))
    broken_note, missing_note = listed(root).notes
    assert broken_note.startswith("1 lines of captions.jsonl are skipped: 3: ") and reason in broken_note
    assert missing_note.startswith("2 images without") and "\n" not in broken_note


def test_many_broken_lines_are_counted(root):
    write_lines(root, *map(line, NAMES), *["x"] * 9)
    (note,) = listed(root).notes
    assert note.startswith("9 lines of captions.jsonl are skipped: 5: ") and note.endswith("; and 4 more")
    assert "9: " in note and "10: " not in note


@pytest.mark.parametrize(("lines", "named"), [(["x", "y"], r" \(line 1: Expecting value"), ([], "")])
def test_a_file_without_captions_is_refused(root, lines, named):
    write_lines(root, *lines)
    with pytest.raises(
        InputError, match=rf"captions\.jsonl: no line has a caption of an image{named}"
    ) as caught:
        listed(root)
    assert '{"file": "a.png", "caption": ' in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_captions_is_as_before(root):
    before = listed(root)
    assert before.captions is None and before.notes == ()
    (root / "notes.txt").touch()
    assert listed(root).captions is None and listed(root).notes == ("skipped: 1 .txt",)
    assert captions.read(root, NAMES, text_files=True) is None
    assert listed(root).fingerprint() == before.fingerprint()


def test_captions_are_stored_and_their_change_is_seen(root, tmp_path):
    def plan():
        return preparation.plan(dataset="folder", resolution=4, manual_dir=str(root), name="pets")

    texts = {name: f"picture of {name}" for name in NAMES[:3]}
    write_lines(root, *(line(name, text) for name, text in texts.items()))
    info, _ = preparation.prepare(plan(), data_dir=tmp_path / "data")
    builder = tfds.builder_from_directory(info.path)
    stored = [example for split in ("train", "test") for example in builder.as_data_source(split)]
    assert {example["file"].decode(): example["caption"].decode() for example in stored} == {
        **texts,
        NAMES[3]: "",
    }
    write_lines(root, *(line(name) for name in texts))
    with pytest.raises(InputError, match="was made from other files"):
        preparation.prepare(plan(), data_dir=tmp_path / "data")
