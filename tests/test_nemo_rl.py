"""Tests of snippets/nemo_rl.py and of the formulas in guide/nemo_rl."""

import copy
import itertools
import random
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.nn.functional import log_softmax

from snippets.nemo_rl import MISSING, Finding, check_policy_config
from snippets.precision_names import NAMES

MEGATRON = "policy.megatron_cfg"
OPTIMIZER = f"{MEGATRON}.optimizer"
FP8 = f"{MEGATRON}.fp8_cfg"
VLLM = "policy.generation.vllm_cfg"
CORRECTION = "loss_fn.use_importance_sampling_correction"


def sound() -> dict[str, Any]:
    """A configuration with the keys and values that NeMo RL ships, on Megatron."""
    return {
        "grpo": {"num_prompts_per_step": 32},
        "loss_fn": {
            "ratio_clip_min": 0.2,
            "kl_input_clamp_value": 20.0,
            "use_importance_sampling_correction": False,
            "truncated_importance_sampling_type": None,
            "truncated_importance_sampling_ratio": None,
        },
        "policy": {
            "model_name": "Qwen/Qwen2.5-1.5B",
            "precision": "bfloat16",
            "max_grad_norm": 1.0,
            "logprob_chunk_size": None,
            "offload_optimizer_for_logprob": False,
            "dtensor_cfg": {"enabled": False},
            "megatron_cfg": {
                "enabled": True,
                "pipeline_dtype": "${policy.precision}",
                "moe_router_dtype": "fp64",
                "mtp_loss_scaling_factor": 0.0,
                "defer_fp32_logits": False,
                "peft": {"enabled": False, "lora_dtype": None},
                "optimizer": {
                    "lr": 5.0e-6,
                    "bf16": True,
                    "fp16": False,
                    "params_dtype": "float32",
                    "use_precision_aware_optimizer": True,
                    "clip_grad": "${policy.max_grad_norm}",
                },
                "distributed_data_parallel_config": {"grad_reduce_in_fp32": False},
                "fp8_cfg": {
                    "enabled": False,
                    "fp8": "e4m3",
                    "fp8_recipe": "blockwise",
                    "fp8_param": False,
                },
            },
            "generation": {
                "backend": "vllm",
                "temperature": 1.0,
                "val_temperature": "${.temperature}",
                "vllm_kwargs": {},
                "vllm_cfg": {
                    "precision": "${policy.precision}",
                    "kv_cache_dtype": "auto",
                    "use_deep_gemm": False,
                    "num_last_layers_in_bf16": 0,
                    "gpu_memory_utilization": 0.6,
                },
            },
        },
    }


def changed(changes: Mapping[str, object]) -> dict[str, Any]:
    """The sound configuration with some paths set, or removed by MISSING."""
    cfg = sound()
    for path, value in changes.items():
        *parents, key = path.split(".")
        section = cfg
        for parent in parents:
            section = section.setdefault(parent, {})
        if value is MISSING:
            section.pop(key, None)
        else:
            section[key] = value
    return cfg


def judged(cfg: object) -> set[tuple[str, str]]:
    """Level and path of the errors and warnings."""
    found = check_policy_config(cfg)
    return {(f.level, f.path) for f in found if f.level != "note"}


# Exact laws


def test_what_nemo_rl_ships_has_no_error_and_no_warning() -> None:
    """The sound configuration earns notes only, and they are about true things."""
    found = check_policy_config(sound(), strict=True)

    assert [finding.level for finding in found] == ["note"] * 3
    assert found[-1].problem == f"not checked: {MEGATRON}.peft, grpo"


