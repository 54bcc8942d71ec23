"""The compilers of TPUs and of GPUs on tiny models, each where it is installed."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from ctc_spec_jax import aot, aot_gpu, folders, sharding, xla
from ctc_spec_jax.errors import InputError
from infer import compile as program
from tests.helpers import write_model
from train import compile as training

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="package libtpu is not installed"
)
needs_gpu_compiler = pytest.mark.skipif(
    not aot_gpu.installed(), reason=f"package {aot_gpu.PACKAGE} is not installed"
)
MODELS = {
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "vicuna_7b": 6_738_415_616,
    "llama3.1_8b": 8_030_261_248,
    "qwen3_8b": 8_190_735_360,
}
"""Published numbers of parameters."""


@pytest.fixture
def model(tmp_path):
    """Two layers with as many kv heads as chips."""
    return write_model(tmp_path, 4, hidden_size=256, intermediate_size=512, vocab_size=1024)


@pytest.mark.parametrize("name", MODELS)
def test_shapes_of_published_models(name):
    lm, shapes = folders.abstract_target(f"configs/models/{name}.json", jnp.bfloat16)
    leaves = jax.tree.leaves(shapes)
    assert sum(x.size for x in leaves) == MODELS[name]
    assert {x.dtype.name for x in leaves} == {"bfloat16"}
    first, _ = folders.abstract_target(f"configs/models/{name}.json", num_layers=2)
    assert first.config.num_layers == 2 and first.config.width == lm.config.width


@pytest.mark.parametrize("name", ["v5e", "v7:2x2", "v5e:2", "h100:8x8", "h100:9", "b200"])
def test_bad_topologies(name):
    with pytest.raises(InputError, match=f"topology: expected v4, v5e, .* found '{name}'"):
        aot.topology(name)


def test_caches_are_told_from_other_state():
    """Four axes of floats are a cache; a pool of phrases has four of integers."""
    mesh = jax.sharding.AbstractMesh((1, 1, 1), sharding.MESH_AXES)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shapes = [((1, 2, 8, 16), jnp.bfloat16), ((1, 64, 8, 4), jnp.int32), ((3,), jnp.float32)]
    state = [jax.ShapeDtypeStruct(shape, kind, sharding=place) for shape, kind in shapes]
    assert aot.part_shapes(state) == {("bf16", (1, 2, 8, 16))}


def arguments(model: str, topology: str, mesh: str, **changes) -> list[str]:
    fields = {"batch": 4, "prompt": 32, "new-tokens": 32, "tree-nodes": 1, **changes}
    flags = [f"--{name}={value}" for name, value in fields.items()]
    return ["infer.compile", f"--topology={topology}", f"--model={model}", f"--mesh={mesh}", *flags]


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "mesh", "parts"), [("v5e:2x2", "tensor=4", 4), ("v5p:2x2x1", "data=2,tensor=2", 2)]
)
def test_a_decode_for_chips(model, topology, mesh, parts, tmp_path, monkeypatch, capsys):
    """Two sums per layer and one of embeddings; no cache is copied or moved.

    Of logits, the winners of all parts travel, with their places. ``data`` adds the sum of the
    loop's condition.
    """
    path = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", arguments(model, topology, mesh, json=path))
    program.main()
    assert "a round" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    turn = result["programs"]["plain"]["loop"]
    sums, found = 2 * 2 + 1 + ("data" in mesh), turn["collectives"]
    assert {kind: x["count"] for kind, x in found.items()} == {"all-reduce": sums, "all-gather": 2}
    assert found["all-gather"]["bytes"] < 1024
    assert turn["copies"] == 0 and turn["cycles"] > 1000
    weights = folders.abstract_target(model, jnp.bfloat16)[1]
    size = 2 * sum(x.size for x in jax.tree.leaves(weights))
    assert size / parts < result["programs"]["plain"]["memory"]["arguments"] < size / parts + 2e6


@needs_libtpu
def test_several_trees_beside_the_bound(model, tmp_path, monkeypatch):
    """A column per size; the bound is all but the embedding read at the chip's bandwidth."""
    path = tmp_path / "found.json"
    given = arguments(model, "v6e:2x2", "tensor=4", json=path)
    monkeypatch.setattr("sys.argv", [*given, "--tree-nodes", "4", "8", "--drafter-layers", "1"])
    program.main()
    (result,) = json.loads(path.read_text())["results"]
    assert list(result["programs"]) == ["plain", "4 nodes", "8 nodes", "prefill"]
    turns = [result["programs"][name]["loop"] for name in ("plain", "4 nodes", "8 nodes")]
    assert all(turn["cycles"] > 0 for turn in turns)
    read = folders.abstract_target(model, jnp.bfloat16)[1]
    parts = sum(x.size for x in jax.tree.leaves(read)) - 1024 * 256
    norms = 5 * 256 * 3 / 4  # not split
    caches = 2 * 2 * 4 * 256 / 2 * (32 + 32 + 8) / 4  # 4 rows; half as many heads as queries
    cycles = 2 * (parts / 4 + norms + caches) / 1.64e12 * 1.75e9
    assert result["bound_cycles"] == pytest.approx(cycles, rel=1e-3)
    line = program.overview([result]).splitlines()[1]
    assert line.count("/") == 3 * 2, line


