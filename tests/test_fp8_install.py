"""Tests of snippets/fp8/install.py, as read in guide/fp8."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.fabric.plugins.precision import transformer_engine as lightning_plugin
from lightning_utilities.core.imports import RequirementCache, package_available
from packaging.requirements import Requirement
from packaging.version import Version
from torch import Tensor

from snippets import fp8
from tests import te_source

ROOT = Path(__file__).parents[1]
SITE = Path(sysconfig.get_path("purelib"))
# The package binds the function `install`; this is the module.
door = sys.modules["snippets.fp8.install"]
EMULATED = "2.20.2+emulated"


def engine_modules() -> dict[str, ModuleType]:
    """The modules of a Transformer Engine, emulated or not, that are imported."""
    return {
        name: module
        for name, module in sys.modules.items()
        if name.partition(".")[0] == "transformer_engine"
    }


def world() -> dict[str, Any]:
    """All that `install` may change."""
    spec = importlib.util.find_spec("transformer_engine")
    available = lightning_plugin._TRANSFORMER_ENGINE_AVAILABLE
    return {
        "modules": engine_modules(),
        "finders": list(sys.meta_path),
        "version": importlib.metadata.version("transformer_engine"),
        "origin": spec.origin if spec is not None else None,
        "class names": {
            name: value.__module__
            for name, value in vars(fp8).items()
            if isinstance(value, type)
        },
        "autocast": [
            vars(torch.autocast)[name] for name in ("__init__", "__enter__", "__exit__")
        ],
        "answer": dict(vars(available)),
        "filters": list(warnings.filters),
    }


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    """Whatever a test does, the emulator is gone at its end, and nothing else is."""
    before = world()
    yield
    fp8.uninstall()
    assert world() == before


# ------------------------------------------------------------- what imports find


def test_every_way_to_import_gives_the_emulator() -> None:
    """`import a.b as c`, `import a`, `from a.b import c`, `import_module`."""
    space: dict[str, Any] = {}
    program = """
        import transformer_engine
        import transformer_engine.pytorch as te
        from transformer_engine.common import recipe
        from transformer_engine.common.recipe import DelayedScaling
        from transformer_engine.pytorch import Linear
        from transformer_engine.pytorch.quantization import FP8GlobalStateManager
    """
    with fp8.installed():
        exec(textwrap.dedent(program), space)
        te = space["te"]
        assert te.quantization is importlib.import_module(te.quantization.__name__)
    assert space["transformer_engine"].pytorch is te
    assert space["transformer_engine"].common.recipe is space["recipe"]
    assert space["DelayedScaling"] is fp8.DelayedScaling
    assert space["FP8GlobalStateManager"] is fp8.FP8GlobalStateManager
    assert space["Linear"] is te.module.Linear is te.module.linear.Linear is fp8.Linear
    assert te.tensor.float8_tensor.Float8Quantizer is fp8.Float8Quantizer
    assert te.constants.DType is fp8.DType


def test_what_programs_ask_besides_layers_and_recipes() -> None:
    """Availability, formats, initialization and kinds of tensors, at their places."""
    program = """
        from transformer_engine.pytorch import Float8Tensor, is_bf16_available
        from transformer_engine.pytorch.constants import TE_DType
        from transformer_engine.pytorch.quantization import (
            check_recipe_support,
            get_align_size_for_quantization,
            get_fp8_max,
            get_fp8_te_dtype,
            get_fp8_torch_dtype,
        )
        from transformer_engine.pytorch.tensor import MXFP8Tensor
        from transformer_engine.pytorch.utils import (
            get_device_compute_capability,
            init_method_normal,
            scaled_init_method_normal,
        )
    """
    space: dict[str, Any] = {}
    with fp8.installed():
        exec(textwrap.dedent(program), space)
        with pytest.warns(DeprecationWarning, match="float8_tensor is deprecated"):
            old = importlib.import_module("transformer_engine.pytorch.float8_tensor")
    assert old.Float8Tensor is space["Float8Tensor"] is fp8.Float8Tensor
    hybrid, mxfp8 = fp8.DelayedScaling(), fp8.MXFP8BlockScaling()
    for recipe, forward, wanted in (
        (hybrid, True, (torch.float8_e4m3fn, fp8.DType.kFloat8E4M3, 448)),
        (hybrid, False, (torch.float8_e5m2, fp8.DType.kFloat8E5M2, 57344)),
        (mxfp8, False, (torch.float8_e4m3fn, fp8.DType.kFloat8E4M3, 448)),
    ):
        names = ("get_fp8_torch_dtype", "get_fp8_te_dtype", "get_fp8_max")
        assert tuple(space[name](recipe, forward) for name in names) == wanted
    align = space["get_align_size_for_quantization"]
    custom = fp8.CustomRecipe(qfactory=str, quantization_alignment=64)
    recipes = (hybrid, mxfp8, fp8.NVFP4BlockScaling(), custom)
    assert [align(recipe) for recipe in recipes] == [16, 32, 128, 64]
    assert space["TE_DType"][torch.bfloat16] is fp8.DType.kBFloat16
    assert space["get_device_compute_capability"]() == (9, 0)
    assert space["is_bf16_available"](return_reason=True) == (True, "")
    with fp8.emulated_device((7, 5)):
        assert space["get_device_compute_capability"]() == (7, 5)
        assert not space["is_bf16_available"]()
        assert "8.0 or higher" in space["is_bf16_available"](return_reason=True)[1]
        with pytest.raises(RuntimeError, match=r"8\.9 or higher"):
            space["check_recipe_support"](hybrid)
    torch.manual_seed(0)
    weights = [torch.empty(256, 256) for _ in range(2)]
    space["init_method_normal"](0.1)(weights[0])
    space["scaled_init_method_normal"](0.1, 8)(weights[1])
    deviations = [weight.std().item() for weight in weights]
    # 65,536 samples: a relative error of 1 / sqrt(2 n), six times
    assert deviations == pytest.approx([0.1, 0.025], rel=6 / 2**8.5)


def test_a_recipe_may_compute_its_scale_by_transformer_engine_s_function() -> None:
    """`_default_sf_compute` in a callable gives the scale that none gives."""

    def compute(amax: Tensor, scale: Tensor, largest: float, recipe: Any) -> Tensor:  # noqa: ANN401
        te: Any = importlib.import_module("transformer_engine.pytorch")
        found: Tensor = te.quantization._default_sf_compute(
            amax, scale, largest, recipe.margin
        )
        return found

    history = torch.tensor([[0.0, 1e-42, 3.0, torch.inf, torch.nan]])
    scale = torch.full((5,), 2.0)
    with fp8.installed():
        recipes = [
            fp8.DelayedScaling(margin=1, scaling_factor_compute_algo=algo)
            for algo in (compute, None)
        ]
        ours, plain = (
            fp8.update_delayed_scaling(history, scale, 448.0, recipe)[1]
            for recipe in recipes
        )
    torch.testing.assert_close(ours, plain)


def bound_names(tree: ast.Module) -> set[str]:
    """The names that a module's top level binds, its submodules included."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update((a.asname or a.name).partition(".")[0] for a in node.names)
        elif isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
    return names


