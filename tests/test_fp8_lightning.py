"""Tests of snippets/fp8/install.py under Lightning, as read in guide/fp8.

Lightning's own plugin, Trainer and Fabric run unmodified on the emulator. What they do
that a reader would not expect is pinned here, each with its way out.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.fabric.plugins import TransformerEnginePrecision
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins import (
    TransformerEnginePrecision as TrainerTransformerEnginePrecision,
)
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from snippets import fp8
from snippets.fp8.extra_state import load_extra_state
from tests import te_source

BF16, FP32 = torch.bfloat16, torch.float32
THEIR_RECIPES: Any = te_source.load("common.recipe")
pytestmark = [
    # Lightning calls te.fp8_autocast, which Transformer Engine deprecates: the warning
    # comes from the emulator as it does from Transformer Engine.
    pytest.mark.filterwarnings("ignore:fp8_autocast is deprecated:DeprecationWarning"),
    # Lightning's own, of the torch of this environment.
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many"),
]


@pytest.fixture(autouse=True)
def _installed() -> Iterator[None]:
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    torch.manual_seed(0)
    with fp8.installed():
        yield
    logger.setLevel(level)
    fp8.FP8GlobalStateManager.reset()


# ------------------------------------------------------------------- a model, its data


def digits() -> tuple[Tensor, Tensor]:
    """1,792 images of 64 pixels in [0, 1] and their digits."""
    images, labels = load_digits(return_X_y=True)
    return (
        torch.tensor(images[:1792] / 16, dtype=torch.float32),
        torch.tensor(labels[:1792]),
    )


IMAGES, LABELS = digits()
TRAINING = slice(0, 1536)


def network() -> nn.Sequential:
    """Layers whose sizes FP8 takes; the 10 digits are padded to 16 outputs."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 16)
    )


def batches() -> DataLoader[tuple[Tensor, ...]]:
    """Twelve batches of 128, always in the same order."""
    return DataLoader(TensorDataset(IMAGES[TRAINING], LABELS[TRAINING]), batch_size=128)


class Classifier(LightningModule):
    """What a reader writes; it knows nothing of FP8."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """Return the loss."""
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.losses.append(loss.item())
        return loss

    def predict_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        """Return the digits."""
        digits: Tensor = self.net(batch[0])[:, :10].argmax(1)
        return digits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW over the layers as they are now."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trainer(epochs: int, **options: Any) -> Trainer:  # noqa: ANN401
    """Return a quiet trainer on the CPU."""
    options.setdefault("precision", "transformer-engine")
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


def fabric_with(**options: Any) -> Fabric:  # noqa: ANN401
    """Return a Fabric on the CPU."""
    if "plugins" not in options:
        options.setdefault("precision", "transformer-engine")
    return Fabric(accelerator="cpu", devices=1, **options)


def convert(module: nn.Module, **options: Any) -> nn.Module:  # noqa: ANN401
    """Return what Lightning makes of ``module``."""
    options.setdefault("weights_dtype", BF16)
    return TransformerEnginePrecision(**options).convert_module(module)


def kinds(module: nn.Module) -> list[str]:
    """Return "te" or "torch" and the class of each direct child."""
    return [
        ("te." if "transformer_engine" in type(m).__module__ else "torch.")
        + type(m).__name__
        for m in module.children()
    ]


def same_state(a: nn.Module, b: nn.Module) -> bool:
    """Equal parameters and quantization states, bit for bit.

    The bytes of two equal states differ: torch writes the address of a tensor's storage
    into them. So what they hold is compared.
    """
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(
        same_extra_state(x[k], y[k]) if "extra" in k else torch.equal(x[k], y[k])
        for k in x
    )


def same_extra_state(a: Tensor, b: Tensor) -> bool:
    """Equal scales and histories, or none in both."""
    if not a.numel() or not b.numel():
        return a.numel() == b.numel()
    x, y = load_extra_state(a), load_extra_state(b)
    assert x is not None
    assert y is not None
    return x.keys() == y.keys() and all(
        torch.equal(x[k], y[k]) if isinstance(x[k], Tensor) else x[k] == y[k] for k in x
    )


def train_by_hand(
    net: nn.Sequential, epochs: int, dtype: torch.dtype = BF16, plain: bool = False
) -> list[float]:
    """Do what Lightning does to `Classifier`, with the emulator's names only."""
    for number, old in enumerate(net):
        new: nn.Module = old
        if isinstance(old, nn.Linear) and not plain:
            new = fp8.Linear(old.in_features, old.out_features, device="cpu")
        elif isinstance(old, nn.LayerNorm) and not plain:
            new = fp8.LayerNorm(old.normalized_shape[0], eps=old.eps, device="cpu")
        if new is not old:
            for name, parameter in old.named_parameters():
                getattr(new, name).data = parameter.data.clone()
        net[number] = new
    net.to(dtype)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    recipe = fp8.DelayedScaling()
    losses = []
    for _ in range(epochs):
        for images, labels in batches():
            optimizer.zero_grad()
            with (
                torch.autocast("cpu", dtype),
                fp8.autocast(enabled=not plain, recipe=recipe),
            ):
                loss = F.cross_entropy(net(images.to(dtype)), labels)
            torch.autograd.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return losses


