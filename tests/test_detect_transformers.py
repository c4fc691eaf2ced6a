"""find_symmetries on models that this project did not write: built from configurations, nothing is downloaded."""

from typing import Any

import pytest
import torch
from completeness import completeness
from test_detect import law, laws, unit

from noetherperf import find_symmetries

transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

SMALL = {"vocab_size": 53, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
LLAMA = SMALL | {"intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2}
IMAGES = {"num_labels": 5, "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 20}
TOKENS = torch.arange(16).reshape(2, 8)
PIXELS = torch.randn(2, 3, 16, 16)


def gated(bias: bool) -> list[str]:
    """A block of the Llama family: RMSNorm, rotary pairs two apart, two query heads to a key head, a gated unit."""
    found = ["rescale model.norm.weight:0 > lm_head.weight:1", "translation lm_head.weight:1"]
    stream = "model.embed_tokens.weight:whole"
    for block in ("model.layers.0", "model.layers.1"):
        q, k, v, o = (f"{block}.self_attn.{x}_proj" for x in "qkvo")
        gate, up, down = (f"{block}.mlp.{x}_proj" for x in ("gate", "up", "down"))
        bq, bk, bv = (f"{q}.bias:0/4~2", f"{k}.bias:0/2~2", f"{v}.bias:0") if bias else ("", "", "")
        found += [
            f"rescale {block}.input_layernorm.weight:0 > {q}.weight:1 {k}.weight:1 {v}.weight:1",
            f"rescale {block}.post_attention_layernorm.weight:0 > {gate}.weight:1 {up}.weight:1",
            f"rescale {q}.weight:0/4~2 {bq} > {k}.weight:0/2~2 {bk}",
            f"balance/4 {v}.weight:0 {bv} > {o}.weight:1/2~4",
            f"rescale {up}.weight:0 > {down}.weight:1",
        ]
        stream += f" {o}.weight:whole {down}.weight:whole"
    return [*found, f"scale {stream}"]


def attention(q: str, k: str, v: str, o: str) -> list[str]:
    return [
        f"balance/8 {q}.weight:0 {q}.bias:0 > {k}.weight:0 {k}.bias:0",
        f"balance/8 {v}.weight:0 {v}.bias:0 > {o}.weight:1",
        f"translation {k}.bias:0",
    ]


def gpt2() -> list[str]:
    """Weights are [in, out]; the head is the token embedding."""
    found = ["translation transformer.wpe.weight:0"]
    for block in ("transformer.h.0", "transformer.h.1"):
        qkv, proj, down = f"{block}.attn.c_attn", f"{block}.attn.c_proj", f"{block}.mlp.c_proj"
        found += [
            f"rescale {block}.ln_1.weight:0 {block}.ln_1.bias:0 > {qkv}.weight:0",
            f"rescale {block}.ln_2.weight:0 {block}.ln_2.bias:0 > {block}.mlp.c_fc.weight:0",
            f"balance/8 {qkv}.weight:1[:16] {qkv}.bias:0[:16] > {qkv}.weight:1[16:32] {qkv}.bias:0[16:32]",
            f"balance/8 {qkv}.weight:1[32:] {qkv}.bias:0[32:] > {proj}.weight:0",
            f"translation {qkv}.bias:0[16:32]",
        ]
        found += [f"translation {name}.{end}" for name in (proj, down) for end in ("weight:0", "bias:whole")]
    return found


def bloom() -> list[str]:
    qkv, dense = "transformer.h.0.self_attention.query_key_value", "transformer.h.0.self_attention.dense"
    return [
        f"balance/8 {qkv}.weight:0[:8]%24 {qkv}.bias:0[:8]%24 > {qkv}.weight:0[8:16]%24 {qkv}.bias:0[8:16]%24",
        f"balance/8 {qkv}.weight:0[16:]%24 {qkv}.bias:0[16:]%24 > {dense}.weight:1",
        f"translation {qkv}.bias:0[8:16]%24",
    ]


def t5() -> list[str]:
    found = []
    for side, layer in (("encoder", 1), ("decoder", 2)):
        attn, mlp = f"{side}.block.1.layer.0.SelfAttention", f"{side}.block.1.layer.{layer}.DenseReluDense"
        found += [
            f"balance/8 {attn}.q.weight:0 > {attn}.k.weight:0",
            f"balance/8 {attn}.v.weight:0 > {attn}.o.weight:1",
            f"rescale {mlp}.wi.weight:0 > {mlp}.wo.weight:1",
            f"rescale {side}.block.1.layer.{layer}.layer_norm.weight:0 > {mlp}.wi.weight:1",
            # the bias of a head, added to all its scores, is cancelled by softmax
            f"translation {side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight:1",
        ]
    return found


def model(name: str, kind: str, **options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**options)
    built = getattr(transformers, name + kind)(config)
    assert isinstance(built, torch.nn.Module)
    return built


BERT, OPT, VIT = "bert.encoder.layer.1.attention", "model.decoder.layers.1", "vit.layers.1"
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "Llama": ("ForCausalLM", LLAMA, {"input_ids": TOKENS}, gated(bias=False)),
    "Mistral": ("ForCausalLM", LLAMA, {"input_ids": TOKENS}, gated(bias=False)),
    "Qwen2": ("ForCausalLM", LLAMA, {"input_ids": TOKENS}, gated(bias=True)),
    "GPT2": (
        "LMHeadModel",
        {"vocab_size": 53, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        {"input_ids": TOKENS},
        gpt2(),
    ),
    "Bloom": (
        "ForCausalLM",
        {"vocab_size": 53, "hidden_size": 16, "n_layer": 2, "n_head": 2},
        {"input_ids": TOKENS},
        bloom(),
    ),
    "Bert": (
        "ForSequenceClassification",
        SMALL | {"intermediate_size": 20, "max_position_embeddings": 16, "num_labels": 5},
        {"input_ids": TOKENS},
        [
            *attention(f"{BERT}.self.query", f"{BERT}.self.key", f"{BERT}.self.value", f"{BERT}.output.dense"),
            "translation classifier.weight:1",
            "translation classifier.bias:whole",
        ],
    ),
    "OPT": (
        "ForCausalLM",
        SMALL | {"ffn_dim": 20, "max_position_embeddings": 16, "word_embed_proj_dim": 16, "dropout": 0.0},
        {"input_ids": TOKENS},
        [
            f"balance/8 {OPT}.self_attn.k_proj.weight:0 {OPT}.self_attn.k_proj.bias:0 > "
            f"{OPT}.self_attn.q_proj.weight:0 {OPT}.self_attn.q_proj.bias:0",
            f"translation {OPT}.self_attn.k_proj.bias:0",
            unit(f"{OPT}.fc1", f"{OPT}.fc2"),
            unit(f"{OPT}.final_layer_norm", f"{OPT}.fc1"),
            f"translation {OPT}.fc2.weight:1",
            f"translation {OPT}.fc2.bias:whole",
        ],
    ),
    "ViT": (
        "ForImageClassification",
        IMAGES | {"image_size": 16, "patch_size": 8},
        {"pixel_values": PIXELS},
        [unit("vit.layernorm", "classifier"), "translation classifier.weight:1"],
    ),
    "T5": (
        "ForConditionalGeneration",
        {"vocab_size": 53, "d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 2, "num_heads": 2},
        {"input_ids": TOKENS, "decoder_input_ids": TOKENS},
        t5(),
    ),
    "ResNet": (
        "ForImageClassification",
        {"embedding_size": 6, "hidden_sizes": [8, 12], "depths": [1, 2], "num_labels": 5},
        {"pixel_values": torch.randn(2, 3, 32, 32)},
        [
            "scale resnet.embedder.embedder.convolution.weight:0",
            "scale resnet.encoder.stages.1.layers.1.layer.2.convolution.weight:0",
            "translation classifier.1.weight:1",
        ],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_from_elsewhere(name: str) -> None:
    kind, config, inputs, expected = MODELS[name]
    symmetries = find_symmetries(model(name, kind, **config), **inputs)
    assert {law(line) for line in expected} <= laws(symmetries)
    assert symmetries.rejected == {}
    assert max(symmetries.defects.values()) < 1e-9


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2"])
def test_nothing_is_missed_in_the_llama_family(name: str) -> None:
    kind, config, inputs, expected = MODELS[name]
    assert laws(find_symmetries(model(name, kind, **config), **inputs)) == {law(line) for line in expected}


TINY = SMALL | {"vocab_size": 23, "num_hidden_layers": 1, "hidden_size": 8}
TINY |= {"intermediate_size": 6, "max_position_embeddings": 8, "num_labels": 4}
HEADS = TINY | {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4}
FALCON = {"vocab_size": 23, "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
OPT_TINY = FALCON | {"ffn_dim": 6, "max_position_embeddings": 8, "word_embed_proj_dim": 8}
DISTIL = {"vocab_size": 23, "dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 6, "num_labels": 4}
TOKENS_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2": ("LMHeadModel", {"vocab_size": 23, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}),
    "GPTNeoX": ("ForCausalLM", TINY),
    "Llama": ("ForCausalLM", HEADS),
    "Qwen3": ("ForCausalLM", HEADS),
    "Gemma": ("ForCausalLM", HEADS),
    "Gemma2": ("ForCausalLM", HEADS),
    "Falcon": ("ForCausalLM", FALCON),
    "OPT": ("ForCausalLM", OPT_TINY),
    "Bert": ("ForSequenceClassification", TINY),
    "DistilBert": ("ForSequenceClassification", DISTIL | {"max_position_embeddings": 8}),
}
CONVNEXT = {"num_labels": 4, "hidden_sizes": [4, 6], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
IMAGES_OF: dict[str, tuple[str, dict[str, Any]]] = {
    "ConvNext": ("ForImageClassification", CONVNEXT),
}


class Logits(torch.nn.Module):
    """A model with one input, whose output is the logits."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", [*TOKENS_OF, *IMAGES_OF])
def test_default_layers_are_complete(name: str) -> None:
    kind, config = (TOKENS_OF | IMAGES_OF)[name]

    def draw(n: int, generator: torch.Generator) -> torch.Tensor:
        if name in IMAGES_OF:
            return torch.randn(n, 3, 16, 16, generator=generator)
        return torch.randint(0, 23, (n, 6), generator=generator)

    wrapped = Logits(model(name, kind, **config))
    symmetries = find_symmetries(wrapped, draw(4, torch.Generator().manual_seed(1)))
    report = completeness(wrapped, draw, "cross_entropy", symmetries)
    assert report.missed == []
    assert report.false == []
    assert symmetries.rejected == {}


def test_dropout_after_a_projection_leaves_it_no_translation() -> None:
    kind, config, inputs, _ = MODELS["GPT2"]
    found = laws(find_symmetries(model("GPT2", kind, **config | {"resid_pdrop": 0.1}), **inputs))
    assert law("translation transformer.h.0.attn.c_proj.weight:0") not in found
    assert law("translation transformer.h.0.attn.c_attn.bias:0[16:32]") in found
