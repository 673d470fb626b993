"""Find what a NeMo RL configuration says about precision and cannot mean.

Copy this file into your project; it needs only Python.

    Guide:   guide/nemo_rl
    Tests:   tests/test_nemo_rl.py
    Sources: NVIDIA 2026, NeMo RL, commit 7ea279ab (2026-08-22): the keys, and what
             reads them. NVIDIA 2026, Megatron-LM, commit d98e8a64: its optimizer's
             settings, and who builds a loss scaler. Qi et al. 2025, arXiv:2510.26788:
             what rollouts in another precision than the training cost.
    Changed: 2026-11-22

SPDX-License-Identifier: Apache-2.0
"""

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias

__all__ = ["MISSING", "Finding", "check_policy_config"]


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING: Any = _Missing()  # the value in a finding about a key that is not there


@dataclass(frozen=True)
class Finding:
    """One thing about a configuration; ``str()`` is one line.

    An ``"error"`` stops the run, is ignored, or does what nobody asks for. A
    ``"warning"`` runs at a price. A ``"note"`` says what is so, or was not checked.
    """

    level: Literal["error", "warning", "note"]
    path: str  # of the key, from the root of the whole configuration
    value: object  # as given, references followed; MISSING if the key is not there
    problem: str
    fix: str

    def __str__(self) -> str:
        return f"{self.level}: {self.path}={self.value!r}: {self.problem}; {self.fix}"


@dataclass(frozen=True)
class _Number:
    least: float
    or_null: bool = False


# The keys about precision by section, with their values: some, a number, or None (any).
# Another key of a section is judged only if it is about precision, or resembles one.
_HALVES = {"bfloat16": "bf16", "float16": "fp16"}
_DTYPES = ("float32", *_HALVES)
_ENGINE_DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
_SWITCH = (True, False)
_TRAIN, _DTENSOR = "policy.megatron_cfg", "policy.dtensor_cfg"
_GEN = "policy.generation"
_OPTIMIZER, _FP8, _VLLM = f"{_TRAIN}.optimizer", f"{_TRAIN}.fp8_cfg", f"{_GEN}.vllm_cfg"
_DDP = f"{_TRAIN}.distributed_data_parallel_config"
_TIS = "truncated_importance_sampling"
_SECTIONS: dict[str, dict[str, tuple[object, ...] | _Number | None]] = {
    "policy": {"precision": _DTYPES, "max_grad_norm": _Number(0, or_null=True)},
    _DTENSOR: {"enabled": _SWITCH},
    f"{_DTENSOR}.moe_parallelizer": {"lm_head_precision": None},
    _TRAIN: {
        "enabled": _SWITCH,
        "pipeline_dtype": _DTYPES,
        "moe_router_dtype": ("fp32", "fp64", None),
        "defer_fp32_logits": (*_SWITCH, None),
        "fp32_lm_head": (*_SWITCH, None),  # from September 2026 on
        "mtp_loss_scaling_factor": None,
    },
    _OPTIMIZER: {
        **dict.fromkeys(("bf16", "fp16", "use_precision_aware_optimizer"), _SWITCH),
        **dict.fromkeys(("main_grads_dtype", "main_params_dtype")),
        **dict.fromkeys(("exp_avg_dtype", "exp_avg_sq_dtype")),
        "params_dtype": _DTYPES,
        "clip_grad": _Number(0),
        "loss_scale": _Number(0, or_null=True),
        "min_loss_scale": _Number(0),
        **dict.fromkeys(("initial_loss_scale", "loss_scale_window"), _Number(1)),
    },
    _DDP: {"grad_reduce_in_fp32": _SWITCH},
    _FP8: {
        **dict.fromkeys(("enabled", "fp8_param", "force_clear_fp8_caches"), _SWITCH),
        "fp8": ("e4m3", "hybrid"),
        "fp8_recipe": ("blockwise", "tensorwise", "mxfp8", "delayed", "custom"),
    },
    _GEN: {},
    _VLLM: {
        **dict.fromkeys(("is_mx", "use_deep_gemm", "fp32_lm_head"), _SWITCH),
        "pow2_weight_scaling_factors": _SWITCH,
        "pow2_activation_scaling_factors": _SWITCH,
        "num_first_layers_in_bf16": _Number(0),
        "num_last_layers_in_bf16": _Number(0),
        "precision": (*_ENGINE_DTYPES, "fp8"),
        "kv_cache_dtype": ("auto", "fp8", "fp8_e4m3"),
    },
    f"{_GEN}.sglang_cfg": {"dtype": _ENGINE_DTYPES, "kv_cache_dtype": None},
    f"{_GEN}.trtllm_cfg": {"precision": _ENGINE_DTYPES},
    "loss_fn": {
        "use_importance_sampling_correction": _SWITCH,
        f"{_TIS}_type": ("tis", "icepop", "seq-mask-tis", None),
        f"{_TIS}_ratio": _Number(0, or_null=True),
        f"{_TIS}_ratio_min": _Number(0, or_null=True),
        **dict.fromkeys(("dynamic_loss_scaling", "ce_loss_scale")),  # of distillation
    },
}
_NEEDS_FP8 = (
    *("is_mx", "use_deep_gemm", "num_first_layers_in_bf16", "num_last_layers_in_bf16"),
    *("pow2_weight_scaling_factors", "pow2_activation_scaling_factors"),
)