CASES = [
    # unknown keys, and where the thing is
    ({"policy.gradient_clipping": True}, "error", "", "policy.max_grad_norm"),
    ({"policy.loss_scale": 1024}, "error", "", f"{OPTIMIZER}.loss_scale"),
    ({"policy.mixed_precision": "bf16"}, "error", "", "policy.precision"),
    ({"policy.fp16": True}, "error", "", f"it is {OPTIMIZER}.fp16"),
    ({"policy.fp8": True}, "error", "", f"it is {FP8}"),
    ({"policy.precisions": "bfloat16"}, "error", "", "did you mean precision?"),
    ({"policy.grad_reduce_in_fp32": True}, "error", "", f"{MEGATRON}.distributed"),
    ({"policy.weights_dtype": "x"}, "error", "", "keys about precision here"),
    ({f"{FP8}.fp8_params": False}, "error", "", "did you mean fp8_param?"),
    ({f"{MEGATRON}.first_last_layers_bf16": True}, "error", "", "model_overrides"),
    ({f"{VLLM}.torch_dtype": "auto"}, "error", "", "it is policy.precision"),
    (
        {"loss_fn.use_importance_sampling_corection": True},
        *("error", "", "did you mean use_importance_sampling_correction?"),
    ),
    # values
    ({"policy.precision": "bf16"}, "error", "", "write 'bfloat16'"),
    ({"policy.precision": "torch.bfloat16"}, "error", "", "write 'bfloat16'"),
    ({"policy.precision": "bf16-mixed"}, "error", "", "write 'bfloat16'"),
    ({"policy.precision": "bfloat_16"}, "error", "", "write 'bfloat16'"),
    ({"policy.precision": 16}, "error", "", "write 'float16'"),
    ({"policy.precision": "fp8"}, "error", "", f"it is {FP8}"),
    ({"policy.precision": None}, "error", "", "write one of float32, bfloat16"),
    ({"policy.precision": MISSING}, "error", "", "write one of float32, bfloat16"),
    ({"policy.max_grad_norm": True}, "error", "", "number from 0 or null"),
    ({"policy.max_grad_norm": "1.0"}, "error", "", "number from 0 or null"),
    ({"policy.max_grad_norm": float("nan")}, "error", "", "number from 0 or null"),
    ({"policy.max_grad_norm": float("inf")}, "error", "", "number from 0 or null"),
    ({"policy.max_grad_norm": -1}, "error", "", "number from 0 or null"),
    ({f"{MEGATRON}.moe_router_dtype": "float32"}, "error", "", "fp32, fp64"),
    ({f"{OPTIMIZER}.bf16": "true"}, "error", "", "true or false, without quotes"),
    ({f"{OPTIMIZER}.bf16": 1}, "error", "", "true or false, without quotes"),
    ({f"{FP8}.fp8": "e5m2"}, "error", "", "e4m3"),
    ({f"{FP8}.fp8_recipe": "block"}, "error", "", "blockwise"),
    ({f"{VLLM}.kv_cache_dtype": "fp8_e5m2"}, "error", "", "fp8_e4m3"),
    (
        {"loss_fn.truncated_importance_sampling_type": "TIS"},
        *("error", "", "write 'tis'"),
    ),
    ({MEGATRON: 3}, "error", "", "indent its keys"),
    # contradictions
    ({"policy.dtensor_cfg.enabled": True}, "error", f"{MEGATRON}.enabled", "disable"),
    ({f"{OPTIMIZER}.fp16": True}, "error", "", "write false"),
    ({f"{OPTIMIZER}.bf16": False}, "error", "", "write true"),
    ({f"{MEGATRON}.pipeline_dtype": "float16"}, "error", "", "${policy.precision}"),
    ({f"{FP8}.enabled": MISSING}, "error", "", "true or false"),
    ({f"{VLLM}.kv_cache_dtype": "fp8"}, "error", "", "write auto"),
    ({f"{VLLM}.precision": "fp8"}, "error", CORRECTION, "write true"),
    (
        {"policy.generation.vllm_kwargs.dtype": "float16"},
        *("error", "", f"it is {VLLM}.precision"),
    ),
    # prices
    ({f"{VLLM}.precision": "half"}, "warning", CORRECTION, "write true"),
    ({f"{VLLM}.use_deep_gemm": True}, "warning", "", "remove it"),
    ({f"{VLLM}.num_last_layers_in_bf16": 2}, "warning", "", "remove it"),
    ({f"{OPTIMIZER}.initial_loss_scale": 2**16}, "warning", "", "remove it"),
    ({f"{OPTIMIZER}.loss_scale": 128}, "warning", "", "remove it"),
    ({f"{OPTIMIZER}.clip_grad": 0.5}, "warning", "policy.max_grad_norm", "clip_grad"),
    ({f"{MEGATRON}.fp32_lm_head": True}, "warning", f"{VLLM}.fp32_lm_head", "both"),
    ({f"{VLLM}.fp32_lm_head": True}, "warning", "", "both"),
]