# ------------------------------------------------------------------- it trains, in FP8


def test_trainer_trains_in_fp8_as_the_emulator_by_hand() -> None:
    """Layers are replaced, the loss falls, and every bit is that of a loop by hand."""
    model, mine = Classifier(), network()
    mine.load_state_dict(model.net.state_dict())
    trainer(3).fit(model, batches())
    assert kinds(model.net) == ["te.Linear", "te.LayerNorm", "torch.GELU", "te.Linear"]
    assert {p.dtype for p in model.parameters()} == {BF16}
    assert model.losses[-1] < 0.2 * model.losses[0]
    assert train_by_hand(mine, 3) == model.losses
    assert same_state(model.net, mine)


def test_fabric_trains_in_fp8_as_the_emulator_by_hand() -> None:
    """The same with Fabric: FP8 in the forward, float32 losses outside it."""
    fabric, net = fabric_with(), network()
    mine = network()
    mine.load_state_dict(net.state_dict())
    model = fabric.setup_module(net)
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer: Any = fabric.setup_optimizers(plain)
    first = mine_first = None
    convert(mine)
    other = torch.optim.SGD(mine.parameters(), lr=0.1)
    for images, labels in batches():
        out = model(images)
        assert out.dtype == FP32
        loss = F.cross_entropy(out, labels)
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        with torch.autocast("cpu", BF16), fp8.autocast(recipe=fp8.DelayedScaling()):
            my_loss = F.cross_entropy(mine(images.to(BF16)).float(), labels)
        torch.autograd.backward(my_loss)
        other.step()
        other.zero_grad()
        assert torch.equal(loss, my_loss)
        first, mine_first = first or loss.item(), mine_first or my_loss.item()
    assert same_state(net, mine)
    assert first is not None
    assert loss.item() < 0.7 * first


def test_fp8_really_happens() -> None:
    """Scales leave one, results differ from BF16's, and their codes are FP8's."""
    model, plain = Classifier(), network()
    plain.load_state_dict(model.net.state_dict())
    trainer(1).fit(model, batches())
    layer: Any = model.net[0]
    scale = layer.fp8_meta["scaling_fwd"].scale
    # The images' amax is 1: their scale is 448 / 1. The output has no scale.
    assert scale[0] == 448
    assert scale[1] > 1024
    assert scale[2] == 1
    assert (layer.fp8_meta["scaling_bwd"].scale[0] > 1).item()
    bf16 = train_by_hand(plain, 1, plain=True)
    differences = [a != b for a, b in zip(model.losses, bf16, strict=True)]
    assert sum(differences) > len(differences) / 2
    assert abs(model.losses[-1] - bf16[-1]) < 0.05 * bf16[-1]


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("transformer-engine", BF16), ("transformer-engine-float16", torch.float16)],
)
def test_both_names_work(precision: str, dtype: torch.dtype) -> None:
    """The flag chooses the storage dtype; activations have it, too."""
    model = Classifier()
    trainer(1, precision=precision, limit_train_batches=3).fit(model, batches())
    assert {p.dtype for p in model.parameters()} == {dtype}
    fabric = fabric_with(precision=precision)
    seen = []
    net = nn.Sequential(nn.Linear(32, 16))
    converted = fabric.setup_module(net)
    net[0].register_forward_hook(lambda *a: seen.append(a[2].dtype))
    assert converted(torch.ones(16, 32)).dtype == FP32
    assert seen == [dtype]