# Names from elsewhere, and where the thing is here.
_CLIP = f"it is policy.max_grad_norm (on Megatron {_OPTIMIZER}.clip_grad)"
_SCALE = (
    f"on Megatron it is {_OPTIMIZER}.loss_scale; on DTensor nothing scales the loss"
)
_TO_FP8 = f"it is {_FP8} for the training, {_VLLM}.precision for the rollouts"
_LAYERS = f"put it into {_TRAIN}.model_overrides"
_ELSEWHERE = {
    **dict.fromkeys(("gradient_clipping", "gradient_clip_val", "grad_clip"), _CLIP),
    **dict.fromkeys(("loss_scale", "loss_scaling", "grad_scaler", "scaler"), _SCALE),
    **dict.fromkeys(
        ("torch_dtype", "mixed_precision", "amp"), "it is policy.precision"
    ),
    **dict.fromkeys(("first_last_layers_bf16", "num_layers_at_start_in_bf16"), _LAYERS),
    "num_layers_at_end_in_bf16": _LAYERS,
    "fp8": _TO_FP8,
}
_ABOUT = re.compile("precision|dtype|fp8|fp16|bf16|fp32|autocast|loss_scal")
_SPELLINGS = {
    **dict.fromkeys(("bf16", "bfloat"), "bfloat16"),
    **dict.fromkeys(("fp16", "16", "half"), "float16"),
    **dict.fromkeys(("fp32", "32", "float"), "float32"),
}
_Level: TypeAlias = Literal["error", "warning", "note"]
_Say: TypeAlias = Callable[[_Level, str, str, str], None]
_REFERENCE = re.compile(r"\$\{(\.*)([\w.]+)\}")


def check_policy_config(cfg: object, *, strict: bool = False) -> list[Finding]:
    """Report the keys and values about precision that a NeMo RL run would trip over.

    Reads ``policy`` and ``loss_fn``. A key that NeMo RL does not read is an error if it
    is about precision, or resembles one that is. Other keys are not judged, and a last
    note lists the sections that were not looked into. ``cfg`` is not modified.

    Args:
        cfg: The whole configuration or its ``policy`` section; any mapping or OmegaConf
            node. References, ``${a.b}`` and ``${.b}``, are followed.
        strict: Raise if there is an error.

    Returns:
        Errors first, then warnings, then notes.

    Raises:
        TypeError: ``cfg`` is not a mapping.
        ValueError: ``strict``, and there are errors; the message lists them.

    Example:
        >>> cfg = {"precision": "bf16", "gradient_clipping": True}
        >>> for finding in check_policy_config(cfg):
        ...     print(finding.path, "->", finding.fix)
        policy.gradient_clipping -> it is policy.max_grad_norm (on Megatron ...)
        policy.precision -> write 'bfloat16'
    """
    plain = _plain(cfg)
    if not isinstance(plain, dict):
        msg = f"cfg must be a mapping, got {type(cfg).__name__}"
        raise TypeError(msg)
    config = _Config(plain)
    found = [*_unknown(config), *_values(config)]
    said = {finding.path for finding in found}
    found += [finding for finding in _conflicts(config) if finding.path not in said]
    if skipped := config.skipped():
        problem = "not checked: " + ", ".join(skipped)
        found.append(Finding("note", "policy", MISSING, problem, "read them yourself"))
    found.sort(key=lambda finding: ("error", "warning", "note").index(finding.level))
    errors = [str(finding) for finding in found if finding.level == "error"]
    if strict and errors:
        msg = f"cfg has {len(errors)} error(s):\n" + "\n".join(errors)
        raise ValueError(msg)
    return found