@pytest.mark.parametrize(
    ("changes", "level", "path", "fix"), CASES, ids=[str(case[0]) for case in CASES]
)
def test_one_mistake_gives_one_finding_at_its_path(
    changes: dict[str, object], level: str, path: str, fix: str
) -> None:
    """The finding names the key, the value that was given, and the right one."""
    cfg = changed(changes)
    path = path or next(iter(changes))
    bad = [f for f in check_policy_config(cfg) if f.level != "note"]

    assert [(f.level, f.path) for f in bad] == [(level, path)]
    assert fix in bad[0].fix
    if path in changes:
        assert bad[0].value is changes[path]


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("aware", [False, True])
def test_dtypes_agree_as_megatron_and_nemo_rl_want_them(
    precision: str, aware: bool
) -> None:
    """An error where NeMo RL asserts, where no scaler is built, or both halves are on.

    The law is written from ``_validate_dtype_config`` and Megatron's
    ``_get_megatron_optimizer_based_on_param_groups``, independent of the file.
    """
    for bf16, fp16 in itertools.product((False, True), repeat=2):
        asserts = {
            "float32": bf16 or fp16,
            "bfloat16": aware and not bf16,
            "float16": aware and not fp16,
        }[precision]
        no_scaler = precision == "float16" and not fp16
        other_half = (precision == "bfloat16" and fp16) or (
            precision == "float16" and bf16
        )
        cfg = changed({
            "policy.precision": precision,
            f"{OPTIMIZER}.bf16": bf16,
            f"{OPTIMIZER}.fp16": fp16,
            f"{OPTIMIZER}.use_precision_aware_optimizer": aware,
        })
        refused = bool(judged(cfg))

        assert refused == (asserts or no_scaler or other_half), (bf16, fp16)


def test_fp8_needs_all_its_keys_and_warns_of_weights_in_it() -> None:
    """Switched on, the three keys have no default, and fp8_param has a price."""
    on = {f"{FP8}.enabled": True, CORRECTION: True}
    for key in ("fp8", "fp8_recipe", "fp8_param"):
        path = f"{FP8}.{key}"
        assert judged(changed({**on, path: MISSING})) == {("error", path)}
    found = judged(changed({**on, f"{FP8}.fp8_param": True}))
    assert found == {("warning", f"{FP8}.fp8_param")}
    assert not judged(changed(on))


def test_rollouts_in_another_precision_need_the_correction() -> None:
    """FP8 without it is refused; other mismatches warn; with it all is well."""
    dtypes = ("float32", "bfloat16", "float16", "fp8")
    for rollout, fp8_training, correction in itertools.product(
        dtypes, (False, True), (False, True)
    ):
        cfg = changed({
            f"{VLLM}.precision": rollout,
            f"{FP8}.enabled": fp8_training,
            CORRECTION: correction,
        })
        same = rollout == ("fp8" if fp8_training else "bfloat16")
        level = "error" if rollout == "fp8" else "warning"
        needed = not correction and (rollout == "fp8" or not same)

        assert judged(cfg) == ({(level, CORRECTION)} if needed else set())


@pytest.mark.parametrize(
    ("backend", "key"),
    [("sglang", "sglang_cfg.dtype"), ("trtllm", "trtllm_cfg.precision")],
)
def test_every_engine_is_compared(backend: str, key: str) -> None:
    """The rollout's precision is that of the backend which is switched on."""
    cfg = {"policy.generation.backend": backend, f"policy.generation.{key}": "float16"}

    assert judged(changed(cfg)) == {("warning", CORRECTION)}
    cfg[f"policy.generation.{key}"] = "bfloat16"
    assert not judged(changed(cfg))