@pytest.mark.parametrize("inner", sorted({*door._HOMES, *door._PASSED_ON}))
@pytest.mark.filterwarnings("ignore:Using deprecated internal API:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*float8_tensor is deprecated:DeprecationWarning")
def test_each_module_has_only_names_that_transformer_engine_has_there(
    inner: str,
) -> None:
    """What runs on the emulator finds the same names on a GPU (the wheel's source)."""
    path = te_source.folder().joinpath(*inner.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    theirs = bound_names(ast.parse(file.read_text()))
    theirs |= {p.stem for p in path.glob("*") if path.is_dir()}
    defined = {
        node.name
        for node in ast.parse(file.read_text()).body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef))
    }
    with fp8.installed():
        module = importlib.import_module(f"transformer_engine.{inner}".rstrip("."))
        ours = {name for name in vars(module) if not name.startswith("__")}
    assert ours <= theirs
    assert set(door._HOMES.get(inner, ())) <= defined
    assert set(door._PASSED_ON.get(inner, ())) <= theirs


def test_the_emulator_offers_each_name_that_it_has() -> None:
    """A public name of Transformer Engine's that the folder emulates is importable."""
    file = te_source.folder() / "pytorch" / "__init__.py"
    theirs = bound_names(ast.parse(file.read_text()))
    with fp8.installed():
        te = importlib.import_module("transformer_engine.pytorch")
        assert {n for n in fp8.__all__ if n in theirs} == {
            n for n in dir(te) if n in theirs and n in fp8.__all__
        }
        recipes = importlib.import_module("transformer_engine.common.recipe")
        assert set(fp8.recipe.__all__) <= set(dir(recipes))


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "from transformer_engine.pytorch import GroupedLinear",
            r"transformer_engine.pytorch.GroupedLinear is not emulated by snippets.fp8",
        ),
        (
            "from transformer_engine.pytorch.quantization import autocats",
            r"autocats is not emulated by snippets.fp8. Did you mean 'autocast'\?",
        ),
        ("import transformer_engine.jax", r"transformer_engine.jax is not emulated"),
        ("import transformer_engine.pytorch.ops as ops", r"pytorch.ops is not"),
    ],
)
def test_an_import_of_what_is_not_emulated_says_so(statement: str, words: str) -> None:
    """The error of `from a import b` is ours, not "cannot import name"."""
    with fp8.installed(), pytest.raises(ImportError, match=words):
        exec(statement, {})


