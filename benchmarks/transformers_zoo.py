"""Models of the transformers library, tiny: two layers, a hidden size of 32, a hundred tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
)

from benchmarks.entry import Entry, entry, ids, normal, randomized

HIDDEN = 32
VOCABULARY = 100
LABELS = 5
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TRANSFORMER = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, **SPECIAL}
IMAGE = {"image_size": 32, "patch_size": 8}
GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
# The loop over experts in eager mode depends on the routing, and torch's grouped product knows no float64.
EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
ENCODER_DECODER = {
    "d_model": HIDDEN,
    "decoder_start_token_id": 2,
    **{f"{part}_{key}": n for part in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))},
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
}

Maker = Callable[[str], Entry]


def build(auto: Any, kind: str, attention: str, **options: Any) -> Any:
    config = AutoConfig.for_model(kind, **options)
    return randomized(auto.from_config(config, attn_implementation=attention))


def last_logits(out: Any) -> Tensor:
    return out.logits[:, -1]


def logits(out: Any) -> Tensor:
    return out.logits


def embeddings() -> Tensor:
    return normal(2, 6, HIDDEN)


def decoder(kind: str, attention: str, inline_functions: bool = False, **options: Any) -> Entry:
    """What speaks for the next token."""
    module = build(AutoModelForCausalLM, kind, attention, **TRANSFORMER, **TEXT, use_cache=False, **options)
    inline = {"inline_functions": inline_functions}
    return entry(module, embeddings(), names=("inputs_embeds",), output=last_logits, options=inline)


def encoder(kind: str, attention: str, **options: Any) -> Entry:
    """What speaks for a class of sentences."""
    config = {**TRANSFORMER, **TEXT, "num_labels": LABELS, **options}
    module = build(AutoModelForSequenceClassification, kind, attention, **config)
    return entry(module, embeddings(), names=("inputs_embeds",), output=logits)


def tokens(kind: str, attention: str, embedding: str) -> Entry:
    """As `encoder`, for a call with token ids."""
    module = build(AutoModelForSequenceClassification, kind, attention, **TRANSFORMER, **TEXT, num_labels=LABELS)
    return entry(
        module, ids(2, 6, vocabulary=VOCABULARY), names=("input_ids",), output=logits, options={"layers": embedding}
    )


def translator(kind: str, attention: str, **options: Any) -> Entry:
    """What of the source speaks for the next token."""
    module = build(AutoModelForSeq2SeqLM, kind, attention, **TEXT, use_cache=False, **options)
    written = ids(2, 3, vocabulary=VOCABULARY)
    return entry(module, embeddings(), names=("inputs_embeds",), output=last_logits, decoder_input_ids=written)


def image_classifier(kind: str, attention: str, **options: Any) -> Entry:
    config = {**IMAGE, "num_labels": LABELS, **options}
    module = build(AutoModelForImageClassification, kind, attention, **config)
    return entry(module, normal(1, 3, 32, 32), names=("pixel_values",), output=logits)


def image_and_texts(kind: str, attention: str) -> Entry:
    """What of an image and of five texts speaks for one of the texts."""
    end = VOCABULARY - 1
    text = {**TRANSFORMER, **TEXT, "projection_dim": 16, "eos_token_id": end}
    vision = {**TRANSFORMER, **IMAGE, "projection_dim": 16}
    module = build(AutoModel, kind, attention, text_config=text, vision_config=vision, projection_dim=16)
    texts = ids(LABELS, 6, vocabulary=end)
    texts[:, -1] = end
    return entry(
        module,
        normal(1, 3, 32, 32),
        texts,
        names=("pixel_values", "input_ids"),
        output=lambda out: out.logits_per_image,
        options={"layers": "text_model.embeddings.token_embedding"},
    )


def whisper(attention: str) -> Entry:
    """What of the sound speaks for the next token."""
    positions = {"num_mel_bins": 8, "max_source_positions": 12, "max_target_positions": 8}
    config = {"vocab_size": VOCABULARY, **SPECIAL, **ENCODER_DECODER, **positions, "use_cache": False}
    module = build(AutoModelForSpeechSeq2Seq, "whisper", attention, **config)
    written = ids(1, 3, vocabulary=VOCABULARY)
    return entry(module, normal(1, 8, 24), names=("input_features",), output=last_logits, decoder_input_ids=written)


def wav2vec2(attention: str) -> Entry:
    convolutions = {"conv_dim": [16] * 3, "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 3]}
    positions = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4}
    config = {**TRANSFORMER, **SPECIAL, **convolutions, **positions, "classifier_proj_size": 16, "num_labels": LABELS}
    module = build(AutoModelForAudioClassification, "wav2vec2", attention, **config)
    return entry(module, normal(1, 400), names=("input_values",), output=logits)


BOTH: dict[str, Maker] = {
    "llama": partial(decoder, "llama", **GROUPED),
    "mistral": partial(decoder, "mistral", sliding_window=4, **GROUPED),
    "qwen2": partial(decoder, "qwen2", **GROUPED),
    "qwen3": partial(decoder, "qwen3", **GROUPED),
    "gemma": partial(decoder, "gemma", **GROUPED),
    "gemma3": partial(decoder, "gemma3_text", sliding_window=4, **GROUPED),
    "phi": partial(decoder, "phi"),
    "gpt2": partial(decoder, "gpt2"),
    "gpt_neox": partial(decoder, "gpt_neox"),
    "opt": partial(decoder, "opt", word_embed_proj_dim=HIDDEN, ffn_dim=48),
    "falcon": partial(decoder, "falcon"),
    "mixtral": partial(decoder, "mixtral", num_local_experts=4, **EXPERTS, **GROUPED),
    "qwen3_moe": partial(decoder, "qwen3_moe", num_experts=4, moe_intermediate_size=24, **EXPERTS, **GROUPED),
    "bert": partial(encoder, "bert"),
    "bert_ids": partial(tokens, "bert", embedding="bert.embeddings.word_embeddings"),
    "roberta": partial(encoder, "roberta"),
    "distilbert": partial(encoder, "distilbert", dim=HIDDEN, hidden_dim=48, n_layers=2, n_heads=4),
    "electra": partial(encoder, "electra", embedding_size=HIDDEN),
    "albert": partial(encoder, "albert", embedding_size=HIDDEN),
    "t5": partial(translator, "t5", d_model=HIDDEN, d_kv=8, d_ff=48, num_layers=2, num_heads=4),
    "bart": partial(translator, "bart", **ENCODER_DECODER),
    "vit": partial(image_classifier, "vit", **TRANSFORMER),
    "deit": partial(image_classifier, "deit", architectures=["DeiTForImageClassification"], **TRANSFORMER),
    "beit": partial(image_classifier, "beit", use_relative_position_bias=True, **TRANSFORMER),
    "dinov2": partial(image_classifier, "dinov2", mlp_ratio=2, **{**TRANSFORMER, "intermediate_size": None}),
    "swin": partial(
        image_classifier, "swin", patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    ),
    "clip": partial(image_and_texts, "clip"),
    "siglip": partial(image_and_texts, "siglip"),
    "whisper": whisper,
    "wav2vec2": wav2vec2,
}
EAGER: dict[str, Maker] = {
    "gemma2": partial(decoder, "gemma2", sliding_window=4, **GROUPED),
    "bloom": partial(decoder, "bloom", inline_functions=True),  # its GELU is an autograd.Function
    "deberta": partial(encoder, "deberta", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": partial(encoder, "deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "mamba": partial(decoder, "mamba", state_size=4),
    "mamba2": partial(decoder, "mamba2", state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
}
TRANSFORMERS: dict[str, Callable[[], Entry]] = {
    **{
        f"{name}-{attention}": partial(make, attention)
        for name, make in BOTH.items()
        for attention in ("eager", "sdpa")
    },
    **{f"{name}-eager": partial(make, "eager") for name, make in EAGER.items()},
}