@pytest.mark.parametrize("backend", ["megatron", "sglang", "trtllm"])
def test_settings_of_an_engine_that_is_off_are_not_judged(backend: str) -> None:
    """What an overlay inherits for vLLM does not count where vLLM does not run."""
    stale = {
        f"{VLLM}.precision": "fp8",
        f"{VLLM}.kv_cache_dtype": "fp8",
        f"{VLLM}.num_last_layers_in_bf16": 2,
        f"{VLLM}.fp32_lm_head": True,
        "policy.generation.vllm_kwargs": {"dtype": "float16"},
    }

    assert judged(changed(stale))
    assert not judged(changed(stale | {"policy.generation.backend": backend}))


@pytest.mark.parametrize("precision", ["fp8", "float16", "auto", "bfloat16"])
def test_dynamo_generates_in_bfloat16_only(precision: str) -> None:
    """NeMo RL's DynamoVllmConfig refuses any other precision, corrected or not."""
    path = f"{VLLM}.precision"
    dynamo = {"policy.generation.backend": "dynamo", path: precision}
    refused = set() if precision == "bfloat16" else {("error", path)}

    assert judged(changed(dynamo)) == refused
    assert judged(changed({**dynamo, CORRECTION: True})) == refused


@pytest.mark.parametrize("key", ["weight", "activation"])
def test_mxfp8_has_scales_of_powers_of_two(key: str) -> None:
    """NeMo RL raises if one is switched off; blocks without is_mx may do without."""
    path = f"{VLLM}.pow2_{key}_scaling_factors"
    fp8: dict[str, object] = {f"{VLLM}.precision": "fp8", CORRECTION: True, path: False}

    assert not judged(changed(fp8))
    assert judged(changed({**fp8, f"{VLLM}.is_mx": True})) == {("error", path)}
    assert not judged(changed({**fp8, f"{VLLM}.is_mx": True, path: True}))


@pytest.mark.parametrize(
    ("norm", "clip", "text"),
    [
        (None, 0, ""),
        (None, 0.0, ""),
        (1.0, 1, ""),
        (1.0, 0, "clips nothing: clip_grad=0"),
        (None, 1.0, "clips at clip_grad=1.0"),
        (0.5, 1.0, "clips at clip_grad=1.0"),
    ],
)
def test_clipping_on_megatron_is_clip_grad(
    norm: object, clip: float, text: str
) -> None:
    """DTensor's null and Megatron's 0 are the same: no clipping at all."""
    cfg = changed({"policy.max_grad_norm": norm, f"{OPTIMIZER}.clip_grad": clip})
    said = [f.problem for f in check_policy_config(cfg) if f.level == "warning"]

    assert said == ([f"Megatron does not read it and {text}"] if text else [])


def test_dtensor_has_neither_a_loss_scaler_nor_fp8() -> None:
    """Megatron has both, where it is told; DTensor has a key without a default."""
    fp16: dict[str, object] = {"policy.precision": "float16"}
    fp16 |= {f"{OPTIMIZER}.bf16": False, f"{OPTIMIZER}.fp16": True}
    dtensor = {f"{MEGATRON}.enabled": False, "policy.dtensor_cfg.enabled": True}

    assert not judged(changed(fp16))
    assert judged(changed(fp16 | dtensor)) == {("warning", "policy.precision")}
    fp8 = changed({**dtensor, f"{FP8}.enabled": True, CORRECTION: True})
    assert judged(fp8) == {("error", f"{FP8}.enabled")}
    without = changed({**dtensor, "policy.max_grad_norm": MISSING})
    assert judged(without) == {("error", "policy.max_grad_norm")}