def test_any_recipe_may_be_given_to_the_plugin() -> None:
    """It is annotated as delayed scaling and passes on what it gets."""
    recipe = fp8.Float8CurrentScaling()
    plugin = TrainerTransformerEnginePrecision(weights_dtype=BF16, recipe=recipe)
    model = Classifier()
    trainer(2, precision=None, plugins=plugin).fit(model, batches())
    layer: Any = model.net[0]
    assert layer.fp8_meta["recipe"] is recipe
    assert model.losses[-1] < 0.5 * model.losses[0]


def test_prediction_is_in_fp8_changes_no_scale_and_is_as_right_as_in_bf16() -> None:
    """On digits that were not trained on, by not more than 3 of 100 less."""
    model, plain = Classifier(), network()
    plain.load_state_dict(model.net.state_dict())
    quiet = trainer(6)
    quiet.fit(model, batches())
    layer: Any = model.net[0]
    scales = [layer.fp8_meta[k].scale.clone() for k in ("scaling_fwd", "scaling_bwd")]
    rest = DataLoader(TensorDataset(IMAGES[1536:]), batch_size=128)
    found: Any = quiet.predict(model, rest)
    accuracy = (torch.cat(found) == LABELS[1536:]).float().mean()
    assert torch.equal(layer.fp8_meta["scaling_fwd"].scale, scales[0])
    assert torch.equal(layer.fp8_meta["scaling_bwd"].scale, scales[1])
    train_by_hand(plain, 6, plain=True)
    guesses = plain(IMAGES[1536:].to(BF16))[:, :10].argmax(1)
    assert accuracy > (guesses == LABELS[1536:]).float().mean() - 0.03
    assert accuracy > 0.8


# ----------------------------------------------------------------------- optimizers


