"""What users can give the environments by mistake: refused in one line that names the argument.

Or taken, where what is meant is plain. Nothing raises a raw message of a library's, or hangs.
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

from avatarl_env.env import AttentionSurgeryEnv
from avatarl_env.patient import Patient
from avatarl_env.surgery import OPERATORS
from avatarl_env.vector_env import AttentionSurgeryVectorEnv
from tests.patients import (
    SIZES,
    store_tiny_patient,
    tiny_corpus,
    tiny_env,
    tiny_patient,
    tiny_vector_env,
)

ENV_ID = "avatarl_env:AttentionSurgery-v0"
NOT_FINITE = (math.nan, math.inf, -math.inf, np.float32("nan"))
NO_NUMBERS = (
    "0.5",
    "",
    b"1",
    [1],
    (0.5,),
    {"a": 1},
    {1},
    1j,
    Decimal("0.5"),
    np.array([1, 2]),
    int,
)
NO_INTEGERS = (*NOT_FINITE, *NO_NUMBERS, True, np.True_, 2.0, 1.5, Fraction(3, 2), -1, -(10**30))
NO_NAMES = (1, 0.5, True, "", "nonsense", ["train"], {"a": 1}, b"cpu", math.nan, object())

WRONG: dict[str, tuple[Any, ...]] = {
    **{name: (*NO_INTEGERS, None, 0) for name in ("episode_length", "n_prompts", "n_new")},
    "prompt_length": (*NO_INTEGERS, None, 0, 1),
    "step_size": (*NOT_FINITE, *NO_NUMBERS, None, True, -1, 10**400, -0.1, 1e7),
    "flatline_penalty": (*NOT_FINITE, *NO_NUMBERS, None, False, -1, 1e308),
    "injury": (
        *NOT_FINITE,
        "0.5",
        b"",
        {},
        {0.5},
        1j,
        None,
        True,
        2,
        -0.5,
        [True],
        [2.0],
        [[0.1]],
        [],
    ),
    "split": (*NO_NAMES, None, "trian"),
    "operator": (*NO_NAMES, None, "head_gian"),
    "operator_options": (
        1,
        "tied",
        ["tied"],
        {1: 2},
        {"tied": "yes"},
        {"scale": "1"},
        {"tide": True},
    ),
    "layers": (
        1.5,
        [1.5],
        [None],
        [True],
        [],
        {},
        {"0": 1},
        [7],
        "no.such",
        [[0]],
        [0] * 10_000 + ["nonsense"],
        range(10**30),
        np.zeros((1, 1), dtype=int),
        np.array(1.5),
        10**30,
        itertools,
    ),
    "score": (
        1,
        "kl_ref",
        ["kl_ref"],
        {},
        {1: 1.0},
        {"kl_reff": 1},
        {"kl_ref": "1"},
        {"kl_ref": None},
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
"""By keyword, what it cannot be."""

GYMNASIUMS_OWN = {"num_envs", "max_episode_steps", "render_mode"}
"""Looked at by `gymnasium.make` or `make_vec` first."""
VECTOR_ONLY = {"num_envs", "max_episode_steps", "autoreset_mode"}
STORED_ONLY = {"lm", "corpus", "device", "dtype"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return store_tiny_patient(tmp_path_factory.mktemp("model"))


def refuses(make: Callable[..., Any], name: str, value: Any, **keywords: Any) -> None:
    """Check that a keyword is refused at once, in one line that names it."""
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"\b{name}") as caught:
        make(**{**keywords, name: value})
    assert time.monotonic() - start < 10
    assert "\n" not in str(caught.value)
    assert " must " in str(caught.value) or "got" in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.filterwarnings("ignore:.*render_mode")
def test_a_wrong_value_is_refused_by_name_however_the_environment_is_made(
    name: str, folder: str
) -> None:
    patient = tiny_patient()
    ways: list[tuple[Callable[..., Any], dict[str, Any]]] = []
    if name not in VECTOR_ONLY:
        ways.append((AttentionSurgeryEnv, {"lm": folder}))
        ways.append((lambda **words: gymnasium.make(ENV_ID, **words), {"lm": folder}))
    ways.append((AttentionSurgeryVectorEnv, {"lm": folder, "num_envs": 2}))
    ways.append(
        (lambda **words: gymnasium.make_vec(ENV_ID, **words), {"lm": folder, "num_envs": 2})
    )
    if name in GYMNASIUMS_OWN:
        ways = [way for way in ways if isinstance(way[0], type)]
    if name not in STORED_ONLY:
        ways = [(make, {**words, "lm": patient}) for make, words in ways[:1]] + ways[1:]
    for make, words in ways:
        for value in WRONG[name]:
            refuses(make, name, value, **{**SIZES, **words})


@pytest.mark.parametrize("misspelt", ["n_promts", "inury", "stepsize", "scores", "Device", "seed"])
def test_a_keyword_that_there_is_not_is_refused(misspelt: str, folder: str) -> None:
    makers: tuple[Callable[..., Any], ...] = (
        lambda **words: gymnasium.make(ENV_ID, **words),
        lambda **words: gymnasium.make_vec(ENV_ID, num_envs=2, **words),
    )
    for make in makers:
        with pytest.raises(ValueError, match=f"got an unexpected keyword argument '{misspelt}'"):
            make(lm=folder, **{misspelt: 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("episode_length", np.int32(2)),
        ("n_prompts", np.uint8(4)),
        ("step_size", np.float32(0.5)),
        ("step_size", Fraction(1, 2)),
        ("step_size", 1),
        ("flatline_penalty", np.int64(0)),
        ("injury", np.float16(0.5)),
        ("injury", torch.tensor([0.5, 0, 0, 0], dtype=torch.bfloat16, requires_grad=True)),
        ("layers", np.array([0, 1])),
        ("layers", np.array(1)),
        ("layers", range(2)),
        ("layers", "*"),
        ("score", {"kl_ref": np.float32(1), "heldout_loss": 20}),
        ("operator_options", {"tied": np.True_, "scale": np.float64(0.5)}),
    ],
)
def test_what_is_meant_plainly_is_taken(name: str, value: Any) -> None:
    for env in (tiny_env(**{name: value}), tiny_vector_env(2, **{name: value})):
        env.reset(seed=0)
        env.step(np.zeros(env.action_space.shape))
    kept = getattr(env.config, name, None)
    assert not isinstance(kept, np.generic)  # goes into JSON


@pytest.mark.parametrize(
    ("make", "size", "name"),
    [
        (tiny_env, {"n_prompts": 10**12}, "n_prompts"),
        (tiny_vector_env, {"num_envs": 10**12}, "num_envs"),
        (tiny_vector_env, {"num_envs": 10**6, "n_prompts": 10**6}, "num_envs"),
    ],
)
def test_what_does_not_fit_into_memory_is_refused_with_what_it_needs(
    make: Callable[..., Any], size: dict[str, int], name: str
) -> None:
    rule = rf"{name}.* texts must fit the memory, [\d.]+ GiB, got a need of at least .* GiB$"
    with pytest.raises(ValueError, match=rule):
        make(**size)


# --- reset ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [tiny_env, tiny_vector_env])
@pytest.mark.parametrize(
    "seed", ["one", 1.0, True, -1, [1.5, 2, 3], {"a": 1}, b"1", object(), math.nan]
)
def test_a_wrong_seed_is_refused(make: Callable[..., Any], seed: Any) -> None:
    with pytest.raises(ValueError, match=r"^seed must be None or an integer of at least 0, got "):
        make().reset(seed=seed)


@pytest.mark.parametrize("seed", [np.int64(3), np.uint8(3)])
def test_numpys_integers_are_seeds(seed: Any) -> None:
    for make in (tiny_env, tiny_vector_env):
        assert np.array_equal(make().reset(seed=seed)[0], make().reset(seed=3)[0])


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (tiny_env, {"reset_mask": True}, "options must have no keys, got 'reset_mask'"),
        (tiny_env, {"seed": 1}, "options must have no keys, got 'seed'"),
        (tiny_env, [1], "options must be a dict with names as keys, got [1]"),
        (tiny_env, "mask", "options must be a dict with names as keys, got 'mask'"),
        (tiny_env, {1: 2}, "options must be a dict with names as keys, got {1: 2}"),
        (
            tiny_vector_env,
            {"reset_masks": [True] * 3},
            "options must have no keys but ['reset_mask'], got 'reset_masks', "
            "did you mean 'reset_mask'?",
        ),
        (tiny_vector_env, {"reset_mask": [1, 0, 1]}, "reset_mask must be (3,) of bool"),
        (tiny_vector_env, {"reset_mask": [[True], []]}, "reset_mask must be (3,) of bool"),
        (tiny_vector_env, {"reset_mask": "all"}, "reset_mask must be (3,) of bool"),
    ],
)
def test_an_option_that_there_is_not_is_refused(
    make: Callable[..., Any], options: Any, message: str
) -> None:
    env = make()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        env.reset(options=options)
    env.reset(options={})
    env.reset(options=None)


# --- step -----------------------------------------------------------------------------------------

WIDTH = 4
GOOD_ACTIONS: dict[str, Any] = {
    "list": [0.5, 0.0, -0.5, 0.25],
    "tuple": (0.5, 0.0, -0.5, 0.25),
    "float64": np.array([0.5, 0.0, -0.5, 0.25]),
    "float16": np.array([0.5, 0.0, -0.5, 0.25], np.float16),
    "tensor": torch.tensor([0.5, 0.0, -0.5, 0.25]),
    "requires grad": torch.tensor([0.5, 0.0, -0.5, 0.25], requires_grad=True),
    "bfloat16": torch.tensor([0.5, 0.0, -0.5, 0.25], dtype=torch.bfloat16),
    "parameter": nn.Parameter(torch.tensor([0.5, 0.0, -0.5, 0.25], dtype=torch.float16)),
    "list of scalars": [np.float32(0.5), np.float64(0), -0.5, torch.tensor(0.25)],
    "strided": np.array([0.5, 9, 0.0, 9, -0.5, 9, 0.25, 9])[::2],
}
BAD_ACTIONS: dict[str, Any] = {
    "none": None,
    "text": "sharper",
    "texts": ["0.5"] * WIDTH,
    "number": 0.5,
    "short": [0.5],
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
    "set": {0.5, 0.25, 0.1, 0.0},
    "generator": (0.5 for _ in range(WIDTH)),
    "meta": torch.zeros(WIDTH, device="meta"),
    "sparse": torch.zeros(WIDTH).to_sparse(),
    "huge integers": [10**400] * WIDTH,
    "dates": np.array(["2020-01-01"] * WIDTH, dtype="datetime64[D]"),
}


@pytest.mark.parametrize("kind", GOOD_ACTIONS)
def test_numbers_of_any_kind_are_an_action(kind: str) -> None:
    given = GOOD_ACTIONS[kind]
    results = []
    for action in (given, np.array([0.5, 0.0, -0.5, 0.25], np.float32)):
        env = tiny_env()
        env.reset(seed=0)
        results.append(env.step(action))
    assert np.array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    rows: Any = torch.stack([given] * 3) if torch.is_tensor(given) else [given] * 3
    envs = tiny_vector_env()
    envs.reset(seed=0)
    _, _, _, _, infos = envs.step(rows)
    assert infos["coefficients"].tolist() == [[0.25, 0.0, -0.25, 0.125]] * 3


@pytest.mark.parametrize("kind", BAD_ACTIONS)
def test_anything_else_is_refused_and_changes_nothing(kind: str) -> None:
    action = BAD_ACTIONS[kind]
    env, twin = tiny_env(), tiny_env()
    envs = tiny_vector_env()
    for each in (env, twin, envs):
        each.reset(seed=0)
    with pytest.raises(ValueError, match=r"^action must be ") as caught:
        env.step(action)
    assert "\n" not in str(caught.value)
    assert np.array_equal(env.step(np.zeros(WIDTH))[0], twin.step(np.zeros(WIDTH))[0])
    with pytest.raises(ValueError, match=r"^actions? must "):
        envs.step([action] * 3)
    with pytest.raises(ValueError, match=r"^actions? must "):
        envs.step(action)


def test_a_step_at_the_wrong_time_says_what_to_do() -> None:
    zeros = np.zeros(WIDTH)
    env, envs = (
        tiny_env(episode_length=2),
        tiny_vector_env(episode_length=2, autoreset_mode="Disabled"),
    )
    for each, action in ((env, zeros), (envs, np.zeros((3, WIDTH)))):
        with pytest.raises(RuntimeError, match=r"call reset\(\) first"):
            each.step(action)
        each.reset(seed=0)
        each.step(action)
        each.step(action)
        with pytest.raises(RuntimeError, match=r"reset\(\)"):
            each.step(action)
        each.close()
        each.close()
        for again in (lambda each=each: each.reset(), lambda e=each, a=action: e.step(a)):
            with pytest.raises(RuntimeError, match=r"^the environment is closed: make another$"):
                again()


# --- patients -------------------------------------------------------------------------------------


def put(model: Any, corpus: Any = None) -> Patient:
    return Patient(model, tiny_patient().tokenizer, tiny_corpus() if corpus is None else corpus)


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def with_meta_weight(model: nn.Module) -> nn.Module:
    model.blocks[1].mlp.to("meta")
    return model


def with_integer_weight(model: nn.Module) -> nn.Module:
    attention = model.blocks[0].attn.c_attn
    weight = attention.weight.to(torch.int8)
    attention.weight = nn.Parameter(weight, requires_grad=False)
    return model


def with_offloading_hook(model: nn.Module) -> nn.Module:
    hook = type("AlignDevicesHook", (), {"offload": True})()
    model.blocks[0]._hf_hook = hook
    return model


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: torch.compile(m, backend="eager"), "not be compiled: .*_orig_mod"),
        (compiled_in_place, "not be compiled"),
        (lambda m: m.to("meta"), "have its weights in memory .* meta device"),
        (with_meta_weight, "have its weights in memory .* at 'blocks.1.mlp"),
        (with_offloading_hook, "have its weights in memory .* at 'blocks.0'"),
        (
            with_integer_weight,
            "have plain floating-point weights.* torch.int8 at 'blocks.0.attn.c_attn'",
        ),
    ],
)
def test_a_model_that_cannot_be_operated_on_is_refused_with_what_to_do(
    spoil: Callable[[nn.Module], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^model must {message}") as caught:
        put(spoil(tiny_patient().model))
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
def test_dynamically_quantised_and_scripted_models_are_refused() -> None:
    model = tiny_patient().model
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ValueError, match=r"^model must have plain floating-point weights"):
        put(quantized)
    scripted = torch.jit.script(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^model must be a plain module, not TorchScript"):
        put(scripted)


@pytest.mark.parametrize("corpus", ["playwright", 1, ["text"]])
def test_what_is_no_corpus_is_refused(corpus: Any) -> None:
    with pytest.raises(ValueError, match=r"^corpus must be one of load_corpus"):
        put(tiny_patient().model, corpus)


# --- operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operator", "option", "value"),
    [
        ("low_rank_seed", "n_directions", 10**12),
        ("low_rank_seed", "rank", 10**9),
        ("low_rank_seed", "seed", -1),
        ("low_rank_seed", "seed", 1.5),
        ("low_rank_seed", "projections", 3),
        ("low_rank_seed", "projections", [1]),
        ("spectral_bands", "n_bands", True),
        ("spectral_bands", "scale", math.nan),
        ("layer_truncation", "tied", 1),
        ("output_temperature", "final_norm", 3),
    ],
)
def test_a_wrong_option_of_an_operator_is_refused(operator: str, option: str, value: Any) -> None:
    for make in (tiny_env, tiny_vector_env):
        refuses(make, "operator_options", {option: value}, operator=operator)


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (MemoryError(), ValueError, "operator_options must fit into memory, got {}: MemoryError"),
        (
            torch.OutOfMemoryError("CUDA out of memory."),
            ValueError,
            "must fit into memory, got {}: CUDA",
        ),
        (None, ValueError, "must fit into memory, got {}: .* tried to allocate"),
        (RuntimeError("a bug of its own"), RuntimeError, "^a bug of its own$"),
    ],
)
def test_only_memory_that_runs_out_is_blamed_on_the_options(
    error: Exception | None,
    kind: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(targets: object) -> object:
        if error is None:
            return torch.empty(10**14)
        raise error

    monkeypatch.setitem(OPERATORS, "failing", fail)
    with pytest.raises(kind, match=message):
        tiny_env(operator="failing")