def test_the_head_is_in_float32_on_both_sides_or_on_neither() -> None:
    """Whichever key says so; what is said of a trainer that is off does not count."""
    megatron = {f"{MEGATRON}.fp32_lm_head": True}
    engines: list[dict[str, object]] = [
        {f"{VLLM}.fp32_lm_head": True},
        {f"{VLLM}.env_vars.NRL_VLLM_FP32_LM_HEAD": "1"},
    ]
    off = {f"{MEGATRON}.enabled": False, "policy.dtensor_cfg.enabled": True}
    dtensor = {"policy.dtensor_cfg.moe_parallelizer.lm_head_precision": "float32"}
    one_side = {("warning", f"{VLLM}.fp32_lm_head")}

    for engine in engines:
        assert judged(changed(engine)) == one_side
        assert not judged(changed({**engine, **megatron}))
        assert not judged(changed({**engine, **off, **dtensor}))
    assert judged(changed({**off, **dtensor})) == one_side
    assert not judged(changed({**off, **megatron}))
    assert not judged(changed(dtensor))


def test_other_keys_are_not_judged_but_other_sections_are_named() -> None:
    """A key that is not about precision may be yours; nothing is passed in silence."""
    cfg = changed({
        "policy.my_flag": 1,
        f"{VLLM}.enable_prefix_caching": True,
        "policy.hf_config_overrides.torch_dtype": "bf16",
        "env.math.num_workers": 8,
    })
    found = check_policy_config(cfg)

    assert not judged(cfg)
    assert "policy.hf_config_overrides" in found[-1].problem
    assert found[-1].problem.endswith("env")


def test_a_disabled_trainer_is_not_judged() -> None:
    """What nothing reads because it is off is named as not checked."""
    cfg = changed({
        f"{MEGATRON}.enabled": False,
        f"{OPTIMIZER}.fp16": "maybe",
        "policy.dtensor_cfg.enabled": True,
    })

    assert not judged(cfg)
    assert f" {MEGATRON}," in check_policy_config(cfg)[-1].problem


def test_an_overlay_may_leave_keys_to_its_defaults() -> None:
    """Where another file is brought in, a missing key is no finding."""
    cfg: dict[str, Any] = {"policy": {"dtensor_cfg": {"enabled": True}}}
    assert judged(cfg) == {
        ("error", "policy.precision"),
        ("error", "policy.max_grad_norm"),
    }
    assert not judged({"defaults": "base.yaml", **cfg})


def test_the_policy_section_alone_is_enough() -> None:
    """Paths are from the root all the same, and an absent loss is not blamed."""
    policy = changed({f"{VLLM}.precision": "fp8"})["policy"]

    assert judged(policy) == {("warning", CORRECTION)}
    assert judged({"precision": "bf16"}) == {("error", "policy.precision")}


@pytest.mark.parametrize("algorithm", ["sft", "dpo", "rm", "distillation"])
def test_algorithms_without_this_loss_are_not_asked_for_it(algorithm: str) -> None:
    """Only GRPO and PPO have the correction."""
    cfg = changed({f"{VLLM}.precision": "fp8", algorithm: {"max_num_steps": 1}})

    assert not judged(cfg)


# References and kinds of mapping


def test_references_are_followed() -> None:
    """Absolute, relative and chained ones, in values and in whole sections."""
    cfg = changed({
        "policy.precision": "${teacher.precision}",
        "teacher": {"precision": "bf16"},
        f"{VLLM}.precision": "${...precision}",
        f"{MEGATRON}.pipeline_dtype": "${..precision}",
    })
    found = {f.path: f.value for f in check_policy_config(cfg) if f.level == "error"}

    assert found["policy.precision"] == "bf16"
    assert found[f"{VLLM}.precision"] == "bf16"
    assert found[f"{MEGATRON}.pipeline_dtype"] == "bf16"


@pytest.mark.parametrize(
    "text", ["${policy.nowhere}", "${mul:2,3}", "${policy.precision}", "x${a}"]
)
def test_a_reference_that_leads_nowhere_is_a_note(text: str) -> None:
    """Neither a circle nor a resolver of NeMo RL's is a wrong value."""
    cfg = {"precision": text}
    [finding] = check_policy_config(cfg)

    assert (finding.level, finding.path) == ("note", "policy.precision")
    assert finding.value == text