def test_fabric_setup_with_an_optimizer_trains_nothing() -> None:
    """`setup(model, optimizer)` leaves the optimizer dead parameters to train."""
    fabric, net = fabric_with(), network()
    optimizer: Any = torch.optim.SGD(net.parameters(), lr=0.1)
    model, optimizer = fabric.setup(net, optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert not held & {id(p) for p in model.parameters()}
    before = {name: p.clone() for name, p in net.named_parameters()}
    for images, labels in batches():
        fabric.backward(F.cross_entropy(model(images), labels))
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    # Gradients are not set to zero either: they grow.
    assert all(p.grad is not None for p in net.parameters())
    # The fix: the module first, then an optimizer of what it has become.
    net = network()
    model = fabric.setup_module(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = fabric.setup_optimizers(optimizer)
    before = {name: p.clone() for name, p in net.named_parameters()}
    fabric.backward(F.cross_entropy(model(IMAGES[:128]), LABELS[:128]))
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_trainer_asks_for_optimizers_after_it_has_replaced_layers() -> None:
    """So `configure_optimizers` is safe; a list of parameters made before is not."""

    class Early(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.early = list(self.net.parameters())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.early, lr=3e-3)

    late, early = Classifier(), Early()
    first = {n: p.clone().to(BF16) for n, p in early.named_parameters()}
    for model in (late, early):
        trainer(1, limit_train_batches=2).fit(model, batches())
    assert all(torch.equal(p, first[n]) for n, p in early.named_parameters())
    held = late.optimizers()
    assert not isinstance(held, list)
    assert {id(p) for p in held.param_groups[0]["params"]} == {
        id(p) for p in late.parameters()
    }


def test_weights_are_in_bfloat16_and_small_updates_are_lost() -> None:
    """The flag is "true" BF16; `weights_dtype=float32` keeps FP32 weights in FP8."""
    lost = {}
    for name, plugin in {
        "flag": TransformerEnginePrecision(weights_dtype=BF16),
        "float32": TransformerEnginePrecision(
            weights_dtype=FP32, fallback_compute_dtype=BF16
        ),
    }.items():
        torch.manual_seed(0)
        fabric = fabric_with(plugins=plugin)
        net: Any = network()
        model = fabric.setup_module(net)
        seen: list[torch.dtype] = []
        net[0].register_forward_hook(lambda *a, seen=seen: seen.append(a[2].dtype))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0)
        before = net[0].weight.detach().clone()
        fabric.backward(F.cross_entropy(model(IMAGES[:128]), LABELS[:128]))
        moving = net[0].weight.grad != 0
        optimizer.step()
        lost[name] = (net[0].weight == before)[moving].float().mean().item()
        assert seen == [BF16]  # both compute alike
    assert lost["flag"] > 0.9
    assert lost["float32"] < 0.01


def test_float16_has_no_loss_scaling() -> None:
    """Gradients below 2^-25 are zero: the flag chooses FP16 weights and no scaler."""
    fabric = fabric_with(precision="transformer-engine-float16")
    net: Any = nn.Sequential(nn.Linear(32, 16))
    model = fabric.setup_module(net)
    for size, kept in ((2.0**-20, 16), (2.0**-30, 0)):
        net[0].bias.grad = None
        fabric.backward((size * model(torch.ones(16, 32))).sum())
        assert net[0].bias.grad.dtype == torch.float16
        assert net[0].bias.grad.count_nonzero() == kept
    assert not hasattr(fabric._precision, "scaler")


# ---------------------------------------------------------------- what is replaced


def test_a_layer_norm_without_parameters_crashes_the_conversion() -> None:
    """`elementwise_affine=False` has no weight to copy; keep it in a function."""
    with pytest.raises(
        AttributeError, match=r"^'NoneType' object has no attribute 'data'$"
    ):
        convert(nn.Sequential(nn.LayerNorm(32, elementwise_affine=False)))

    class Norm(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:])

    assert kinds(convert(nn.Sequential(nn.Linear(32, 16), Norm()))) == [
        "te.Linear",
        "torch.Norm",
    ]


def test_a_layer_norm_without_bias_gets_one() -> None:
    """A parameter more than the model had, which trains."""
    net = nn.Sequential(nn.LayerNorm(32, bias=False))
    assert [name for name, _ in net.named_parameters()] == ["0.weight"]
    assert [n for n, _ in convert(net).named_parameters()] == ["0.weight", "0.bias"]


def test_frozen_layers_thaw() -> None:
    """`requires_grad=False` is not copied: a fine-tuned backbone trains again."""
    net = network().requires_grad_(False)
    convert(net)
    assert all(p.requires_grad for p in net.parameters())
    # The fix: freeze after setup (Trainer: in configure_optimizers).
    net.requires_grad_(False)
    assert not any(p.requires_grad for p in net.parameters())


def test_tied_weights_are_untied() -> None:
    """The head gets a copy of the embedding: two parameters that drift apart."""

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(64, 32)
            self.head = nn.Linear(32, 64, bias=False)
            self.head.weight = self.embedding.weight

    model: Any = Language()
    assert sum(p.numel() for p in model.parameters()) == 2048
    convert(model)
    assert model.head.weight is not model.embedding.weight
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert sum(p.numel() for p in model.parameters()) == 4096
    # The fix: tie again after setup.
    model.head.weight = model.embedding.weight
    assert sum(p.numel() for p in model.parameters()) == 2048


def test_a_layer_with_two_names_is_replaced_under_one() -> None:
    """The other name keeps the old layer, with weights of its own."""

    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = self.right = nn.Linear(32, 32)

    model: Any = Siamese()
    convert(model)
    assert type(model.left) is fp8.Linear
    assert type(model.right) is nn.Linear
    assert model.left.weight is not model.right.weight


