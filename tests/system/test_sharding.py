"""Which device holds what, on made-up meshes of eight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from mcm_jax.config import rows, validation
from mcm_jax.models.conditions import Classes
from mcm_jax.runs import build
from mcm_jax.system import sharding
from mcm_jax.system.errors import InputError

pytestmark = pytest.mark.multi_device


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"), [(-1, 1, (8, 1)), (-1, 4, (2, 4)), (2, 4, (2, 4)), (-1, 8, (1, 8))]
)
def test_the_mesh_covers_all_devices(data, fsdp, shape):
    mesh = sharding.make_mesh(data=data, fsdp=fsdp)
    assert tuple(mesh.shape.items()) == (("data", shape[0]), ("fsdp", shape[1]))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert set(mesh.devices.flat) == set(jax.devices())
    assert sharding.description(mesh) == f"8 x cpu, mesh data {shape[0]} x fsdp {shape[1]}"


@pytest.mark.parametrize(("data", "fsdp"), [(3, 2), (-1, 3), (-1, 16), (4, 4), (1, 1)])
def test_a_mesh_that_does_not_cover_the_devices(data, fsdp):
    given = 8 // fsdp if data == -1 else data
    with pytest.raises(InputError, match=rf"data={given} x fsdp={fsdp} is not the 8 devices"):
        sharding.make_mesh(data=data, fsdp=fsdp)


@pytest.mark.parametrize(("data", "fsdp", "expected"), [(-1, 64, 8), (-1, 3, 8), (-1, 4, 4), (2, 64, 64)])
def test_fsdp_that_does_not_divide_the_devices_takes_all(data, fsdp, expected, capsys):
    settings = sharding.MeshSettings(data=data, fsdp=fsdp, gather="blocks")
    fitted = sharding.fitted(settings)
    assert fitted == dataclasses.replace(settings, fsdp=expected)
    note = f"note: config.mesh.fsdp={fsdp} does not divide the 8 devices available; using fsdp=8\n"
    assert capsys.readouterr().err == (note if expected != fsdp else "")
    if data == -1:
        assert sharding.make_mesh(data=fitted.data, fsdp=fitted.fsdp).shape["fsdp"] == expected


@pytest.mark.parametrize("fsdp", [1, 4, 8])
def test_every_device_has_images_of_its_own(fsdp):
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
    batch = {"image": np.arange(48.0, dtype=np.float32).reshape(16, 3), "label": np.arange(16)}
    on_mesh = sharding.global_batch(mesh, batch)
    for name, array in on_mesh.items():
        np.testing.assert_array_equal(array, batch[name])
        shards = sorted(array.addressable_shards, key=lambda shard: shard.index[0].start)
        assert [shard.data.shape[0] for shard in shards] == [2] * 8
        assert [shard.index[0].start for shard in shards] == list(range(0, 16, 2))


def test_a_batch_that_can_not_be_divided():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    sharding.check_batch(mesh, batch_size=16)
    for batch_size in (12, 4, 18):  # 12 and 4 could be divided over data or fsdp alone.
        with pytest.raises(InputError, match=rf"batch_size={batch_size} .* 8 devices; use a multiple of 8"):
            sharding.check_batch(mesh, batch_size=batch_size)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((128, 128), P("fsdp")),  # 2**14 exactly: no longer small.
        ((128, 127), P()),
        ((64, 1024), P("fsdp")),  # The last axis only where no other can be divided.
        ((63, 1024), P(None, "fsdp")),
        ((3, 3, 64, 128), P(None, None, "fsdp")),
        ((16, 128, 64), P(None, "fsdp")),  # The largest of the others.
        ((301, 303), P()),
        ((2**14,), P("fsdp")),
        ((), P()),
    ],
)
def test_large_parameters_are_split_along_their_largest_axis_but_the_last(shape, spec):
    mesh = sharding.make_mesh(data=2, fsdp=4)
    leaf = jax.ShapeDtypeStruct(shape, np.float32)
    found = sharding.params_sharding(mesh, {"w": leaf})["w"]
    assert found.mesh == mesh
    assert found.spec == spec
    whole = sharding.params_sharding(sharding.make_mesh(data=8, fsdp=1), {"w": leaf})["w"]
    assert whole.is_fully_replicated and sharding.replicated(mesh).is_fully_replicated


def test_gathered_parameters_are_everywhere_and_their_gradient_is_not():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    params = {"w": jnp.arange(2.0**14).reshape(2**7, 2**7) / 2**14, "b": jnp.arange(3.0)}
    split = sharding.params_sharding(mesh, params)
    params = jax.device_put(params, split)

    def loss(params):
        whole = sharding.gathered(mesh, params)
        jax.debug.inspect_array_sharding(whole["w"], callback=lambda found: seen.append(found))
        return jnp.sum(jnp.sin(whole["w"])) + jnp.sum(whole["b"] ** 2)

    seen = []
    gradient = jax.jit(jax.grad(loss))(params)
    assert seen[0].is_fully_replicated
    assert gradient["w"].sharding.is_equivalent_to(split["w"], 2) and not split["w"].is_fully_replicated
    np.testing.assert_allclose(gradient["w"], np.cos(params["w"]), rtol=1e-6)
    np.testing.assert_allclose(gradient["b"], 2 * params["b"])


def test_named_parts_are_not_gathered():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    params = {"blocks": {"w": jnp.ones((2**7, 2**7))}, "w": jnp.ones((2**7, 2**7))}
    params = jax.device_put(params, sharding.params_sharding(mesh, params))
    found = jax.jit(lambda params: sharding.gathered(mesh, params, without=("blocks",)))(params)
    assert found["w"].sharding.is_fully_replicated
    assert not found["blocks"]["w"].sharding.is_fully_replicated


def test_a_layer_by_column_sends_rows_and_keeps_its_weights_where_they_lie():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    rng = np.random.default_rng(0)
    params = {"columns": {"kernel": jnp.asarray(rng.normal(size=(64, 256)), jnp.float32)}}
    x = rng.normal(size=(16, 64)).astype(np.float32)
    split = sharding.params_sharding(mesh, params)
    assert split["columns"]["kernel"].spec == P(None, "fsdp")

    def loss(params, x):
        kernel = sharding.gathered(mesh, params)["columns"]["kernel"]
        jax.debug.inspect_array_sharding(kernel, callback=lambda found: seen.append(found))
        y = sharding.by_column(mesh, lambda x: jnp.sin(x @ kernel), x)
        jax.debug.inspect_array_sharding(y, callback=lambda found: seen.append(found))
        return jnp.sum(y)

    seen = []
    on_mesh = (jax.device_put(params, split), jax.device_put(x, sharding.batch_sharding(mesh)))
    step = jax.jit(jax.grad(loss, argnums=(0, 1)))
    gradient, x_gradient = step(*on_mesh)
    assert seen[0].is_equivalent_to(split["columns"]["kernel"], 2)
    assert seen[1].is_equivalent_to(sharding.batch_sharding(mesh), 2)
    assert gradient["columns"]["kernel"].sharding.is_equivalent_to(split["columns"]["kernel"], 2)
    # Weights are never gathered, nor their gradient summed over devices that split the columns.
    assert "[64,256]" not in step.lower(*on_mesh).compile().as_text()
    inner = np.cos(x.astype(np.float64) @ params["columns"]["kernel"])
    # Sums of up to 256 terms of order one in float32.
    np.testing.assert_allclose(gradient["columns"]["kernel"], x.T @ inner, atol=1e-4)
    np.testing.assert_allclose(x_gradient, inner @ params["columns"]["kernel"].T, atol=1e-4)


def test_columns_that_can_not_be_divided_are_computed_all_the_same():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    rng = np.random.default_rng(0)
    params = {"columns": {"kernel": jnp.asarray(rng.normal(size=(2**12, 6)), jnp.float32)}}
    x = rng.normal(size=(8, 2**12)).astype(np.float32)
    split = sharding.params_sharding(mesh, params)
    assert split["columns"]["kernel"].spec == P("fsdp")

    @jax.jit
    def value(params, x):
        kernel = sharding.gathered(mesh, params)["columns"]["kernel"]
        return sharding.by_column(mesh, lambda x: x @ kernel, x)

    found = value(jax.device_put(params, split), x)
    # Sums of 4096 terms of order one in float32.
    np.testing.assert_allclose(found, x @ np.asarray(params["columns"]["kernel"]), atol=1e-3)


def test_the_modulations_of_a_network_are_columns():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    config = rows.tiny("teacher", dataset="openmoji", resolution=16)
    network = build.network(validation.validate(config), condition=Classes(9))
    abstract = network.abstract_params
    split = jax.tree.map(
        lambda leaf, sharding: (leaf.size, sharding.spec), abstract, sharding.params_sharding(mesh, abstract)
    )
    stages = [*split["down_stages"].values(), split["middle"], *split["up_stages"].values()]
    kernels = [stage["modulations"]["columns"]["kernel"] for stage in stages]
    assert {spec for size, spec in kernels if size >= 2**14} == {P(None, "fsdp")}


class Chip:
    """A device of one of several slices, as jax.devices() lists them."""

    platform, device_kind, core_on_chip = "cpu", "cpu", 0

    def __init__(self, number):
        self.id, self.slice_index, self.process_index = number, number // 4, number // 2

    def __repr__(self):
        return f"chip {self.id}"


@pytest.fixture
def two_slices(monkeypatch):
    """Eight devices in two slices, which jax.make_mesh refuses."""
    chips = [Chip(number) for number in (4, 5, 0, 1, 6, 7, 2, 3)]
    monkeypatch.setattr(jax, "devices", lambda: chips)


@pytest.mark.parametrize("fsdp", [1, 2, 4])
def test_parameters_are_split_within_a_slice(fsdp, two_slices):
    mesh = sharding.make_mesh(data=-1, fsdp=fsdp)
    assert tuple(mesh.shape.items()) == (("data", 8 // fsdp), ("fsdp", fsdp))
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert sorted(chip.id for chip in mesh.devices.flat) == list(range(8))
    slices = [[chip.slice_index for chip in row] for row in mesh.devices]
    assert slices == [[number * fsdp // 4] * fsdp for number in range(8 // fsdp)]


def test_parameters_are_not_split_over_slices(two_slices):
    with pytest.raises(
        InputError, match=r"config.mesh.fsdp=8 does not divide the 4 devices of each of the 2"
    ):
        sharding.make_mesh(data=-1, fsdp=8)


def test_on_several_slices_the_note_counts_those_of_one(two_slices, capsys):
    assert sharding.fitted(sharding.MeshSettings(fsdp=8)).fsdp == 4
    assert "does not divide the 4 devices of each slice; using fsdp=4" in capsys.readouterr().err