@needs_libtpu
def test_a_step_of_one_row(tmp_path, monkeypatch):
    """The matrix unit makes its products: no dearer than a round of 8 nodes and its drafter."""
    path = tmp_path / "found.json"
    given = arguments("configs/models/llama2_7b.json", "v5e:2x2", "tensor=4", batch=1, layers=2)
    monkeypatch.setattr("sys.argv", [*given, f"--json={path}", "--tree-nodes", "8"])
    program.main()
    (result,) = json.loads(path.read_text())["results"]
    plain, tree = (result["programs"][name]["loop"]["cycles"] for name in ("plain", "8 nodes"))
    assert 0 < plain < tree


@needs_libtpu
def test_a_training_step_for_chips(model, tmp_path, monkeypatch, capsys):
    """The step of a config: its figures in the file, or one sentence where it does not fit."""
    path = tmp_path / "found.json"
    sizes = ["batch.rows=8", "batch.microbatch=4", "batch.length=64", "batch.anchors=4"]
    shape = ["drafter.layers=1", "drafter.taps=[0,1]", "drafter.frames=4", "loss.labels=3"]
    fields = [*sizes, *shape, "mesh.data=1", "mesh.fsdp=-1", "batch.remat=true"]
    command = ["train.compile", "--topology=v5e:2x2", "--config=configs/drafter.yaml"]
    monkeypatch.setattr("sys.argv", [*command, f"--model={model}", f"--json={path}", *fields])
    with jax.numpy_dtype_promotion("standard"):  # optax does arithmetic across types
        training.main()
    assert "a micro-batch" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())["results"]
    assert result["programs"]["step"]["loop"]["cycles"] > 1000
    assert "drafter" in training.overview([result])
    small = dataclasses.replace(aot.topology("v5e:2x2"), memory=1 << 20)
    monkeypatch.setattr(aot, "topology", lambda name: small)
    monkeypatch.setattr("sys.argv", [*command, f"--model={model}", *fields])
    with jax.numpy_dtype_promotion("standard"), pytest.raises(SystemExit) as ended:
        training.main()
    assert ended.value.code == 2
    assert "training step of 8 rows on v5e:2x2: expected at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("topology", "mesh", "size"),
    [
        pytest.param("v5e:2x2", "tensor=4", "16.00", marks=needs_libtpu),
        pytest.param("h100", "tensor=1", "74.51", marks=needs_gpu_compiler),
    ],
)
def test_a_batch_beyond_a_chip(model, topology, mesh, size, monkeypatch, capsys):
    """One sentence with both numbers, and status 2."""
    monkeypatch.setattr(
        "sys.argv", arguments(model, topology, mesh, batch=64, **{"new-tokens": 1 << 20})
    )
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and f"expected at most the {size} GiB of a chip" in error


@needs_libtpu
def test_order_of_parameters_on_chips():
    """On chips qkv lies in the order that a decode reads; elsewhere as it is."""
    chips = sharding.mesh_of("tensor=4", aot.topology("v5e:2x2").devices)
    place = sharding.home(chips, "layer_1_qkv", (64, 4, 3, 8))
    assert place.layout.major_to_minor == (1, 2, 0, 3)
    assert sharding.home(chips, "head", (64, 32)) == sharding.parameter(chips, "head", (64, 32))


