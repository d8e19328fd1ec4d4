"""The constraints on the shape of the model: what must divide what, initialization, and what fp8
supports.
"""

import math
from collections.abc import Iterator

from fast_llm.config.train import TrainConfig
from fast_llm.config.validate import Violation

Violations = Iterator[Violation]


def tensor_parallel(config: TrainConfig) -> Violations:
    """What `tensor_parallel` must divide."""
    size, base = config.model.distributed.tensor_parallel, config.model.base_model
    name, above = "model.distributed.tensor_parallel", "model.base_model"
    for path, divided in (
        (f"{above}.transformer.head_groups", base.transformer.head_groups),
        (f"{above}.transformer.num_attention_heads", base.transformer.num_attention_heads),
        (f"{above}.transformer.ffn_hidden_size", base.transformer.ffn_hidden_size),
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
    rotary, above = (
        config.model.base_model.transformer.rotary,
        "model.base_model.transformer.rotary",
    )
    if rotary.type == "llama3" and rotary.high_frequency_factor <= rotary.low_frequency_factor:
        yield (
            (f"{above}.high_frequency_factor", f"{above}.low_frequency_factor", f"{above}.type"),
            f"given {rotary.high_frequency_factor}, must be above low_frequency_factor"
            f" {rotary.low_frequency_factor}",
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