class _Config:
    """Nested dictionaries, read by path."""

    def __init__(self, plain: dict[Any, Any]) -> None:
        self.whole = "policy" in plain
        self.root = plain if self.whole else {"policy": plain}
        self.inherits = "defaults" in self.root  # so that a key may be elsewhere
        off = [s for s in (_TRAIN, _DTENSOR) if self.get(f"{s}.enabled") is False]
        self.sections = [s for s in _SECTIONS if not s.startswith(tuple(off))]

    def get(self, path: str) -> Any:  # noqa: ANN401 - any value
        """Return a value, or MISSING; of a reference that leads nowhere, its text."""
        return self.follow(path)[1]

    def follow(self, path: str, depth: int = 0) -> tuple[str, Any]:
        """Return a value, and the path where it is written."""
        value: Any = self.root
        at: list[str] = []
        for part in path.split("."):
            if not isinstance(value, dict) or part not in value:
                return path, MISSING
            value = value[part]
            at.append(part)
            if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
                above = at[: -len(match[1])] if match[1] else []
                target, found = ".".join([*above, match[2]]), MISSING
                if depth < 16:  # else it is a circle
                    target, found = self.follow(target, depth + 1)
                if found is not MISSING:
                    at, value = target.split("."), found
        return ".".join(at), value

    def items(self, section: str) -> list[tuple[str, Any]]:
        """Return the keys of a section with their values; none if it is no mapping."""
        keys = self.get(section)
        keys = keys if isinstance(keys, dict) else ()
        return [(str(key), self.get(f"{section}.{key}")) for key in keys]

    def skipped(self) -> list[str]:
        """Return the sections that no rule is about, or that are disabled."""
        found = [(f"{s}.{key}", v) for s in self.sections for key, v in self.items(s)]
        found += [(str(key), value) for key, value in self.root.items()]
        known = {"policy", *self.sections}
        return [
            path
            for path, value in found
            if isinstance(value, dict) and value not in ({}, {"enabled": False})
            if path not in known
        ]


def _unknown(config: _Config) -> Iterator[Finding]:
    """Yield the keys about precision, or nearly so, that nothing reads."""
    owner = {key: section for section, rules in _SECTIONS.items() for key in rules}
    for section in config.sections:
        rules = _SECTIONS[section]
        for key, value in config.items(section):
            path = f"{section}.{key}"
            if key in rules or path in _SECTIONS:
                continue
            if near := get_close_matches(key, rules, n=1, cutoff=0.85):
                fix = f"did you mean {near[0]}?"
            elif key in _ELSEWHERE:
                fix = _ELSEWHERE[key]
            elif key in owner:
                fix = f"it is {owner[key]}.{key}"
            elif _ABOUT.search(key):
                fix = f"the keys about precision here are {', '.join(rules) or 'none'}"
            else:
                continue
            yield Finding("error", path, value, "NeMo RL reads no such key", fix)


def _values(config: _Config) -> Iterator[Finding]:
    """Yield the values that a known key cannot have."""
    for section in config.sections:
        rules = _SECTIONS[section]
        if not isinstance(found := config.get(section), dict | _Missing | None):
            yield Finding("error", section, found, "is no mapping", "indent its keys")
        for key, rule in rules.items():
            path = f"{section}.{key}"
            source, value = config.follow(path)
            if source != path and source.rpartition(".")[0] in config.sections:
                continue  # said once, of the key that is referred to
            if isinstance(value, str) and "${" in value:
                fix = "check the configuration with its references resolved"
                yield Finding("note", path, value, "the reference is not followed", fix)
            elif value is not MISSING and (fix := _fix(value, rule)):
                yield Finding("error", path, value, "is not among its values", fix)
    if config.get("policy.precision") is MISSING and not config.inherits:
        fix = f"write one of {', '.join(_DTYPES)}"
        yield Finding("error", "policy.precision", MISSING, "there is no default", fix)


