"""The constraints on the shape of the model: what must divide what, initialization, and what fp8
supports.
"""

import math
from collections.abc import Iterator

from fast_llm.config.model import BaseModelConfig
from fast_llm.config.rotary import RotaryConfig
from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import Violation

Violations = Iterator[Violation]


def tensor_parallel(config: TrainConfig) -> Violations:
    """What `tensor_parallel` must divide."""
    size, base = config.model.distributed.tensor_parallel, config.model.base_model
    name, above = "model.distributed.tensor_parallel", "model.base_model"
    t = base.transformer
    experts = t.expert_layers()
    mlp_sizes = [(f"{above}.transformer.expert_hidden_size", t.expert_size)] if experts else []
    if len(experts) < t.num_layers:
        mlp_sizes.append((f"{above}.transformer.ffn_hidden_size", t.ffn_hidden_size))
    for path, divided in (
        (f"{above}.transformer.head_groups", base.transformer.head_groups),
        (f"{above}.transformer.num_attention_heads", base.transformer.num_attention_heads),
        *mlp_sizes,
        (f"{above}.vocab_size", base.vocab_size),
    ):
        if divided % size:
            yield (
                (name, path),
                f"given {size}, must divide the model's {path.rpartition('.')[2]} {divided}, e.g."
                f" {math.gcd(size, divided)}",
            )
            return


def heads(config: TrainConfig) -> Violations:
    """Numbers of heads, groups and channels."""
    transformer, above = config.model.base_model.transformer, "model.base_model.transformer"
    heads, groups = transformer.num_attention_heads, transformer.head_groups
    names = {
        name: f"{above}.{name}"
        for name in ("num_attention_heads", "head_groups", "hidden_size", "kv_channels")
    }
    if heads % groups:
        yield (
            (names["head_groups"], names["num_attention_heads"]),
            f"given {groups}, must divide num_attention_heads {heads}",
        )
    if "kv_channels" not in transformer.model_fields_set and transformer.hidden_size % heads:
        yield (
            (names["num_attention_heads"], names["hidden_size"], names["kv_channels"]),
            f"given {heads}, must divide hidden_size {transformer.hidden_size}, or kv_channels must"
            " be given",
        )
    elif transformer.kv_channels % 2:
        yield (
            (names["kv_channels"], names["hidden_size"], names["num_attention_heads"]),
            f"given {transformer.kv_channels}, must be even: rotary embedding turns pairs",
        )


def rotary(config: TrainConfig) -> Violations:
    """Rotary position embeddings."""
    base, above = config.model.base_model, "model.base_model.transformer"
    for name in ("rotary", "sliding_rotary"):
        embedding = getattr(base.transformer, name)
        if embedding is not None and embedding.type != "none":
            yield from _rotary(embedding, base, f"{above}.{name}", f"{above}.kv_channels")