def test_an_attribute_that_is_not_emulated_says_so() -> None:
    """An AttributeError, so that `hasattr` answers; `dir` lists what there is."""
    with fp8.installed():
        te: Any = importlib.import_module("transformer_engine.pytorch")
        with pytest.raises(
            AttributeError,
            match=r"te.pytorch.moe_permute|pytorch.moe_permute is not emulated.*"
            r"`dir\(transformer_engine.pytorch\)` lists what is, of Transformer Engine "
            r"2.20.2",
        ):
            te.moe_permute  # noqa: B018
        assert not hasattr(te, "moe_permute")
        assert "Linear" in dir(te)
        with pytest.raises(AttributeError, match="has no attribute '__wrapped__'"):
            te.__wrapped__  # noqa: B018


def test_the_deprecated_module_warns_at_the_line_that_imports_it() -> None:
    """As Transformer Engine's own `pytorch/fp8.py` does, and only when imported."""
    with fp8.installed():
        te: Any = importlib.import_module("transformer_engine.pytorch")
        assert "fp8" not in vars(te)
        with pytest.warns(
            DeprecationWarning, match="Using deprecated internal API"
        ) as caught:
            exec(compile("import transformer_engine.pytorch.fp8", "a.py", "exec"), {})
        assert [(w.filename, w.lineno) for w in caught] == [("a.py", 1)]
        assert te.fp8.check_fp8_support() == (True, "")


def test_the_source_of_an_emulated_class_can_be_read() -> None:
    """`__file__` is the emulator's file, which says what one really runs."""
    with fp8.installed():
        te: Any = importlib.import_module("transformer_engine.pytorch")
        assert Path(te.__file__).parent == ROOT / "snippets" / "fp8"
        assert Path(te.module.linear.__file__).name == "linear.py"
        assert inspect.getsource(te.Linear).startswith("class Linear(")


# ------------------------------------------------------------------------ metadata