def test_without_the_compiler_of_gpus(model, monkeypatch, capsys):
    """One sentence that names the extra, and status 2."""
    monkeypatch.setattr(aot_gpu, "installed", lambda: False)
    monkeypatch.setattr("sys.argv", arguments(model, "h100", "tensor=1"))
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    sentence = "error: topology: expected package jax-cuda13-pjrt (extra gpu-aot), found none"
    assert capsys.readouterr().err.strip().splitlines()[-1] == sentence


@pytest.mark.parametrize("name", aot_gpu.GPUS)
def test_what_the_compiler_is_told(name):
    """Braces close, and the figures are those of the kind."""
    text = aot_gpu.target_config(aot_gpu.GPUS[name])
    assert text.count("{") == text.count("}")
    assert f"memory_bandwidth: {aot_gpu.GPUS[name].bandwidth:.0f}\n" in text
    assert aot_gpu.is_name(name) and aot_gpu.is_name(f"{name}:8") and not aot_gpu.is_name("v5e")


@needs_gpu_compiler
@pytest.mark.parametrize("name", aot_gpu.GPUS)
@pytest.mark.parametrize("graphs", ["graphs", ""])
def test_kernels_and_transposes(name, graphs, monkeypatch):
    """A loop that turns an array over moves it twice, out and back; one that reads it does not.

    The whole loop is one graph with the options that ask for it.
    """
    monkeypatch.setenv("CTC_SPEC_XLA", graphs)
    slice_ = aot.topology(name)
    mesh = sharding.mesh_of("tensor=1", slice_.devices)
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = jax.ShapeDtypeStruct((1, 2, 256, 256), jnp.bfloat16, sharding=place)

    def run(turned: bool):
        def body(carry):
            i, x, y = carry
            x = jnp.swapaxes(x, 2, 3) if turned else x
            return i + 1, x, jnp.sort(y @ x, axis=2)

        def loop(x):
            return jax.lax.while_loop(lambda c: c[0] < 5, body, (jnp.int32(0), x, x))[2]

        return loop

    for turned in (False, True):
        with jax.set_mesh(mesh):
            found = aot.compile_program(
                lambda turned=turned: jax.jit(run(turned)).lower(shape),
                "a loop",
                slice_,
                {("bf16", (1, 2, 256, 256))},
                xla.gpu_options(),
            )
        assert found.loop.copies == 2 * turned and found.kernels is not None
        assert found.kernels.sorts >= 1 and found.kernels.products == 1
        assert found.kernels.one_graph == bool(graphs)
        assert (found.kernels.starts == 0) == bool(graphs)


@needs_gpu_compiler
def test_a_decode_for_gpus(model, tmp_path, monkeypatch, capsys):
    """Two sums per layer on two GPUs; the bound is all but the embedding at the bandwidth."""
    path = tmp_path / "found.json"
    monkeypatch.setenv("CTC_SPEC_XLA", "")
    monkeypatch.setattr("sys.argv", arguments(model, "h100:2", "tensor=2", json=path))
    program.main()
    out = capsys.readouterr().out
    assert "started by the host" in out and "by the vendor's figure" in out
    (result,) = json.loads(path.read_text())["results"]
    assert result["settings"]["xla"] == "default" and "jax-cuda13-pjrt" in result["versions"]
    plain = result["programs"]["plain"]
    assert plain["loop"]["collectives"]["all-reduce"]["count"] >= 2 * 2
    assert plain["loop"]["copies"] == 0 and plain["loop"]["cycles"] == 0
    assert plain["kernels"]["collectives"] >= 2 * 2 and not plain["kernels"]["one_graph"]
    read = folders.abstract_target(model, jnp.bfloat16)[1]
    parts = sum(x.size for x in jax.tree.leaves(read)) - 1024 * 256
    norms = 5 * 256 / 2  # not split
    caches = 2 * 2 * 4 * 256 / 2 * (32 + 32 + 8) / 2  # 4 rows; half as many heads as queries
    assert result["bound_ms"] == pytest.approx(2 * (parts / 2 + norms + caches) / 3.35e9, rel=1e-3)
    assert program.gpu_overview([result]).splitlines()[1].split()[:2] == ["tiny", "h100:2"]
