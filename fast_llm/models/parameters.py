"""The decoder by configuration: names and shapes of its parameters, tensor plan, cost. No torch.

All dense families share it (model/decoder.py); names are Hugging Face's. Llama-3.1-8B at 4096
tokens: 8.03 billion parameters, 48.25 GFLOP a token.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Container, Sequence

from fast_llm.config.model import BaseModelConfig, TransformerConfig
from fast_llm.models.flops import BlockBackward, Cost
from fast_llm.models.tensor_plan import (
    Columns,
    ExpertColumns,
    ExpertRows,
    Gather,
    HeadNorm,
    Norm,
    ProjectionNorm,
    Route,
    Rows,
    Scalars,
    Scatter,
    TensorPlan,
    VocabEmbedding,
    VocabHead,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_PLAN: TensorPlan = {
    "model.embed_tokens": VocabEmbedding(),
    "*layernorm": Norm(),
    "*.self_attn": Gather(),
    "*.q_proj": Rows(),
    "*.k_proj": Rows(),
    "*.v_proj": Rows(),
    "*.o_proj": Columns(),
    "*.mlp": Gather(),
    "*.gate_proj": Rows(),
    "*.up_proj": Rows(),
    "*.down_proj": Columns(),
    "*.act_fn": Scalars(),
    "model.norm": Norm(),
    "lm_head": VocabHead(),
}
_EXPERTS: TensorPlan = {
    "*.mlp.gate": Route(),
    "*.mlp.experts": Scatter(),
    "*.experts.gate_proj": ExpertRows(),
    "*.experts.up_proj": ExpertRows(),
    "*.experts.down_proj": ExpertColumns(),
}
# norm_placement → norms before and after attention, before and after the MLP
_NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "pre": ("input_layernorm", None, "post_attention_layernorm", None),
    "post": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


def norm_names(config: TransformerConfig) -> tuple[str | None, str | None, str | None, str | None]:
    """Names of a block's norms: before and after attention, before and after the MLP."""
    return _NORMS[config.norm_placement]


def tensor_plan(config: BaseModelConfig) -> TensorPlan:
    """How tensor parallelism cuts each module."""
    t, plan = config.transformer, _PLAN
    if t.num_experts > 1:
        plan = {**_EXPERTS, **plan}
    if t.qk_norm != "none":
        norm = ProjectionNorm() if t.qk_norm == "projection" else HeadNorm()
        plan = {"*.q_norm": norm, "*.k_norm": norm, **plan}
    return plan