def test_subclasses_parametrizations_and_hooks_are_dropped() -> None:
    """Whatever is an nn.Linear becomes a plain te.Linear, without a word."""

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 100 * super().forward(input)

    normed: Any = nn.utils.parametrizations.weight_norm(nn.Linear(32, 16))
    hooked = nn.Linear(32, 16)
    hooked.register_forward_hook(lambda *_: None)
    net = convert(nn.Sequential(Scaled(32, 16), normed, hooked))
    assert kinds(net) == ["te.Linear"] * 3
    assert "1.parametrizations.weight.original0" not in net.state_dict()
    assert not any(m._forward_hooks for m in net.children())


def test_a_bare_layer_is_not_replaced() -> None:
    """Only children are: `setup_module(nn.Linear(...))` stays in BF16."""
    assert type(convert(nn.Linear(32, 16))) is nn.Linear


def test_one_te_layer_leaves_all_others_alone() -> None:
    """The model is taken to be converted; only `replace_layers=True` says so."""
    net = nn.Sequential(fp8.Linear(32, 16), nn.Linear(16, 16))
    assert kinds(convert(net)) == ["te.Linear", "torch.Linear"]
    assert kinds(convert(net, replace_layers=True)) == ["te.Linear", "torch.Linear"]


def test_replace_layers_false_leaves_the_model_alone() -> None:
    """Then FP8 is where the model itself has te layers."""
    assert kinds(convert(network(), replace_layers=False)) == [
        "torch.Linear",
        "torch.LayerNorm",
        "torch.GELU",
        "torch.Linear",
    ]


def test_initial_values_are_kept() -> None:
    """Replacing copies weights and biases; only the dtype changes."""
    net = network()
    before = {name: p.clone() for name, p in net.named_parameters()}
    for name, parameter in convert(net).named_parameters():
        assert torch.equal(parameter, before[name].to(BF16))


def test_sizes_that_do_not_divide_stay_in_high_precision_with_a_warning() -> None:
    """10 outputs are not a multiple of 16."""
    with pytest.warns(
        UserWarning,
        match=r"The layer '0' does not fit this criteria. You might want to add",
    ):
        net = convert(nn.Sequential(nn.Linear(32, 10)))
    assert kinds(net) == ["torch.Linear"]


def test_lightning_s_check_of_sizes_is_the_wrong_way_round() -> None:
    """It asks 8 of in_features, where FP8 needs 16, and 16 of out_features."""
    net = nn.Sequential(nn.Linear(24, 16))
    model = fabric_with().setup_module(net)
    assert kinds(net) == ["te.Linear"]
    with pytest.raises(
        ValueError,
        match=r"FP8 execution requires the product of all dimensions except the last "
        r"to be divisible by 8 and the last dimension to be divisible by 16, but got "
        r"tensor with dims=\[16, 24\]",
    ):
        model(torch.ones(16, 24))


def test_the_last_batch_of_an_epoch_stops_the_training() -> None:
    """1,541 images in batches of 128 leave 5; `drop_last=True` or padding."""
    data = TensorDataset(IMAGES[:1541], LABELS[:1541])
    with pytest.raises(ValueError, match=r"dims=\[5, 64\] \(product of leading dims"):
        trainer(1).fit(Classifier(), DataLoader(data, batch_size=128))
    model = Classifier()
    trainer(1).fit(model, DataLoader(data, batch_size=128, drop_last=True))
    assert len(model.losses) == 12


def test_the_projection_of_multihead_attention_is_replaced_and_never_called() -> None:
    """nn.MultiheadAttention reads its weight: the product is in BF16, not FP8."""
    net = nn.Sequential(nn.MultiheadAttention(32, 4, batch_first=True))
    fabric = fabric_with()
    fabric.setup_module(net)
    x = torch.randn(2, 16, 32, dtype=BF16)
    attention: Any = net[0]
    with fabric.autocast():
        attention(x, x, x)
    assert type(attention.out_proj) is fp8.Linear
    assert attention.in_proj_weight.dtype == BF16
    assert "scaling_fwd" not in attention.out_proj.fp8_meta