def _fix(value: object, rule: tuple[object, ...] | _Number | None) -> str:
    """Return what to write instead; nothing if the value is allowed."""
    if isinstance(rule, _Number):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and value >= rule.least:  # type: ignore[arg-type,operator]
            return ""
        null = " or null" if rule.or_null else ""
        allowed = value is None and rule.or_null
        return "" if allowed else f"write a finite number from {rule.least}{null}"
    if rule is None or any(type(value) is type(r) and value == r for r in rule):
        return ""
    if rule[:2] == _SWITCH:
        return "write true or false, without quotes"
    text = re.sub(r"^torch\.|[-_](true|mixed)$", "", str(value).lower())
    words = [word for word in rule if isinstance(word, str)]
    if near := get_close_matches(_SPELLINGS.get(text, text), words, n=1, cutoff=0.75):
        return f"write {near[0]!r}"
    return _TO_FP8 if text == "fp8" else f"write one of {', '.join(words)}"


def _conflicts(config: _Config) -> list[Finding]:
    """Return the keys that contradict each other, or have a price."""
    found: list[Finding] = []

    def say(level: _Level, path: str, problem: str, fix: str) -> None:
        found.append(Finding(level, path, config.get(path), problem, fix))

    _check_training(config, say)
    if not {"sft", "dpo", "rm", "distillation"} & config.root.keys():
        _check_rollouts(config, say)
    return found


def _check_training(config: _Config, say: _Say) -> None:
    """Follow NeMo RL's ``megatron/setup.py``, Megatron-LM, and the DTensor workers."""
    get, precision = config.get, config.get("policy.precision")
    fp8, norm = get(f"{_FP8}.enabled"), get("policy.max_grad_norm")
    if get(f"{_DTENSOR}.enabled") is True:
        if get(f"{_TRAIN}.enabled") is True:
            say("error", f"{_TRAIN}.enabled", "so is dtensor_cfg", "disable one")
        if precision == "float16":
            text = "nothing scales the loss on DTensor: small gradients underflow"
            say("warning", "policy.precision", text, "use bfloat16, or Megatron")
        if fp8 is True:
            say("error", f"{_FP8}.enabled", "DTensor does not read it", "use Megatron")
        if norm is MISSING and not config.inherits:
            text = "DTensor reads it, and it has no default"
            say("error", "policy.max_grad_norm", text, "write a number or null")
    if get(f"{_TRAIN}.enabled") is not True:
        return
    against = f"contradicts policy.precision={precision!r}"
    for half, key in _HALVES.items():
        path = f"{_OPTIMIZER}.{key}"
        aware = get(f"{_OPTIMIZER}.use_precision_aware_optimizer") is True
        on, known = get(path) is True, get(path) is not MISSING or not config.inherits
        if on and precision in _DTYPES and precision != half:
            say("error", path, against, "write false")
        elif precision == half and known and not on and half == "float16":
            say("error", path, "without it Megatron scales no loss", "write true")
        elif precision == half and known and not on and aware:
            text = f"{against}, as the precision-aware optimizer asserts"
            say("error", path, text, "write true")
    pipeline = get(f"{_TRAIN}.pipeline_dtype")
    if pipeline not in (MISSING, precision) and precision in _DTYPES:
        say("error", f"{_TRAIN}.pipeline_dtype", against, "write ${policy.precision}")
    if get(f"{_OPTIMIZER}.params_dtype") not in (MISSING, precision):
        text = "nothing reads it: the weights take policy.precision"
        say("note", f"{_OPTIMIZER}.params_dtype", text, "leave it")
    if get(f"{_OPTIMIZER}.loss_scale") not in (MISSING, None, 0):
        text = "is a constant: nothing lowers it after an overflow"
        say("warning", f"{_OPTIMIZER}.loss_scale", text, "remove it")
    for key in ("initial_loss_scale", "min_loss_scale", "loss_scale_window"):
        path = f"{_OPTIMIZER}.{key}"
        if get(path) is not MISSING and get(f"{_OPTIMIZER}.fp16") is not True:
            say("warning", path, "is read only with fp16", "remove it")
    clip = get(f"{_OPTIMIZER}.clip_grad")
    if MISSING not in (norm, clip) and clip != (0 if norm is None else norm):
        does = f"clips at clip_grad={clip!r}" if clip else "clips nothing: clip_grad=0"
        text = f"Megatron does not read it and {does}"
        say("warning", "policy.max_grad_norm", text, "write clip_grad")
    if get(path := f"{_DDP}.grad_reduce_in_fp32") is False and precision in _DTYPES[1:]:
        say("note", path, f"ranks sum gradients in {precision}", "true takes memory")
    given = [key for key, _ in config.items(_FP8)]
    if given and "enabled" not in given and not config.inherits:
        text = "the default is false, so that the other keys do nothing"
        say("error", f"{_FP8}.enabled", text, "write true or false")
    for key in ("fp8", "fp8_recipe", "fp8_param"):
        if fp8 is True and key not in given and not config.inherits:
            say("error", f"{_FP8}.{key}", "it has no default", "add it")
    if fp8 is True and get(f"{_FP8}.fp8_param") is True:
        text = "with weights in FP8 token_mult_prob_error can be NaN (issue 1164)"
        say("warning", f"{_FP8}.fp8_param", text, "start with false")


