"""Wrong arguments of both environments are refused in one line that names the argument.

Unusual values of a clear meaning are accepted. No call shows a library's own message, or hangs.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from avatarl_env.errors import check_choice
from avatarl_env.patient import Patient
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import (
    SIZES,
    plain,
    tiny_corpus,
    tiny_env,
    tiny_patient,
    tiny_vector_env,
)

ENV_ID = "avatarl_env:AttentionSurgery-v0"
NOT_FINITE = (math.nan, math.inf, -math.inf, np.float32("nan"))
NO_NUMBERS = ("0.5", "", b"1", [1], (0.5,), {"a": 1}, 1j, Decimal("0.5"), np.array([1, 2]), int)
NO_INTEGERS = (*NOT_FINITE, *NO_NUMBERS, True, np.True_, 2.0, 1.5, Fraction(3, 2), -1, -(10**30))
NO_NAMES = (1, 0.5, True, "", "nonsense", ["train"], {"a": 1}, b"cpu", math.nan, object())
# For both classes: values that a keyword cannot have.
WRONG: dict[str, tuple[Any, ...]] = {
    **{name: (*NO_INTEGERS, None, 0) for name in ("episode_length", "n_prompts", "n_new")},
    "prompt_length": (*NO_INTEGERS, None, 0, 1),
    "step_size": (*NOT_FINITE, *NO_NUMBERS, None, True, -1, 10**400, -0.1, 1e7, 0.2),
    "max_coefficient": (*NOT_FINITE, *NO_NUMBERS, None, True, 0, -0.5, 1.5),
    "flatline_penalty": (*NOT_FINITE, *NO_NUMBERS, None, False, -1, 1e308),
    "injury": (
        *(*NOT_FINITE, "0.5", b"", {}, {0.5}, 1j, None, True, 2, -0.5, 1.01),
        *([True], [2.0], [[0.1]], [], ["0.5"], [0.5, math.nan], [0.5] * 3, [0, 0, 0, 2], [1j]),
        *(np.full((2, 1), 0.5), np.array(-0.5)),
    ),
    "split": (*NO_NAMES, None, "trian"),
    "operator": (*NO_NAMES, None, "head_gian"),
    "operator_options": (1, "tied", ["tied"], [], {1: 2}, {"tide": True}, {"targets": 1}),
    "layers": (
        *(1.5, [1.5], [None], [True], [], {}, {"0": 1}, [7], [-3], "no.such", [0, "h.*"], [[0]]),
        *([0] * 10_000 + ["nonsense"], range(10**30), np.zeros((1, 1), int), np.array(1.5), 10**30),
        itertools,
    ),
    "score": (
        *(1, "kl_ref", ["kl_ref"], {}, {1: 1.0}, {"kl_reff": 1}, {"kl_ref": "1"}, {"kl_ref": None}),
        *({"kl_ref": True}, {"kl_ref": 1e300}, {"distinct": math.inf}),
    ),
    "render_mode": (1, True, "human", "ANSI", ["ansi"], {}, math.nan),
    "num_envs": (*NO_INTEGERS, None, 0),
    "max_episode_steps": (*NO_INTEGERS, 0),
    "autoreset_mode": (1, None, True, "SAME_STEP", ["SameStep"], {}, math.nan, "next"),
    "lm": (1, None, True, 0.5, "", " ", ["bundled"], {}, "no/such/folder", "\0", object()),
    "corpus": (1, True, "", ["playwright"], {}, "no/such/file.txt", "a\0b", 0.5),
    "device": (1, "", "cpuu", True, ["cpu"], None, "cuda:99", {}),
    "dtype": (1, None, "float31", "int8", True, torch.float32, ["float32"], {}),
}
STORED_ONLY = {"lm", "corpus", "device", "dtype"}


def refuses(make: Callable[..., Any], match: str, **keywords: Any) -> None:
    """Check that the call is refused quickly, in one line."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=match) as caught:
        make(**keywords)
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert " must " in str(caught.value) or "got" in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_value_is_refused_by_name(name: str, folder: str) -> None:
    """The vector environment takes all keywords; both pass them to the same checks."""
    lm = folder if name in STORED_ONLY else tiny_patient()
    for value in WRONG[name]:
        keywords = {"num_envs": 2, "lm": lm, **SIZES, name: value}
        refuses(AttentionSurgeryVectorEnv, rf"\b{name}", **keywords)


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"operator": "head_gian"}, r"operator must be .*'head_gian', did you mean 'head_gain'\?"),
        ({"score": {"kl_reff": 1}}, r"score must be .*'kl_reff', did you mean 'kl_ref'\?"),
        ({"split": "trian"}, r"split must be .*'trian', did you mean 'train'\?"),
        ({"layers": [2]}, r"layers must match .* got 2 \(0: blocks.0.attn, 1: blocks.1.attn\)"),
        ({"n_new": 57}, r"must fit the model's context of 64, got 8 \+ 57"),
        ({"injury": [0.5] * 3}, r"injury must be one number for each of the 4 .*, got 3"),
        ({"n_promts": 1}, r"unexpected keyword argument 'n_promts', did you mean 'n_prompts'\?"),
        ({"seed": 1}, r"keyword must be one of \[.*'corpus'.* argument 'seed'"),
        ({"corpus": "playwright"}, "corpus, device and dtype are for stored models"),
        ({"device": "cuda"}, "corpus, device and dtype are for stored models"),
        (
            {"operator_options": {"scal": 1}},
            r"operator_options of 'head_gain' must .* 'scal', did you mean 'scale'\?",
        ),
    ],
)
def test_a_refusal_names_the_value_and_the_closest_match(
    keywords: dict[str, Any], match: str
) -> None:
    for make in (tiny_env, tiny_vector_env):
        refuses(make, match, **keywords)