def test_omegaconf_nodes_are_read_like_dictionaries() -> None:
    """The same findings, also of a part of a configuration, and with resolvers."""
    cfg = changed({f"{OPTIMIZER}.fp16": True})
    node = OmegaConf.create(cfg)

    assert check_policy_config(node) == check_policy_config(cfg)
    assert judged(node.policy) == judged(cfg["policy"])
    cfg["policy"]["train_mb_tokens"] = "${mul:512,4}"  # a resolver of NeMo RL's
    assert judged(OmegaConf.create(cfg)) == judged(cfg)


def test_any_mapping_is_read_and_none_is_changed() -> None:
    """Read-only mappings are fine, and a dictionary is as it was."""
    cfg = changed({"policy.gradient_clipping": True, f"{VLLM}.precision": "fp8"})
    before = copy.deepcopy(cfg)
    frozen = MappingProxyType({**cfg, "policy": MappingProxyType(cfg["policy"])})

    assert check_policy_config(frozen) == check_policy_config(cfg)
    assert cfg == before


def test_nonsense_is_reported_and_never_crashes() -> None:
    """Whatever stands in the place of a value, every finding is one line of text."""
    junk = [None, True, 0, -1.5, float("inf"), "", "${", "${.}", [], [1], {}, {1: 2}]
    chance = random.Random(0)
    paths = [path for path, _ in leaves(sound())]
    for _ in range(500):
        changes = {chance.choice(paths): chance.choice(junk) for _ in range(3)}
        try:
            cfg = changed(changes)
        except (
            AttributeError,
            TypeError,
        ):  # the place of a section was taken by a value
            continue
        for finding in check_policy_config(cfg):
            assert "\n" not in str(finding)