def test_the_metadata_says_which_release_is_emulated_and_that_it_is() -> None:
    """The local label is not NVIDIA's and satisfies what 2.20.2 satisfies."""
    with fp8.installed():
        engine: Any = importlib.import_module("transformer_engine")
        assert engine.__version__ == EMULATED
        for name in ("transformer_engine", "transformer-engine", "Transformer.Engine"):
            assert importlib.metadata.version(name) == EMULATED
        found = importlib.metadata.distribution("transformer_engine")
        assert "emulated by snippets.fp8" in found.metadata["Summary"]
        assert found.locate_file("linear.py") == ROOT / "snippets/fp8/linear.py"
        assert importlib.metadata.version("torch") == torch.__version__
        assert EMULATED in {
            d.version
            for d in importlib.metadata.distributions()
            if d.metadata["Name"] == "transformer_engine"
        }
    for wanted in (">=0.11.0", "==2.20.2", "~=2.20", ">2.19,<3"):
        requirement = Requirement(f"transformer_engine{wanted}")
        assert requirement.specifier.contains(EMULATED)
    assert Version(EMULATED) >= Version(te_source.version())


def test_lightning_s_answer_is_asked_again_and_restored() -> None:
    """A RequirementCache that said no says yes, then holds what it held before."""
    never = RequirementCache("transformer_engine>=0.11.0")
    no = RequirementCache("transformer_engine>=99")
    module = RequirementCache(module="transformer_engine.pytorch.quantization")
    other = RequirementCache("no-such-package")
    holder = ModuleType("_holder_of_caches")
    vars(holder).update(never=never, no=no, module=module, other=other)
    sys.modules[holder.__name__] = holder
    try:
        no.available, no.message = True, "kept"
        module.available, module.message = False, "not found"
        assert not other
        before = [dict(vars(c)) for c in (never, no, module, other)]
        with fp8.installed():
            assert never
            assert not no
            assert module
            assert not other
            assert package_available("transformer_engine")
            during = RequirementCache("transformer_engine>=2")
            vars(holder)["during"] = during
            assert during
        assert [dict(vars(c)) for c in (never, no, module, other)] == before
        assert "available" not in vars(during)
    finally:
        del sys.modules[holder.__name__]


# --------------------------------------------------------------- putting things back


def test_everything_is_put_back() -> None:
    """Modules, finders, metadata, names of classes, autocast, caches, filters."""
    before = world()
    fp8.install()
    importlib.import_module("transformer_engine.pytorch.module.linear")
    assert fp8.Linear.__module__ == "transformer_engine.pytorch.module.linear"
    assert fp8.DelayedScaling.__module__ == "transformer_engine.common.recipe"
    assert fp8.autocast.__module__ == "transformer_engine.pytorch.quantization"
    assert lightning_plugin._TRANSFORMER_ENGINE_AVAILABLE
    changed = world()
    assert changed["filters"] == before["filters"]
    assert all(changed[key] != before[key] for key in before if key != "filters")
    fp8.uninstall()
    assert world() == before
    assert fp8.Linear.__module__ == "snippets.fp8.linear"


def test_a_half_imported_transformer_engine_comes_back() -> None:
    """Its modules are taken out of the way and put back, the very same objects."""
    real = ModuleType("transformer_engine")
    inner = ModuleType("transformer_engine.common")
    sys.modules.update({m.__name__: m for m in (real, inner)})
    try:
        with fp8.installed():
            assert importlib.import_module("transformer_engine") is not real
        assert engine_modules() == {m.__name__: m for m in (real, inner)}
    finally:
        for module in (real, inner):
            sys.modules.pop(module.__name__, None)


def test_a_module_that_found_the_emulator_keeps_it() -> None:
    """A program that has imported it goes on; a new import finds what was there."""
    with fp8.installed():
        te: Any = importlib.import_module("transformer_engine.pytorch")
    layer = te.Linear(16, 16)
    with te.autocast(enabled=True):
        assert layer(torch.ones(16, 16)).shape == (16, 16)
    # What is left is the bare wheel of this environment, which does not import.
    with pytest.raises(RuntimeError, match="Found empty `transformer-engine` meta"):
        importlib.import_module("transformer_engine.pytorch")
    assert not engine_modules()