def shapes(config: BaseModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of each parameter, as `CausalLM.named_parameters()` has them."""
    t = config.transformer
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, t.hidden_size)}
    for layer in range(t.num_layers):
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in _block(t, layer).items()}
    found["model.norm.weight"] = (t.hidden_size,)
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, t.hidden_size)
    return found


def _block(t: TransformerConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """The name and shape of each parameter of a block."""
    hidden, ffn, biases = t.hidden_size, t.ffn_hidden_size, t.add_linear_biases
    queries, keys = t.num_attention_heads * t.kv_channels, t.head_groups * t.kv_channels
    of_attention, of_mlp = ("everywhere", "only_attention"), ("everywhere", "only_mlp")
    found: dict[str, tuple[int, ...]] = {}
    experts, size = t.num_experts, t.expert_size
    mlp: list[tuple[str, tuple[int, ...], tuple[str, ...]]] = [
        ("mlp.gate_proj", (ffn, hidden), of_mlp),
        ("mlp.up_proj", (ffn, hidden), of_mlp),
        ("mlp.down_proj", (hidden, ffn), of_mlp),
    ]
    if not t.gated:
        del mlp[0]
        found |= {"mlp.act_fn.alpha_p": (1,), "mlp.act_fn.alpha_n": (1,)}
    if t.has_experts(layer):
        mlp = [
            ("mlp.gate", (experts, hidden), of_mlp),
            ("mlp.experts.gate_proj", (experts, size, hidden), of_mlp),
            ("mlp.experts.up_proj", (experts, size, hidden), of_mlp),
            ("mlp.experts.down_proj", (experts, hidden, size), of_mlp),
        ]
    for name, shape, with_bias in (
        ("self_attn.q_proj", (queries, hidden), (*of_attention, "only_attn_qkv")),
        ("self_attn.k_proj", (keys, hidden), (*of_attention, "only_attn_qkv")),
        ("self_attn.v_proj", (keys, hidden), (*of_attention, "only_attn_qkv")),
        ("self_attn.o_proj", (hidden, queries), of_attention),
        *mlp,
    ):
        found[f"{name}.weight"] = shape
        if biases in with_bias:
            found[f"{name}.bias"] = shape[:-1]
    if t.attention_sinks:
        found["self_attn.sinks"] = (t.num_attention_heads,)
    if t.qk_norm != "none":
        whole = t.qk_norm == "projection"
        found["self_attn.q_norm.weight"] = (queries if whole else t.kv_channels,)
        found["self_attn.k_norm.weight"] = (keys if whole else t.kv_channels,)
    return found | {f"{name}.weight": (hidden,) for name in norm_names(t) if name}


def backward(
    config: BaseModelConfig, frozen: Collection[str] = ()
) -> tuple[list[BlockBackward], BlockBackward]:
    """What the backward passes of all blocks and of the head compute, if parameters are frozen.

    Of an input a gradient is computed if a parameter below it is trained.
    """
    t = config.transformer
    if not frozen:
        return [BlockBackward()] * t.num_layers, BlockBackward()
    below = EMBEDDING not in frozen
    blocks = []
    for layer in range(t.num_layers):
        shapes_of = {f"model.layers.{layer}.{name}": s for name, s in _block(t, layer).items()}
        places: dict[int, list[str]] = defaultdict(list)
        for name in shapes_of:
            places[_place(name, norm_names(t))].append(name)
        work = {name: _multiplications(name, shape, t) for name, shape in shapes_of.items()}
        weights = sum(size for name, size in work.items() if name not in frozen)
        inputs, attention = 0.0, False
        for place in range(len(_PLACES) + 1):
            inputs += sum(work[name] for name in places[place]) * below
            below = below or any(name not in frozen for name in places[place])
            attention = below if place == _BEFORE_ATTENTION else attention
        total = sum(work.values())
        blocks.append(BlockBackward(weights / total, inputs / total, attention))
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    below = below or "model.norm.weight" not in frozen
    return blocks, BlockBackward(float(head not in frozen), float(below))


# The parameters of a block in the order of its computation; norms are found by their names.
_PLACES = (
    ("norm 0",),
    (".q_proj.", ".k_proj.", ".v_proj."),
    (".q_norm.", ".k_norm.", ".sinks"),
    (".o_proj.",),
    ("norm 1",),
    ("norm 2",),
    (".gate_proj.", ".up_proj."),
    (".act_fn.",),
    (".down_proj.", ".mlp.gate."),
)
_BEFORE_ATTENTION = 2


def _place(name: str, norms: Sequence[str | None]) -> int:
    """The place of a block's parameter in `_PLACES`; the last norm comes after all."""
    for number, norm in enumerate(norms):
        if norm is not None and f".{norm}." in name:
            name = f"norm {number}"
    # Suffixes: experts have their parameters' names with and without `.weight`.
    found = (at for at, parts in enumerate(_PLACES) if any(part in f"{name}." for part in parts))
    return next(found, len(_PLACES))


def _multiplications(name: str, shape: tuple[int, ...], t: TransformerConfig) -> float:
    """Multiplications of a token with a parameter's matrix, forward."""
    if len(shape) < 2 or name.endswith(".bias"):
        return 0.0
    chosen = t.num_experts_per_token / t.num_experts if len(shape) == 3 else 1.0
    return math.prod(shape) * chosen


def cost(config: BaseModelConfig, sequence_length: float, frozen: Collection[str] = ()) -> Cost:
    """Parameters, and FLOPs per token of a training step with sequences of `sequence_length`.

    `frozen`: names of parameters that are not trained.

    For packed documents, `sequence_length` is Σ length² / Σ length over the documents. A window of
    w tokens leaves w · (1 - w / (2 length)) keys for a mean query, instead of length / 2.
    """
    t = config.transformer
    parameters = sum(math.prod(shape) for shape in shapes(config).values())
    base = 6 * t.num_layers
    heads = 2 * (t.num_attention_heads + t.head_groups) * t.kv_channels
    layers = range(t.num_layers)
    # Columns of the MLP's matrices that a token uses, and rows of routers.
    matrices = 3 if t.gated else 2
    mlp = sum(matrices * t.active_ffn_size(layer) for layer in layers)
    routers = t.num_experts * len(t.expert_layers())
    dense = base * t.hidden_size * heads + 6 * t.hidden_size * (mlp + routers)
    unused = (t.num_experts - t.num_experts_per_token) * len(t.expert_layers())
    of_expert = 3 * t.expert_size * t.hidden_size
    of_expert += t.has_mlp_biases * (2 * t.expert_size + t.hidden_size)
    active = parameters - unused * of_expert
    head = 6 * t.hidden_size * config.vocab_size
    attended = _attended_of_all(t, sequence_length)
    attention = 6 * t.num_attention_heads * t.kv_channels * attended
    blocks, of_head = backward(config, frozen)
    if all(each == BlockBackward() for each in (*blocks, of_head)):
        return Cost(parameters, active, dense + head + attention, dense + head + attention * 7 / 6)
    matmuls = head / 3 * (1 + of_head.weights + of_head.inputs)
    scores = recomputed = 0.0
    for layer, block in enumerate(blocks):
        size = sum(_multiplications(name, one, t) for name, one in _block(t, layer).items())
        matmuls += 2 * size * (1 + block.weights + block.inputs)
        keys = t.num_attention_heads * t.kv_channels * _attended(t.window(layer), sequence_length)
        scores += keys * (6 if block.attention else 2)
        recomputed += keys * block.attention
    return Cost(parameters, active, matmuls + scores, matmuls + scores + recomputed)


def attended_length(t: TransformerConfig, length: float) -> float:
    """The length of sequences on which full attention is as much work as all layers need."""
    return _attended_of_all(t, length) / t.num_layers


def _attended_of_all(t: TransformerConfig, length: float) -> float:
    windows = Counter(t.window(layer) for layer in range(t.num_layers))
    return sum(count * _attended(window, length) for window, count in windows.items())


def _attended(window: int | None, length: float) -> float:
    """Twice the mean number of keys that a query attends to."""
    if window is None or window >= length:
        return length
    return 2 * window - window**2 / length


def is_optional_tensor(name: str) -> bool:
    """Whether a folder may hold this tensor in addition to the model's parameters.

    These are rotary frequencies, which are computed here, and the head of a tied model, if it
    equals the embedding.
    """
    return name.endswith("rotary_emb.inv_freq") or name == HEAD


def stored_name(name: str, parameters: Container[str], files: Container[str]) -> str:
    """The name under which a folder's `files` hold one of a model's `parameters`.

    A tied embedding may be stored as the head: `save_model` of safetensors and accelerate does so.
    """
    as_head = name == EMBEDDING and HEAD not in parameters and name not in files and HEAD in files
    return HEAD if as_head else name