def leaves(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Every path of a configuration, sections included."""
    found: list[tuple[str, Any]] = []
    for key, value in section.items():
        found.append((f"{prefix}{key}", value))
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
    return found


# Oracle


def test_precision_is_named_as_in_the_registry() -> None:
    """The names of policy.precision are those of snippets/precision_names.py."""
    names = [row.name for row in NAMES if row.framework == "nemo-rl"]
    assert names
    for name in names:
        assert not judged({"precision": name})


# Why it works: the formulas of the page


def policies(dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a trainer, and of an engine that rounds its logits."""
    logits = 4 * torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
    engine = logits.to(dtype)
    return log_softmax(logits.double(), -1), log_softmax(engine.double(), -1)


DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_correction_leaves_no_bias(dtype: torch.dtype) -> None:
    """The weighted mean under the engine is the mean under the trainer."""
    trainer, engine = policies(dtype, 0)
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).double()
    weight = (trainer - engine).exp()
    wanted = (trainer.exp() * values).sum(1)
    corrected = (engine.exp() * weight * values).sum(1)
    plain = (engine.exp() * values).sum(1)

    # 64 products and sums, each off by at most eps of what is added.
    bound = 130 * 2**-52 * (trainer.exp() * values.abs()).sum(1)
    assert ((corrected - wanted).abs() <= bound).all()
    assert ((plain - wanted).abs() > bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bias_is_bounded_by_the_distance_of_the_policies(
    dtype: torch.dtype,
) -> None:
    """Uncorrected, it is at most max|f| times the sum of |mu - pi|."""
    trainer, engine = policies(dtype, 0)
    values = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).double()
    distance = (trainer.exp() - engine.exp()).abs().sum(1)
    bias = ((engine.exp() - trainer.exp()) * values).sum(1).abs()

    assert (bias <= values.abs().amax(1) * distance).all()


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 7), (torch.float16, 10)])
def test_a_rounded_logit_moves_a_log_probability_by_at_most_twice_its_error(
    dtype: torch.dtype, bits: int
) -> None:
    """And its own error is at most 2**-(mantissa_bits + 1) of the logit."""
    logits = 4 * torch.randn(16, 64, generator=torch.Generator().manual_seed(3))
    error = (logits.to(dtype).float() - logits).abs()
    trainer, engine = policies(dtype, 3)

    assert (error <= 2.0 ** -(bits + 1) * logits.abs()).all()
    worst = error.amax(1, keepdim=True).double()
    assert ((trainer - engine).abs() <= 2 * worst * (1 + 2**-40)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_the_bias_of_samples_is_above_their_noise_and_the_correction_removes_it(
    dtype: torch.dtype,
) -> None:
    """Five standard errors part the two: a chance of one in a million a test."""
    trainer, engine = policies(dtype, 0)
    probs, weight = engine.exp(), (trainer - engine).exp()
    values = (probs - trainer.exp()).sign()  # the worst direction there is
    wanted = (trainer.exp() * values).sum(1).mean()
    drawn = probs.multinomial(100_000, True, generator=torch.Generator().manual_seed(4))

    def errors(table: Tensor) -> float:
        sample = table.gather(1, drawn)
        spread = (sample.var(1) / sample.shape[1]).sum().sqrt() / len(sample)
        return float((sample.mean() - wanted).abs() / spread)

    assert errors(values) > 5
    assert errors(weight * values) < 5


def train(dtype: torch.dtype, seed: int) -> list[float]:
    """REINFORCE with rollouts in a dtype; token_mult_prob_error - 1 at each step."""
    generator = torch.Generator().manual_seed(seed)
    head = (torch.randn(32, 16, generator=generator) * 0.1).requires_grad_()
    inputs = torch.randn(16, 16, generator=generator)
    reward = torch.rand(16, 32, generator=generator).round()
    optimizer = torch.optim.Adam([head], lr=0.05)
    history = []
    for _ in range(60):
        trainer = log_softmax(inputs @ head.T, -1)
        engine = log_softmax((inputs @ head.detach().T).to(dtype).float(), -1)
        gap = (trainer.detach() - engine).abs()
        history.append(float((engine.exp() * gap.exp()).sum(1).mean()) - 1)
        answers = engine.exp().multinomial(8, True, generator=generator)
        score = reward.gather(1, answers)
        loss = -((score - score.mean()) * trainer.gather(1, answers)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    return history


@pytest.mark.parametrize("seed", range(3))
def test_the_mismatch_grows_as_the_policy_sharpens(seed: int) -> None:
    """With reduced rollouts it more than doubles; with float32 there is none."""
    for dtype in (torch.float16, torch.bfloat16):
        history = train(dtype, seed)
        assert max(history) > 2 * history[0] > 0
    assert max(train(torch.float32, seed)) < 2**-20


# Errors


@pytest.mark.parametrize("cfg", [None, "policy.yaml", [("precision", "bf16")], 3])
def test_only_a_mapping_is_a_configuration(cfg: object) -> None:
    """Anything else is refused by name of its type."""
    with pytest.raises(TypeError, match=f"must be a mapping, got {type(cfg).__name__}"):
        check_policy_config(cfg)


def test_strict_lists_every_error_and_lets_warnings_pass() -> None:
    """All of them in one message, so that one run mends one file."""
    with pytest.raises(ValueError, match=r"2 error\(s\)") as caught:
        check_policy_config({"precision": "bf16", "loss_scale": 8}, strict=True)
    assert "policy.precision='bf16'" in str(caught.value)
    assert "policy.loss_scale=8" in str(caught.value)
    warned = check_policy_config(changed({f"{VLLM}.use_deep_gemm": True}), strict=True)
    assert warned[0].level == "warning"


def test_a_finding_is_one_line_and_errors_come_first() -> None:
    """As a log wants them."""
    cfg = changed({f"{VLLM}.use_deep_gemm": True, "policy.precision": "bf16"})
    levels = [finding.level for finding in check_policy_config(cfg)]

    assert levels == sorted(levels, key=["error", "warning", "note"].index)
    line = str(Finding("note", "policy.x", MISSING, "is so", "know it"))
    assert line == "note: policy.x=missing: is so; know it"