def test_installing_twice_is_installing_once() -> None:
    """And uninstalling what is not installed is nothing."""
    before = world()
    fp8.uninstall()
    assert world() == before
    fp8.install()
    first = world()
    fp8.install()
    assert world() == first
    fp8.uninstall()
    assert world() == before


def test_blocks_nest_and_leave_an_installation_alone() -> None:
    """The last to leave puts things back; `install` outlives every block."""
    before = world()
    with fp8.installed():
        with fp8.installed():
            pass
        assert importlib.metadata.version("transformer_engine") == EMULATED
        fp8.install()
    assert importlib.metadata.version("transformer_engine") == EMULATED
    with fp8.installed():
        fp8.uninstall()
        assert importlib.metadata.version("transformer_engine") == EMULATED
    assert world() == before


def test_a_block_ends_by_an_exception_as_by_its_end() -> None:
    """Nothing stays installed."""
    before = world()
    with pytest.raises(ZeroDivisionError), fp8.installed():
        assert 1 / len(())
    assert world() == before


def test_it_decorates_a_function() -> None:
    """For one test of a suite."""

    @fp8.installed()
    def version() -> str:
        return importlib.metadata.version("transformer_engine")

    assert (version(), version()) == (EMULATED, EMULATED)
    assert importlib.metadata.version("transformer_engine") == te_source.version()


def test_blocks_of_several_threads_may_overlap() -> None:
    """No thread loses the emulator because another one is done."""
    before = world()
    errors: list[BaseException] = []
    start = threading.Barrier(8)

    def work() -> None:
        start.wait()
        try:
            for _ in range(5):
                with fp8.installed():
                    te: Any = importlib.import_module("transformer_engine.pytorch")
                    assert te.Linear is fp8.Linear
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert world() == before


def test_a_failure_half_way_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step that was done is undone."""
    before = world()

    with monkeypatch.context() as patch:
        patch.setattr(door, "_redirect_autocast", len)  # an ExitStack has no length
        with pytest.raises(TypeError, match="has no len"):
            fp8.install()
    assert world() == before


# ------------------------------------------------------------------------- refusals


def write_engine(folder: Path, line: str) -> None:
    """Write a package that imports as far as `line` lets it."""
    package = folder / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(line)
    info = folder / "transformer_engine-9.9.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 9.9\n"
    )


def test_a_transformer_engine_that_works_is_not_shadowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It imports and there is a GPU: one error, and nothing is changed."""
    write_engine(tmp_path, "Linear = 'the real one'")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
        before = list(sys.meta_path)
        with pytest.raises(
            RuntimeError,
            match=r"^Transformer Engine 9.9 works here, on NVIDIA H100: the emulator "
            r"does not take its place. Call install\(\) only `if not "
            r"torch.cuda.is_available\(\)`, or use the emulator by its own name, "
            r"snippets.fp8.$",
        ):
            fp8.install()
        assert sys.meta_path == before
        assert sys.modules["transformer_engine.pytorch"].Linear == "the real one"
        for name in engine_modules():
            del sys.modules[name]