@pytest.mark.parametrize("make", [gymnasium.make, gymnasium.make_vec])
def test_gymnasium_shows_the_same_line(make: Any, folder: str) -> None:
    """As a TypeError too: TorchRL offers every environment a `frameskip`, and catches that."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'frameskip'"):
        make(ENV_ID, lm=folder, frameskip=1)
    with pytest.raises(TypeError, match="render_mode must be None or one of"):  # Stable-Baselines3
        tiny_env(render_mode="depth_array")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_prompts", np.uint8(4)),
        ("step_size", Fraction(1, 2)),
        ("injury", np.float16(0.5)),
        ("injury", torch.tensor([0.5, 0, 0, 0], dtype=torch.bfloat16, requires_grad=True)),
        ("layers", np.array([0, 1])),
        ("score", {"kl_ref": np.float32(1), "heldout_loss": 20}),
        ("operator_options", {"tied": np.True_, "scale": np.float64(0.5)}),
    ],
)
def test_unusual_values_of_a_clear_meaning_are_accepted(name: str, value: Any) -> None:
    for env in (tiny_env(**{name: value}), tiny_vector_env(2, **{name: value})):
        env.reset(seed=0)
        env.step(np.zeros(env.action_space.shape))
        kept = getattr(env.config, name, None)
        assert not isinstance(kept, np.generic)  # goes into JSON


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (tiny_env, {"n_prompts": 10**12}),
        (tiny_vector_env, {"num_envs": 10**12}),
        (tiny_vector_env, {"num_envs": 10**6, "n_prompts": 10**6}),
    ],
)
def test_what_does_not_fit_into_memory_is_refused(
    make: Callable[..., Any], size: dict[str, int]
) -> None:
    rule = rf"{next(iter(size))}.* texts must fit the memory, [\d.]+ GiB, got .* GiB$"
    refuses(make, rule, **size)


# --- reset and step -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_env, tiny_vector_env])
def test_a_wrong_seed_or_option_is_refused(make: Callable[..., Any]) -> None:
    env = make(n_prompts=4)
    for seed in ("one", 1.0, True, -1, {"a": 1}, b"1", object(), math.nan):
        refuses(env.reset, "^seed must be an integer of at least 0, got ", seed=seed)
    for options in ([1], "mask", {1: 2}, {"seed": 1}):
        refuses(env.reset, "^options must ", options=options)
    assert plain(env.reset(seed=np.uint8(3), options={})) == plain(env.reset(seed=3))


WIDTH = 4
MOVE = [0.5, 0.0, -0.5, 0.25]
GOOD_ACTIONS: dict[str, Any] = {
    "tuple": tuple(MOVE),
    "float64": np.array(MOVE),
    "float16": np.array(MOVE, np.float16),
    "requires grad": torch.tensor(MOVE, requires_grad=True),
    "bfloat16": torch.tensor(MOVE, dtype=torch.bfloat16),
    "parameter": nn.Parameter(torch.tensor(MOVE, dtype=torch.float16)),
    "list of scalars": [np.float32(0.5), np.float64(0), -0.5, torch.tensor(0.25)],
    "strided": np.array([0.5, 9, 0.0, 9, -0.5, 9, 0.25, 9])[::2],
}
BAD_ACTIONS: dict[str, Any] = {
    "none": None,
    "text": "sharper",
    "texts": ["0.5"] * WIDTH,
    "long": [0.5] * 5,
    "rows": [[0.5] * WIDTH],
    "ragged": [0.5, [0.5], 0.5, 0.5],
    "nan": [0.5, math.nan, 0, 0],
    "inf": torch.tensor([0.5, math.inf, 0, 0]),
    "bool": [True] * WIDTH,
    "bool tensor": torch.ones(WIDTH, dtype=torch.bool),
    "complex": [1j] * WIDTH,
    "objects": np.array([None] * WIDTH),
    "dict": {"action": [0.5] * WIDTH},
    "generator": (0.5 for _ in range(WIDTH)),
    "meta": torch.zeros(WIDTH, device="meta"),
    "sparse": torch.zeros(WIDTH).to_sparse(),
    "huge integers": [10**400] * WIDTH,
    "dates": np.array(["2020-01-01"] * WIDTH, dtype="datetime64[D]"),
}


def test_actions_may_be_numbers_of_any_kind() -> None:
    env, envs = tiny_env(n_prompts=4), tiny_vector_env(n_prompts=4)
    env.reset(seed=0)
    expected = plain(env.step(MOVE))
    for given in GOOD_ACTIONS.values():
        env.reset(seed=0)
        assert plain(env.step(given)) == expected
        envs.reset(seed=0)
        rows: Any = torch.stack([given] * 3) if torch.is_tensor(given) else [given] * 3
        infos = envs.step(rows)[4]
        assert infos["coefficients"].tolist() == [[0.25, 0.0, -0.25, 0.125]] * 3


def test_other_actions_are_refused_and_change_nothing() -> None:
    env, twin, envs = tiny_env(), tiny_env(), tiny_vector_env()
    for each in (env, twin, envs):
        each.reset(seed=0)
    for action in BAD_ACTIONS.values():
        refuses(env.step, r"^action must be ", action=action)
        refuses(envs.step, r"^actions? must ", actions=[action] * 3)
        refuses(envs.step, r"^actions? must ", actions=action)
    assert plain(env.step(MOVE)) == plain(twin.step(MOVE))


@pytest.mark.parametrize("kind", ["single", "vector"])
def test_a_step_at_the_wrong_time_is_refused_with_the_remedy(kind: str) -> None:
    rules: dict[str, Any] = {"episode_length": 2, "n_prompts": 2}
    make = tiny_env if kind == "single" else tiny_vector_env
    env: Any = make(**rules) if kind == "single" else make(autoreset_mode="Disabled", **rules)
    action = np.zeros(env.action_space.shape)
    with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
        env.step(action)
    env.reset(seed=0)
    env.step(action)
    env.step(action)
    with pytest.raises(RuntimeError, match=r"reset\(\)"):
        env.step(action)
    env.close()
    env.close()
    for again in (env.reset, lambda: env.step(action)):
        with pytest.raises(RuntimeError, match=r"^the environment is closed: make another$"):
            again()


# --- patients and operators -----------------------------------------------------------------------


def with_meta_weight(model: nn.Module) -> nn.Module:
    model.blocks[1].mlp.to("meta")
    return model


def with_integer_weight(model: nn.Module) -> nn.Module:
    attention = model.blocks[0].attn.c_attn
    weight = attention.weight.to(torch.int8)
    attention.weight = nn.Parameter(weight, requires_grad=False)
    return model


def with_offloading_hook(model: nn.Module) -> nn.Module:
    model.blocks[0]._hf_hook = type("AlignDevicesHook", (), {"offload": True})()
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def with_adapter(model: nn.Module) -> nn.Module:
    layer = nn.Linear(32, 32)
    layer.base_layer, layer.merge = nn.Linear(32, 32), lambda: None
    model.blocks[0].attn.c_proj = layer
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(
            lambda m: torch.compile(m, backend="eager"),
            "not be compiled: .*_orig_mod",
            marks=pytest.mark.slow,
        ),
        (compiled_in_place, "not be compiled"),
        (lambda m: torch.jit.script(nn.Linear(2, 2)), "be a plain module, not TorchScript"),
        (lambda m: m.to("meta"), "have its weights in memory .* meta device"),
        (with_meta_weight, "have its weights in memory .* at 'blocks.1.mlp"),
        (with_offloading_hook, "have its weights in memory .* at 'blocks.0'"),
        (with_adapter, "have its adapters merged: .* at 'blocks.0.attn.c_proj'"),
        (with_integer_weight, "have plain floating-point weights.*int8 at 'blocks.0.attn.c_attn'"),
        (
            lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, dtype=torch.qint8),
            "have plain floating-point weights",
        ),
    ],
)
def test_a_model_that_cannot_be_operated_on_is_refused_with_what_to_do(
    spoil: Callable[[nn.Module], nn.Module], message: str
) -> None:
    patient = tiny_patient()
    with pytest.raises(ValueError, match=f"^model must {message}") as caught:
        Patient(spoil(patient.model), patient.tokenizer, tiny_corpus())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("corpus", [1, ["text"], None])
def test_a_corpus_of_another_type_is_refused(corpus: Any) -> None:
    patient = tiny_patient()
    with pytest.raises(ValueError, match=r"^corpus must be one that load_corpus"):
        Patient(patient.model, patient.tokenizer, corpus)


@pytest.mark.parametrize(
    ("operator", "options"),
    [
        ("low_rank_seed", {"n_directions": 10**12}),
        ("low_rank_seed", {"seed": 1.5}),
        ("low_rank_seed", {"projections": 3}),
        ("low_rank_seed", {"projections": [1]}),
        ("low_rank_seed", {"rank": 0}),
        ("spectral_bands", {"n_bands": True}),
        ("spectral_bands", {"n_bands": 1}),
        ("layer_truncation", {"scale": 1.01}),
        ("seed_rank_one", {"projections": ()}),
        ("seed_rank_one", {"projections": ("key", "key")}),
        ("seed_rank_one", {"projections": "quary"}),
        ("spectral_bands", {"scale": math.nan}),
        ("head_gain", {"scale": "1"}),
        ("head_gain", {"tied": "yes"}),
        ("layer_truncation", {"tied": 1}),
        ("output_temperature", {"final_norm": 3}),
    ],
)
def test_a_wrong_option_is_refused_by_the_operator(operator: str, options: dict[str, Any]) -> None:
    (name,) = options
    refuses(tiny_env, rf"\b{name}\b.* must", operator=operator, operator_options=options)


# --- the checks themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "end"),
    [
        ("grafft", "got 'grafft', did you mean 'graft'?"),
        ("TRIM", "got 'TRIM'"),
        (["trim"], "got ['trim'], did you mean 'trim'?"),
    ],
)
def test_a_refused_choice_names_the_known_values_and_the_closest(value: Any, end: str) -> None:
    message = re.escape(f"operation must be one of ['graft', 'trim'], {end}")
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_choice("operation", value, ("trim", "graft"))
