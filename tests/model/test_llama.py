"""The model against transformers: logits, loss and gradients."""

import random

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fast_llm.config.document import Document
from fast_llm.config.model import BaseModelConfig
from fast_llm.config.validate import validate
from fast_llm.model.attention import PackedSequences
from fast_llm.model.decoder import CausalLM, init_weights
from fast_llm.models.llama import FAMILY
from fast_llm.models.parameters import shapes


def random_llama(seed: int) -> LlamaForCausalLM:
    """A transformers Llama with random sizes, biases, rotary scaling and tying."""
    choose = random.Random(seed)
    groups = choose.choice([1, 2, 3])
    heads = groups * choose.choice([1, 2, 3])
    head_dim = choose.choice([None, 8, 10, 16])
    hidden = (
        heads * choose.choice([8, 12, 18])
        if head_dim is None
        else heads * choose.choice([7, 11, 13])
    )
    rope = {"rope_type": "default", "rope_theta": choose.choice([1e4, 5e5])}
    if choose.random() < 0.5:
        rope |= {
            "rope_type": "llama3",
            "factor": choose.choice([8.0, 32.0]),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": choose.choice([16, 64]),
        }
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=choose.choice([61, 101, 256]),
            hidden_size=hidden,
            intermediate_size=choose.choice([31, 64, 97]),
            num_hidden_layers=choose.choice([1, 2, 3]),
            num_attention_heads=heads,
            num_key_value_heads=groups,
            head_dim=head_dim,
            attention_bias=choose.random() < 0.3,
            mlp_bias=choose.random() < 0.3,
            tie_word_embeddings=choose.random() < 0.5,
            rms_norm_eps=choose.choice([1e-5, 1e-6]),
            rope_parameters=rope,
            max_position_embeddings=128,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=1,
        )
    )
    for parameter in model.parameters():  # norms of 1 and biases of 0 would hide mistakes
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def ours(reference: LlamaForCausalLM, cross_entropy: str = "fused") -> CausalLM:
    values = FAMILY.architecture(reference.config.to_dict(), "config.json")
    model = CausalLM(validate(BaseModelConfig, Document(values, {}, "")), cross_entropy)
    missing, unexpected = model.load_state_dict(reference.state_dict(), strict=False)
    assert not missing and not unexpected
    return model


def distance(one: Tensor, other: Tensor) -> float:
    """Norm of the difference over the norm."""
    return float((one - other).norm() / other.norm().clamp_min(1e-12))


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("cross_entropy", ["torch", "fused"])
def test_logits_loss_and_gradients_equal_transformers(seed: int, cross_entropy: str) -> None:
    reference = random_llama(seed)
    model = ours(reference, cross_entropy)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(reference.config.vocab_size, (2, 37), generator=generator)
    labels = torch.randint(reference.config.vocab_size, (2, 37), generator=generator)
    labels[0, 3:5] = -100
    positions = torch.arange(37).expand(2, 37)
    logits = reference(tokens).logits
    # A sum of n products rounds by √n · 2^-24 of its size; n is 256 at most. Three layers are some
    # 60 sums one after the other, forward and back, whose errors add as squares: √(256 · 60) ·
    # 2^-24 = 7.4e-6 from float64, for either of the two, and √2 of that apart. Measured 5e-6 on all
    # processors of tests/test_processors.py.
    assert distance(model(tokens, positions), logits) < 1e-5
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum"
    )
    loss = model(tokens, positions, None, labels)
    assert abs(loss.item() - expected.item()) < 1e-5 * expected.item()
    (expected / 72).backward()
    (loss / 72).backward()
    theirs = dict(reference.named_parameters())
    assert {name for name, _ in model.named_parameters()} == set(theirs)
    for name, parameter in model.named_parameters():
        gradient, expected = parameter.grad, theirs[name].grad
        assert gradient is not None and expected is not None, name
        assert distance(gradient, expected) < 1e-5, name
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes(model.config)


def test_packed_documents_equal_single_ones() -> None:
    model = ours(random_llama(1))
    lengths = (1, 7, 1, 30, 11, 14)
    tokens = torch.randint(61, (2, 32), generator=torch.Generator().manual_seed(0))
    lengths = (1, 7, 24, 30, 1, 1)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, 32)
    boundaries = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = model(tokens, positions, PackedSequences(lengths, boundaries, max(lengths))).flatten(
        0, 1
    )
    alone = [
        model(part[None], torch.arange(len(part))[None])[0]
        for part in tokens.flatten().split(list(lengths))
    ]
    # The same sums in another order.
    assert distance(packed, torch.cat(alone)) < 1e-6
    assert distance(model(tokens, torch.arange(32).expand(2, 32)).flatten(0, 1), packed) > 1e-2


def test_tied_weights_stay_tied_off_the_meta_device() -> None:
    reference = next(m for m in map(random_llama, range(9)) if m.config.tie_word_embeddings)
    with torch.device("meta"):
        model = CausalLM(ours(reference).config)
    model.to_empty(device="cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_random_weights_follow_the_formula_and_the_seed() -> None:
    config = validate(
        BaseModelConfig,
        Document(
            {
                "vocab_size": 512,
                "init_method_std_embed": 0.5,
                "transformer": {"num_layers": 2, "hidden_size": 256, "init_method_max_qkv": 0.01},
            },
            {},
            "",
        ),
    )
    one, two, other = CausalLM(config), CausalLM(config), CausalLM(config)
    for model, seed in ((one, 1), (two, 1), (other, 2)):
        init_weights({name: p.detach() for name, p in model.named_parameters()}, config, seed)
    state = one.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in two.state_dict().items())
    assert not torch.equal(
        state["model.embed_tokens.weight"], other.state_dict()["model.embed_tokens.weight"]
    )
    block = "model.layers.1."
    for name, std in (
        ("model.embed_tokens.weight", 0.5),
        (block + "mlp.up_proj.weight", 256**-0.5),
        (block + "mlp.down_proj.weight", 256**-0.5 / 2),
        (block + "self_attn.o_proj.weight", 256**-0.5 / 2),
    ):
        # Of n normal values the standard deviation is known to 1 / √(2n): here 0.3 %, times four.
        assert abs(state[name].std().item() / std - 1) < 0.012, name
    assert state[block + "self_attn.q_proj.weight"].max() == pytest.approx(0.01)
    assert state[block + "self_attn.q_proj.weight"].min() < -0.1
    assert (state["model.norm.weight"] == 1).all()