def test_an_encoder_layer_is_in_fp8_in_evaluation_too() -> None:
    """The fast path would go past the replaced layers; autocast keeps it off."""
    net: Any = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
    model = fabric_with().setup_module(net)
    with torch.no_grad():
        model.eval()(torch.randn(2, 16, 32))
    assert net.linear1.fp8_meta["scaling_fwd"].amax_history[0, 0] > 0
    assert net.linear1.fp8_meta["scaling_fwd"].scale[0] == 1  # evaluation: no update


# ------------------------------------------------------------------------ init_module


def built_inside(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a module made inside ``fabric.init_module()`` with ``replace_layers``."""
    plugin = TransformerEnginePrecision(weights_dtype=BF16, replace_layers=True)
    with fabric_with(plugins=plugin).init_module():
        return make()


def test_init_module_initializes_as_transformer_engine_does() -> None:
    """N(0, 0.023), not torch's uniform of standard deviation 1 / sqrt(3 * 64)."""
    made: Any = built_inside(lambda: nn.Linear(64, 1024))
    assert type(made) is fp8.Linear
    assert made.weight.std().item() == pytest.approx(0.023, rel=0.05)
    assert nn.Linear(64, 1024).weight.std().item() == pytest.approx(0.0722, rel=0.05)
    assert made.bias.count_nonzero() == 0


def test_init_module_takes_a_positional_bias_for_another_argument() -> None:
    """The third argument of te.Linear is `sequence_parallel`: the bias stays."""
    assert built_inside(lambda: nn.Linear(32, 16, False)).bias is not None
    assert [
        n
        for n, _ in built_inside(
            lambda: nn.Linear(32, 16, bias=False)
        ).named_parameters()
    ] == ["weight"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(32, 16, dtype=FP32), "unexpected keyword argument 'dtype'"),
        (
            lambda: nn.LayerNorm(32, elementwise_affine=False),
            "unexpected keyword argument 'elementwise_affine'",
        ),
        (lambda: nn.LayerNorm(32, bias=False), "unexpected keyword argument 'bias'"),
    ],
)
def test_init_module_knows_only_transformer_engine_s_arguments(
    make: Callable[[], nn.Module], words: str
) -> None:
    """The class is another; arguments that it lacks are a TypeError."""
    with pytest.raises(TypeError, match=words):
        built_inside(make)


def test_init_module_does_not_check_sizes() -> None:
    """A layer of 10 outputs is made, and fails in its first call."""
    made = built_inside(lambda: nn.Sequential(nn.Linear(32, 10)))
    assert kinds(made) == ["te.Linear"]
    model = fabric_with().setup_module(made)
    with pytest.raises(ValueError, match=r"dims=\[10, 32\] \(product of leading dims"):
        model(torch.ones(16, 32))


# ------------------------------------------------------------------------- recipes


def test_an_unknown_key_of_a_recipe_is_an_error_here_and_ignored_upstream() -> None:
    """`{"amax_histroy_len": 16}` gives 1,024 on a GPU, without a word."""
    with pytest.raises(
        TypeError,
        match=r"DelayedScaling has no field 'amax_histroy_len'. Did you mean "
        r"'amax_history_len'\?",
    ):
        TransformerEnginePrecision(weights_dtype=BF16, recipe={"amax_histroy_len": 16})
    theirs = THEIR_RECIPES.DelayedScaling(amax_histroy_len=16)
    assert theirs.amax_history_len == 1024


def test_a_recipe_as_a_dictionary() -> None:
    """`fp8_format` is a name there, in capital letters."""
    plugin = TransformerEnginePrecision(
        weights_dtype=BF16, recipe={"fp8_format": "E4M3", "amax_history_len": 16}
    )
    assert plugin.recipe == fp8.DelayedScaling(
        fp8_format=fp8.Format.E4M3, amax_history_len=16
    )
    with pytest.raises(AttributeError, match="hybrid"):
        TransformerEnginePrecision(weights_dtype=BF16, recipe={"fp8_format": "hybrid"})


# --------------------------------------------------------------------- checkpoints


