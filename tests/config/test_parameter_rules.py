"""Weight decay, learning rate scale and freezing by patterns of parameter names."""

from typing import Any

import pytest

from fast_llm.config.optimizer import OptimizerConfig
from fast_llm.config.parameter_rules import (
    ParameterRule,
    covered,
    frozen_names,
    rule_of,
    rule_problems,
)

SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (64, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.layers.1.self_attn.q_proj.weight": (8, 8),
    "model.norm.weight": (8,),
    "lm_head.weight": (64, 8),
}


def rules(**settings: Any) -> dict[str, ParameterRule]:
    config = OptimizerConfig(weight_decay=0.1, default_learning_rate_scale=2.0, **settings)
    return {name: rule_of(config, name, len(shape)) for name, shape in SHAPES.items()}


def test_without_patterns_matrices_decay_and_nothing_is_frozen() -> None:
    expected = {
        name: ParameterRule(0.1 if len(shape) > 1 else 0.0, 2.0, frozen=False)
        for name, shape in SHAPES.items()
    }
    assert rules() == expected


def test_biases_of_experts_do_not_decay() -> None:
    """They are one tensor of two dimensions."""
    config = OptimizerConfig(weight_decay=0.1)
    found = rule_of(config, "model.layers.0.mlp.experts.up_proj.bias", 2)
    assert found.weight_decay == 0.0


def test_a_scale_of_zero_for_all_freezes_nothing() -> None:
    config = OptimizerConfig(default_learning_rate_scale=0.0)
    assert not any(rule_of(config, name, 2).frozen for name in SHAPES)


def test_patterns_match_whole_names() -> None:
    found = rules(no_weight_decay=["*embed_tokens.*", "*.[1-9].*.q_proj.weight"])
    without = [name for name, rule in found.items() if not rule.weight_decay]
    assert without == [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.norm.weight",
    ]
    assert rules(no_weight_decay=["embed_tokens", "*.q_proj", "Model.*"]) == rules()


def test_the_last_pattern_decides() -> None:
    found = rules(learning_rate_scales=[0, "*", 0.5, "*.layers.*", 1, "*norm*"])
    assert {name: rule.learning_rate_scale for name, rule in found.items()} == {
        "model.embed_tokens.weight": 0,
        "model.layers.0.self_attn.q_proj.weight": 0.5,
        "model.layers.0.input_layernorm.weight": 1,  # not 2: it replaces the default
        "model.layers.1.self_attn.q_proj.weight": 0.5,
        "model.norm.weight": 1,
        "lm_head.weight": 0,
    }
    config = OptimizerConfig(learning_rate_scales=[0, "*", 0.5, "*.layers.*", 1, "*norm*"])
    assert frozen_names(config, SHAPES) == ["model.embed_tokens.weight", "lm_head.weight"]
    assert [
        (pattern, effect, len(names)) for pattern, effect, names in covered(config, SHAPES)
    ] == [
        ("*", "frozen", 2),
        ("*.layers.*", "learning rate × 0.5", 2),
        ("*norm*", "learning rate × 1", 2),
    ]


DECAY, SCALES = "optimizer.no_weight_decay", "optimizer.learning_rate_scales"


@pytest.mark.parametrize(
    ("settings", "tied", "expected"),
    [
        ({"no_weight_decay": ["*"], "learning_rate_scales": [1, "*.layers.[01].*"]}, False, []),
        (
            {"no_weight_decay": ["*.q_proj", "*.norm.weight"]},
            False,
            [
                (
                    DECAY,
                    '"*.q_proj" matches no parameter of the model; the nearest are'
                    " model.layers.*.self_attn.q_proj.weight,"
                    " model.layers.*.input_layernorm.weight, lm_head.weight (a pattern matches"
                    " whole names)",
                )
            ],
        ),
        (
            {"learning_rate_scales": [0, "model.layers.[0-9].self_attn.k_proj.weight"]},
            False,
            [
                (
                    SCALES,
                    '"model.layers.[0-9].self_attn.k_proj.weight" matches no parameter of the'
                    " model; the nearest are model.layers.*.self_attn.q_proj.weight,"
                    " model.layers.*.input_layernorm.weight, model.embed_tokens.weight (a pattern"
                    " matches whole names)",
                )
            ],
        ),
        (
            {"learning_rate_scales": [0, "lm_head.*"]},
            True,
            [
                (
                    SCALES,
                    '"lm_head.*" matches no parameter of the model: with tie_word_embeddings the'
                    " head is the embedding; write model.embed_tokens.weight",
                )
            ],
        ),
        (
            {"learning_rate_scales": [0.1, "model.norm.weight", 1, "*"]},
            False,
            [
                (
                    SCALES,
                    '"model.norm.weight" has no effect: later patterns match all of its parameters,'
                    " and the last that matches decides; write it after them",
                )
            ],
        ),
        (
            {"learning_rate_scales": [0, "model.*", 0, "lm_head.weight"]},
            False,
            [
                (
                    SCALES,
                    "freezes every parameter of the model; at least one must have a scale above 0"
                    " (to measure losses only, set training.train_iters: 0)",
                )
            ],
        ),
    ],
)
def test_mistakes(settings: dict[str, Any], tied: bool, expected: list[tuple[str, str]]) -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if not (tied and "head" in name)}
    assert rule_problems(OptimizerConfig(**settings), shapes) == expected