def _check_rollouts(config: _Config, say: _Say) -> None:
    """Compare the engine's precision with the trainer's."""
    get, precision = config.get, config.get("policy.precision")
    engines = {"sglang": f"{_GEN}.sglang_cfg.dtype", "vllm": f"{_VLLM}.precision"}
    engines["trtllm"] = f"{_GEN}.trtllm_cfg.precision"
    backend = get(f"{_GEN}.backend")
    if backend == "megatron":
        return  # it generates with the trainer's own weights
    path = engines.get(str(backend), engines["vllm"])
    rollout = get(path)
    rollout = {"half": "float16", "float": "float32"}.get(str(rollout), rollout)
    corrected = get(correction := "loss_fn.use_importance_sampling_correction") is True
    where = "write true" if config.whole else "write true; loss_fn was not given"
    if backend == "dynamo" and rollout not in (MISSING, "bfloat16"):
        say("error", path, "dynamo generates in bfloat16 only", "write 'bfloat16'")
    elif rollout == "fp8" and not corrected and precision != "fp8":
        text = "NeMo RL refuses FP8 rollouts without it"
        say("error" if config.whole else "warning", correction, text, where)
    elif rollout in _DTYPES and not corrected:
        trained = "fp8" if get(f"{_FP8}.enabled") is True else precision
        if rollout != trained and precision in _DTYPES:
            text = f"rollouts are in {rollout}, the training is in {trained}"
            say("warning", correction, text, where)
    if path == engines["vllm"]:
        _check_vllm(config, say, rollout)


def _check_vllm(config: _Config, say: _Say, rollout: object) -> None:
    """Follow NeMo RL's ``models/generation/vllm``; other engines read none of it."""
    get = config.get
    if get(f"{_GEN}.vllm_kwargs.dtype") is not MISSING:
        text = "vLLM is given its dtype twice, a TypeError"
        say("error", f"{_GEN}.vllm_kwargs.dtype", text, f"it is {_VLLM}.precision")
    cache = str(get(f"{_VLLM}.kv_cache_dtype"))
    if cache.startswith("fp8") and (
        rollout != "fp8" or get(f"{_DTENSOR}.enabled") is True
    ):
        text = "needs vllm_cfg.precision=fp8, and Megatron"
        say("error", f"{_VLLM}.kv_cache_dtype", text, "write auto")
    for key in _NEEDS_FP8:
        if get(f"{_VLLM}.{key}") not in (MISSING, False) and rollout != "fp8":
            text = "without vllm_cfg.precision=fp8 nothing reads it"
            say("warning", f"{_VLLM}.{key}", text, "remove it")
    for key in ("pow2_weight_scaling_factors", "pow2_activation_scaling_factors"):
        mx = rollout == "fp8" and get(f"{_VLLM}.is_mx") is True
        if mx and get(f"{_VLLM}.{key}") is False:
            text = "MXFP8 (is_mx) has scales of powers of two only"
            say("error", f"{_VLLM}.{key}", text, "write true")
    head = get(f"{_DTENSOR}.moe_parallelizer.lm_head_precision")
    trainer = _DTENSOR in config.sections and "32" in str(head)
    trainer |= _TRAIN in config.sections and get(f"{_TRAIN}.fp32_lm_head") is True
    engine = get(f"{_VLLM}.fp32_lm_head") is True
    engine |= get(f"{_VLLM}.env_vars.NRL_VLLM_FP32_LM_HEAD") == "1"
    if trainer != engine and rollout is not MISSING:
        text = "the head is in float32 on one side, and rounds on the other"
        say("warning", f"{_VLLM}.fp32_lm_head", text, "float32 on both or on neither")


def _plain(value: Any) -> Any:  # noqa: ANN401 - any value
    """Return dictionaries for mappings and OmegaConf nodes."""
    omegaconf = sys.modules.get("omegaconf")  # imported by whoever made a node
    if omegaconf is not None and omegaconf.OmegaConf.is_config(value):
        return omegaconf.OmegaConf.to_container(value, resolve=False)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value