class Converted(Classifier):
    """The way out: the model itself has te layers, so Lightning converts nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            fp8.Linear(64, 128, device="cpu"),
            fp8.LayerNorm(128, device="cpu"),
            nn.GELU(),
            fp8.Linear(128, 16, device="cpu"),
        )


def test_trainer_cannot_resume_what_it_has_converted(tmp_path: Path) -> None:
    """It loads before it converts: the checkpoint's `_extra_state` is unexpected."""
    path = tmp_path / "last.ckpt"
    half = trainer(1)
    half.fit(Classifier(), batches())
    half.save_checkpoint(path)
    words = (
        r'Unexpected key\(s\) in state_dict: "net.0._extra_state", '
        r'"net.1._extra_state", "net.3._extra_state"'
    )
    with pytest.raises(RuntimeError, match=words):
        trainer(2).fit(Classifier(), batches(), ckpt_path=path, weights_only=False)
    with pytest.raises(RuntimeError, match=words):
        Classifier.load_from_checkpoint(path, weights_only=False)


def test_a_model_of_te_layers_resumes_bit_for_bit(tmp_path: Path) -> None:
    """Two epochs are one and one: parameters, scales, histories, losses."""
    path = tmp_path / "last.ckpt"
    torch.manual_seed(1)
    whole = Converted()
    trainer(2).fit(whole, batches())
    torch.manual_seed(1)
    first = Converted()
    half = trainer(1)
    half.fit(first, batches())
    half.save_checkpoint(path)
    fp8.FP8GlobalStateManager.reset()
    torch.manual_seed(2)
    second = Converted()
    trainer(2).fit(second, batches(), ckpt_path=path, weights_only=False)
    assert first.losses + second.losses == whole.losses
    assert same_state(second.net, whole.net)
    history = second.net[0].fp8_meta["scaling_fwd"].amax_history  # type: ignore[index, union-attr]
    assert history[-24:, 0].count_nonzero() == 24  # one row a step, resumed too
    assert whole.net.state_dict()["0._extra_state"].numel() > 1024


def test_fabric_resumes_if_it_loads_after_setup(tmp_path: Path) -> None:
    """`fabric.load` into the module of `setup_module`: the layers are there then."""
    fabric, net = fabric_with(), network()
    model = fabric.setup_module(net)
    for images, labels in list(batches())[:3]:
        fabric.backward(F.cross_entropy(model(images), labels))
    fabric.save(tmp_path / "model.ckpt", {"model": model})
    other = network()
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict"):
        fabric.load(tmp_path / "model.ckpt", {"model": other}, weights_only=False)
    again = fabric.setup_module(other)
    fabric.load(tmp_path / "model.ckpt", {"model": again}, weights_only=False)
    assert same_state(other, net)
    with torch.no_grad():
        assert torch.equal(again(IMAGES[:128]), model(IMAGES[:128]))


def test_weights_go_back_to_a_plain_model_without_the_extra_state() -> None:
    """For inference in plain PyTorch: leave `_extra_state` out."""
    net: Any = convert(network())
    state = net.state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        network().load_state_dict(state)
    plain = {k: v for k, v in state.items() if not k.endswith("_extra_state")}
    other = network().to(BF16)
    other.load_state_dict(plain)
    assert torch.equal(other.get_parameter("0.weight"), net[0].weight)


def test_validation_leaves_its_amax_to_the_next_training_step() -> None:
    """Without gradients no scale changes, but the step after takes the larger amax."""
    fabric, net = fabric_with(), network()
    model = fabric.setup_module(net)
    layer: Any = net[0]
    fabric.backward(F.cross_entropy(model(IMAGES[:128]), LABELS[:128]))
    state = layer.fp8_meta["scaling_fwd"]
    assert state.scale[0] == 448
    with torch.no_grad():
        model.eval()(8 * IMAGES[:128])
    assert state.scale[0] == 448
    assert state.amax_history[0, 0] == 8
    model.train()(IMAGES[:128])
    assert state.scale[0] == 448 / 8


def test_lightning_is_the_version_whose_behaviour_is_described() -> None:
    """The traps above are those of Lightning 2.6.6."""
    assert lightning.__version__ == "2.6.6"