def _rotary(rotary: RotaryConfig, base: BaseModelConfig, above: str, head: str) -> Violations:
    for kind, higher, lower in (
        ("llama3", "high_frequency_factor", "low_frequency_factor"),
        ("yarn", "beta_fast", "beta_slow"),
    ):
        high, low = getattr(rotary, higher), getattr(rotary, lower)
        if rotary.type == kind and high <= low:
            yield (
                (f"{above}.{higher}", f"{above}.{lower}", f"{above}.type"),
                f"given {high}, must be above {lower} {low}",
            )
    share, size = rotary.partial_rotary_factor, base.transformer.kv_channels
    dims = rotary.rotated_dims(size)
    if size % 2 == 0 and (dims % 2 or not dims):
        yield (
            (f"{above}.partial_rotary_factor", head),
            f"given {share}, which rotates {dims} dimensions of a head of {size}; they must be even"
            " and above 0",
        )
    if rotary.type == "dynamic" and dims == 2:
        yield (f"{above}.type", head), "given dynamic, which needs more than 2 rotated dimensions"
    if rotary.type == "longrope":
        yield from _longrope(rotary, dims // 2, above)


def _longrope(rotary: RotaryConfig, pairs: int, above: str) -> Violations:
    for name in ("short_factor", "long_factor"):
        given = getattr(rotary, name)
        if given is None:
            yield (f"{above}.{name}", f"{above}.type"), "is missing; rotary.type: longrope needs it"
        elif len(given) != pairs:
            yield (
                (f"{above}.{name}",),
                f"given {len(given)} numbers, must be {pairs}: one for each pair of rotated"
                " dimensions",
            )
    if rotary.original_context_length == 1:
        yield (f"{above}.original_context_length",), "given 1, must be above 1 for longrope"


def layer_kinds(config: TrainConfig) -> Violations:
    """Settings that say which block has which attention and positions."""
    t, above = config.model.base_model.transformer, "model.base_model.transformer"
    kinds, window, layers = f"{above}.layer_types", f"{above}.window_size", f"{above}.num_layers"
    if t.layer_types is not None:
        if len(t.layer_types) != t.num_layers:
            yield (
                (kinds, layers),
                f"given {len(t.layer_types)} entries, must be num_layers {t.num_layers}",
            )
            return
        if "sliding_attention" in t.layer_types and t.window_size is None:
            yield (window, kinds), "missing: blocks with sliding_attention need it, e.g. 4096"
        if "sliding_attention" not in t.layer_types and t.window_size is not None:
            yield (
                (window, kinds),
                f"given {t.window_size}, but no block of layer_types has sliding_attention; set it"
                " to null",
            )
    if beyond := [layer for layer in t.layers_without_rotary if layer >= t.num_layers]:
        yield (
            (f"{above}.layers_without_rotary", layers),
            f"given {beyond[0]}, must be below num_layers {t.num_layers}",
        )
        return
    without = [layer for layer in range(t.num_layers) if t.rotary_of(layer) is None]
    if t.attention_temperature is not None and without:
        yield (
            (f"{above}.attention_temperature", f"{above}.layers_without_rotary", f"{above}.rotary"),
            f"needs rotary positions in every block, which block {without[0]} has not",
        )


def activation(config: TrainConfig) -> Violations:
    """The activation of the MLP, and its gate."""
    t, above = config.model.base_model.transformer, "model.base_model.transformer"
    if t.gated == (t.activation_type == "xielu"):
        allowed = "no: xielu is for MLPs without a gate" if t.gated else "yes, or xielu"
        yield (
            (f"{above}.gated", f"{above}.activation_type"),
            f"given {'yes' if t.gated else 'no'} with activation_type {t.activation_type}, must be"
            f" {allowed}",
        )
    elif not t.gated and t.add_linear_biases in ("everywhere", "only_mlp"):
        yield (
            (f"{above}.add_linear_biases", f"{above}.gated"),
            f"given {t.add_linear_biases}, but MLPs without a gate have no biases",
        )


def experts(config: TrainConfig) -> Violations:
    """Mixture of experts."""
    t, above = config.model.base_model.transformer, "model.base_model.transformer"
    number, chosen = f"{above}.num_experts", f"{above}.num_experts_per_token"
    if t.num_experts_per_token > t.num_experts:
        yield (
            (chosen, number),
            f"given {t.num_experts_per_token}, must be at most num_experts {t.num_experts}",
        )
    if beyond := [layer for layer in t.layers_without_experts if layer >= t.num_layers]:
        yield (
            (f"{above}.layers_without_experts", f"{above}.num_layers"),
            f"given {beyond[0]}, must be below num_layers {t.num_layers}",
        )
    if t.num_experts == 1:
        if t.expert_bias_update_rate is not None:
            yield (
                (f"{above}.expert_bias_update_rate", number),
                f"given {t.expert_bias_update_rate}, but the model has no experts; set it to null",
            )
        return
    if t.activation_type not in ("silu", "clamped_swiglu"):
        yield (
            (f"{above}.activation_type", number),
            f"given {t.activation_type}, must be silu or clamped_swiglu with experts",
        )


def export_format(config: TrainConfig) -> Violations:
    """The family of exports is that which is trained."""
    asked, family = config.training.export.format, config.model.base_model.family
    if asked not in ("auto", family):
        yield (
            ("training.export.format", "model.base_model.family", "pretrained.path"),
            f"given {asked}, but the model is {family}; use auto",
        )


def initialization(config: TrainConfig) -> Violations:
    """Ranges of the random initialization."""
    base = config.model.base_model
    transformer, above = base.transformer, "model.base_model.transformer"
    lowest, highest = transformer.init_method_min, transformer.init_method_max
    pairs = [("init_method_min", "init_method_max", lowest, highest, above)]
    for part in ("qkv", "attn_proj", "mlp_1", "mlp_2", "embed"):
        section, path = (base, "model.base_model") if part == "embed" else (transformer, above)
        low, high = (
            getattr(section, f"init_method_min_{part}"),
            getattr(section, f"init_method_max_{part}"),
        )
        if low is not None or high is not None:
            low, high = lowest if low is None else low, highest if high is None else high
            pairs.append((f"init_method_min_{part}", f"init_method_max_{part}", low, high, path))
    for low_name, high_name, low, high, path in pairs:
        if low is not None and high is not None and low > high:
            yield (
                (
                    f"{path}.{low_name}",
                    f"{path}.{high_name}",
                    f"{above}.init_method_min",
                    f"{above}.init_method_max",
                ),
                f"given {low}, must be at most {high_name} {high}",
            )


def fp8(config: TrainConfig) -> Violations:
    """Dtypes and shapes that PyTorch's fp8 matmuls support."""
    name, distributed, shape = (
        "model.distributed.fp8",
        config.model.distributed,
        config.model.base_model.transformer,
    )
    if not distributed.fp8:
        return
    if distributed.training_dtype != "bf16":
        yield (
            (name, "model.distributed.training_dtype"),
            f"given yes, which requires training_dtype: bf16, not {distributed.training_dtype}",
        )
    if distributed.tensor_parallel > 1:
        yield (
            (name, "model.distributed.tensor_parallel"),
            "given yes, which is not supported with tensor_parallel:"
            f" {distributed.tensor_parallel}; turn one of them off",
        )
    channels = shape.kv_channels or 0
    sizes = {
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size or 0,
        "head_groups × kv_channels": shape.head_groups * channels,
    }
    for size, value in sizes.items():
        if value % 16:
            yield (
                (name, f"model.base_model.transformer.{size}"),
                f"given yes, which requires {size} {value} to be a multiple of 16",
            )
    if config.batch.sequence_length // distributed.sequence_data_parallel % 16:
        yield (
            (name, "batch.sequence_length"),
            "given yes, which requires each process's part of sequence_length"
            f" {config.batch.sequence_length} to be a multiple of 16",
        )