@pytest.mark.parametrize("gpu", [True, False], ids=["gpu", "no gpu"])
@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "ImportError"])
def test_one_that_does_not_import_is_no_obstacle(
    error: str, gpu: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With or without a GPU; what the attempt imported is forgotten."""
    write_engine(tmp_path, f"raise {error}('libcudnn.so: not found')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        patch.setattr(torch.cuda, "is_available", lambda: gpu)
        with fp8.installed():
            te: Any = importlib.import_module("transformer_engine.pytorch")
            assert te.Linear is fp8.Linear
        assert not engine_modules()


def test_a_machine_without_a_gpu_need_not_try_to_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Transformer Engine that imports has nothing to run on: it is emulated."""
    write_engine(tmp_path, "raise SystemExit('imported')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path)
        with fp8.installed():
            assert importlib.metadata.version("transformer_engine") == EMULATED


def test_two_copies_of_the_emulator_do_not_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy says which one is installed; on its own it works."""
    shutil.copytree(ROOT / "snippets" / "fp8", tmp_path / "my_copy_of_fp8")
    monkeypatch.syspath_prepend(tmp_path)
    copy: Any = importlib.import_module("my_copy_of_fp8")
    try:
        with copy.installed():
            assert copy.Linear.__module__ == "transformer_engine.pytorch.module.linear"
            te: Any = importlib.import_module("transformer_engine.pytorch")
            assert te.Linear is copy.Linear
            with pytest.raises(
                RuntimeError,
                match=r"another copy of the emulator is installed: my_copy_of_fp8",
            ):
                fp8.install()
            assert importlib.import_module("transformer_engine.pytorch") is te
    finally:
        for name in [n for n in sys.modules if n.startswith("my_copy_of_fp8")]:
            del sys.modules[name]


# -------------------------------------------------------------------------- pickles


def test_a_recipe_is_pickled_under_its_name_in_transformer_engine() -> None:
    """A checkpoint's hyperparameters, written on a laptop, are read on a GPU box."""
    recipe = fp8.DelayedScaling(margin=2, fp8_format=fp8.Format.E4M3)
    with fp8.installed():
        data = pickle.dumps(recipe)
        assert pickle.loads(data) == recipe
    assert b"transformer_engine.common.recipe" in data
    assert b"snippets" not in data
    theirs = te_source.load("common.recipe")
    assert theirs is not None
    sys.modules["transformer_engine"] = ModuleType("transformer_engine")
    sys.modules["transformer_engine.common"] = ModuleType("transformer_engine.common")
    sys.modules["transformer_engine.common.recipe"] = theirs
    try:
        loaded = pickle.loads(data)
    finally:
        for name in engine_modules():
            del sys.modules[name]
    assert type(loaded) is theirs.DelayedScaling
    assert loaded == theirs.DelayedScaling(margin=2, fp8_format=theirs.Format.E4M3)


# ------------------------------------------------------------------- torch.autocast


def product_dtype() -> torch.dtype:
    """The dtype of a matrix product of float32 operands."""
    return torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype


def test_autocast_for_cuda_acts_on_the_cpu_without_a_warning() -> None:
    """PyTorch alone warns and computes in float32; on a GPU it would be bfloat16."""
    cuda = "cuda"
    with pytest.warns(UserWarning, match="CUDA is not available"):
        before = torch.autocast(cuda, dtype=torch.bfloat16)
    with before:
        assert product_dtype() == torch.float32
    with fp8.installed():
        with torch.autocast(cuda, dtype=torch.bfloat16):
            assert product_dtype() == torch.bfloat16
            with torch.autocast(device_type=cuda, enabled=False):
                assert product_dtype() == torch.float32
        with torch.autocast(cuda):  # the default dtype is CUDA's
            assert product_dtype() == torch.float16
        with torch.autocast(cuda, torch.float32):
            assert product_dtype() == torch.float32
        with torch.autocast("cpu"):
            assert product_dtype() == torch.bfloat16
        assert torch.autocast(cuda, torch.bfloat16)(product_dtype)() == torch.bfloat16
    with pytest.warns(UserWarning, match="CUDA is not available"):
        torch.autocast(cuda, dtype=torch.bfloat16)


def test_a_program_that_asks_whether_autocast_is_on_hears_what_it_would_on_a_gpu() -> (
    None
):
    """`torch.is_autocast_enabled()` asks for CUDA; the answer nests and ends."""

    def asked() -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(), torch.get_autocast_dtype("cuda")

    before = asked()
    assert before == (False, torch.float16)
    with fp8.installed(), torch.autocast("cuda", torch.bfloat16):
        assert asked() == (True, torch.bfloat16)
        with torch.autocast("cuda", torch.float32):
            assert asked() == (True, torch.float32)
        with torch.autocast("cuda", torch.bfloat16, enabled=False):
            assert asked() == (False, torch.bfloat16)
            with torch.autocast("cpu"):
                assert asked() == (False, torch.bfloat16)
        assert asked() == (True, torch.bfloat16)
    assert asked() == before


def test_autocast_for_cuda_is_left_alone_where_there_is_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A GPU without Transformer Engine emulates on the GPU."""
    seen: list[str] = []

    def record(_: object, device_type: str, *_args: object) -> None:
        seen.append(device_type)

    with monkeypatch.context() as patch:
        patch.setattr(torch.autocast, "__init__", record)
        with fp8.installed():
            torch.autocast("cuda", torch.bfloat16)
            patch.setattr(torch.cuda, "is_available", lambda: True)
            torch.autocast("cuda", torch.bfloat16)
    assert seen == ["cpu", "cuda"]


# ---------------------------------------------- environments, one line in conftest.py


def site_without(folder: Path, *patterns: str) -> Path:
    """Return a copy of the environment's packages, as links, without some."""
    left_out = {path for pattern in patterns for path in SITE.glob(pattern)}
    assert left_out
    folder.mkdir()
    for path in SITE.iterdir():
        if path not in left_out:
            (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize(
    ("hidden", "has_version", "has_module"),
    [
        (["transformer_engine*"], False, False),
        (["transformer_engine-*.dist-info"], False, True),
        (["transformer_engine"], True, False),
    ],
    ids=["nothing", "no metadata", "only metadata"],
)
def test_it_works_whatever_is_left_of_transformer_engine(
    hidden: list[str],
    has_version: bool,
    has_module: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With or without the wheel and its metadata, Lightning's answers restored."""
    answer = lightning_plugin._TRANSFORMER_ENGINE_AVAILABLE
    kept = dict(vars(answer))
    site = site_without(tmp_path / "site", *hidden)
    with monkeypatch.context() as patch:
        path = [str(site) if Path(p) == SITE else p for p in sys.path]
        patch.setattr(sys, "path", path)

        def state() -> list[object]:
            for name in ("available", "message"):
                vars(answer).pop(name, None)
            try:
                version = importlib.metadata.version("transformer_engine")
            except importlib.metadata.PackageNotFoundError:
                version = ""
            spec = importlib.util.find_spec("transformer_engine")
            return [version, spec and spec.origin, bool(answer)]

        before = state()
        assert before[0] == (te_source.version() if has_version else "")
        assert before[1:] == [
            str(site / "transformer_engine" / "__init__.py") if has_module else None,
            has_version,
        ]
        with fp8.installed():
            assert state() == [EMULATED, str(Path(fp8.__file__)), True]
            plugin = lightning_plugin.TransformerEnginePrecision(
                weights_dtype=torch.bfloat16
            )
            assert type(plugin.recipe) is fp8.DelayedScaling
        assert state() == before
    vars(answer).clear()
    vars(answer).update(kept)


_PROGRAM = """
import importlib.metadata

import pytest
import torch
import transformer_engine.pytorch as te
from transformer_engine.common.recipe import DelayedScaling, Format


def test_layer():
    layer = te.Linear(32, 16, params_dtype=torch.bfloat16, device="cuda")
    recipe = DelayedScaling(fp8_format=Format.HYBRID, amax_history_len=16)
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    with te.autocast(enabled=True, recipe=recipe):
        out = layer(x)
    out.sum().backward()
    assert layer.fp8_meta["scaling_fwd"].scale[0] != 1


def test_there_is_no_other():
    from snippets import fp8

    fp8.uninstall()
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("transformer_engine")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("transformer_engine.pytorch")
"""


def test_one_line_in_conftest_is_enough(tmp_path: Path) -> None:
    """A test file written for a GPU passes, where there is no Transformer Engine."""
    site = site_without(tmp_path / "site", "transformer_engine*")
    (tmp_path / "conftest.py").write_text("from snippets import fp8\n\nfp8.install()\n")
    (tmp_path / "test_program.py").write_text(_PROGRAM)
    done = subprocess.run(
        [
            sys.executable,
            "-S",
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "test_program.py",
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
