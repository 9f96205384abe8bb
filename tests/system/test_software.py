import time

from mcm_jax.system import software


def test_the_hash_tells_any_two_states_of_the_source_apart(tmp_path):
    def state(name, **files):
        for file, content in files.items():
            path = tmp_path / name / file.replace("_", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_suffix(".py").write_text(content)
        return software.source_hash(tmp_path / name)

    original = state("original", a="x", b_c="y")
    assert state("copy", a="x", b_c="y") == original
    others = [
        state("edited", a="x", b_c="z"),
        state("renamed", a="x", b_d="y"),
        state("moved", a="xy", b_c=""),
        state("more", a="x", b_c="y", d=""),
    ]
    assert len({original, *others}) == 5
    (tmp_path / "copy" / "data.json").write_text("{}")
    software.source_hash.cache_clear()
    assert software.source_hash(tmp_path / "copy") == original


def test_hashing_this_package_takes_no_time():
    software.source_hash.cache_clear()
    start = time.monotonic()
    software.source_hash()
    assert time.monotonic() - start < 2


def test_the_libraries_are_installed():
    assert "unknown" not in software.library_versions().values()
