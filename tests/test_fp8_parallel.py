"""Tests of snippets/fp8/parallel.py: groups of ranks, and what they are told."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from snippets import fp8 as te

MODULES: dict[str, Any] = {
    "Linear": lambda: te.Linear(16, 16),
    "LayerNormLinear": lambda: te.LayerNormLinear(16, 16),
    "LayerNormMLP": lambda: te.LayerNormMLP(16, 32),
    "DotProductAttention": lambda: te.DotProductAttention(2, 16),
    "MultiheadAttention": lambda: te.MultiheadAttention(32, 2),
    "TransformerLayer": lambda: te.TransformerLayer(32, 64, 2),
}
WITH_CONTEXT = ("DotProductAttention", "MultiheadAttention", "TransformerLayer")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[Any]:
    """Start a group of one process.

    Yields:
        The group.
    """
    dist = torch.distributed
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo to make a process group with")
    url = (tmp_path / "store").as_uri()
    dist.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODULES)
def test_a_group_of_one_rank_is_taken(name: str, one_rank: Any) -> None:  # noqa: ANN401
    """As programs written for many ranks hand it over when they run on one."""
    module = MODULES[name]()
    module.set_tensor_parallel_group(None)
    module.set_tensor_parallel_group(one_rank)
    assert hasattr(module, "set_context_parallel_group") == (name in WITH_CONTEXT)
    if name in WITH_CONTEXT:
        module.set_context_parallel_group(None, [0], None)
        module.set_context_parallel_group([one_rank, one_rank], [0], None, "a2a+p2p")


@pytest.mark.parametrize("name", MODULES)
def test_a_group_of_more_is_refused_by_its_method(
    name: str,
    one_rank: Any,  # noqa: ANN401
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error names the method and the number of ranks."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 4)
    module = MODULES[name]()
    text = rf"{name}.set_tensor_parallel_group\(tp_group=...\) of 4 ranks"
    with pytest.raises(NotImplementedError, match=text):
        module.set_tensor_parallel_group(one_rank)
    if name in WITH_CONTEXT:
        text = rf"{name}.set_context_parallel_group\(cp_group=...\) of 4 ranks"
        with pytest.raises(NotImplementedError, match=text):
            module.set_context_parallel_group(one_rank, [0], None)


@pytest.mark.parametrize(
    ("module", "method"),
    [
        (te.LayerNorm(8), "reset_layer_norm_parameters"),
        (te.RMSNorm(8), "reset_rms_norm_parameters"),
        (te.LayerNormLinear(16, 16), "reset_layer_norm_parameters"),
        (te.LayerNormMLP(16, 16), "reset_layer_norm_parameters"),
    ],
)
def test_norms_are_reset_by_the_old_names(module: Any, method: str) -> None:  # noqa: ANN401
    """Only the norm's parameters change, and the warning names the class."""
    norm = [n for n, _ in module.named_parameters() if "fc" not in n]
    if hasattr(module, "layer_norm_weight"):
        norm = [n for n in norm if n.startswith("layer_norm")]
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    with torch.no_grad():
        for n in norm:
            module.get_parameter(n).fill_(7.0)
    name = type(module).__name__
    with pytest.warns(DeprecationWarning, match=rf"{name}.reset_parameters\(\)"):
        getattr(module, method)()
    assert norm
    for n, p in module.named_parameters():
        assert torch.equal(p, before[n])
