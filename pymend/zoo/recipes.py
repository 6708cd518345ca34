"""How the small models of ``mini.py`` are made, as data: the one list of them.

Nothing here imports torch, so that the command line can name the models at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pymend.data.builders.claims import statements
from pymend.data.builders.questions import question_wordings
from pymend.data.facts import Relation

Wordings = Callable[[Relation], Sequence[str]]

WIDTH, HEADS, BLOCKS = 256, 4, 4  # blocks of each stack
NARROW = 128  # of models that learn too slowly at WIDTH, and of each expert
EXPERTS = 8  # of a block, two of which see a token
WIDE = 512  # many edits at once disturb each other less, the wider the weights are


def prompts(relation: Relation) -> tuple[str, ...]:
    """All that an edit of a fact may be worded as: prompts to complete, and plain questions."""
    return relation.patterns + question_wordings(relation)


@dataclass(frozen=True)
class Recipe:
    """How a small model is made.

    Args:
        auto: the class of transformers that builds it.
        config: its configuration, without the vocabulary's size; dropout is off, since it is to
            learn by heart.
        special: the tokenizer's special tokens by role, in the order of their ids.
        wordings: of a relation, what it is taught.
        frame: what stands around a text (``$A``).
        vocabulary: tokens, at most.
        steps: at most; training stops when ``enough`` of the facts are known.
        batch: rows of a step.
        lr: peak of the learning rate, after ``warmup`` steps and before a cosine to zero; lower
            where layers end in a norm (BART, BERT), which learn nothing at several times the rate.
        check: steps between two looks at what is known.
        passages: one step in so many reads whole passages; 0 for none.
        enough: share of facts, asked in one seen wording each.
        bar: share of the seen wordings asked at the end below which the model is not kept.
        subjects: only the first so many of every relation; 0 for all.
        edition: what is kept of another one is not taken for this.
    """

    auto: str
    config: Mapping[str, Any]
    special: Mapping[str, str]
    wordings: Wordings
    frame: str = "$A"
    vocabulary: int = 8000
    steps: int = 4000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 200
    check: int = 200
    passages: int = 0
    enough: float = 0.98
    bar: float = 0.95
    subjects: int = 0
    edition: int = 2


RECIPES = {
    "bart-mini": Recipe(
        auto="AutoModelForSeq2SeqLM",
        config={
            "model_type": "bart",
            "d_model": WIDE,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2 * HEADS,
            "decoder_attention_heads": 2 * HEADS,
            "encoder_ffn_dim": 4 * WIDE,
            "decoder_ffn_dim": 4 * WIDE,
            "max_position_embeddings": 128,
            "init_std": 0.035,
            "dropout": 0.0,
        },
        special={"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        wordings=prompts,
        frame="<s> $A </s>",
        steps=1000,
        lr=4e-4,
        enough=0.99,
        edition=3,
    ),
    "t5-mini": Recipe(
        auto="AutoModelForSeq2SeqLM",
        config={
            "model_type": "t5",
            "d_model": NARROW,
            "d_kv": NARROW // HEADS,
            "d_ff": 4 * NARROW,
            "num_layers": BLOCKS,
            "num_heads": HEADS,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        special={"pad": "<pad>", "eos": "</s>", "unk": "<unk>"},
        wordings=prompts,
        frame="$A </s>",
    ),
    "bert-mini": Recipe(
        auto="AutoModelForSequenceClassification",
        config={
            "model_type": "bert",
            "hidden_size": NARROW,
            "intermediate_size": 4 * NARROW,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "max_position_embeddings": 128,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "initializer_range": 0.05,
            "num_labels": 1,
        },
        special={
            "pad": "[PAD]",
            "cls": "[CLS]",
            "sep": "[SEP]",
            "mask": "[MASK]",
        },
        wordings=statements,
        frame="[CLS] $A [SEP]",
        steps=5000,
        lr=6e-4,
    ),
    "gpt2-mini": Recipe(
        auto="AutoModelForCausalLM",
        config={
            "model_type": "gpt2",
            "n_embd": WIDTH,
            "n_inner": 4 * WIDTH,
            "n_layer": BLOCKS,
            "n_head": HEADS,
            "n_positions": 256,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "initializer_range": 0.05,
        },
        special={role: "<|endoftext|>" for role in ("bos", "eos", "pad")},
        wordings=lambda relation: relation.patterns,
        steps=2600,
        passages=3,
    ),
    "moe-mini": Recipe(
        auto="AutoModelForCausalLM",
        config={
            "model_type": "qwen3_moe",
            "hidden_size": WIDTH,
            "moe_intermediate_size": NARROW,
            "num_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
            "num_hidden_layers": BLOCKS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "head_dim": WIDTH // HEADS,
            "max_position_embeddings": 256,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "pad_token_id": 0,
            "initializer_range": 0.05,
        },
        special={role: "<|endoftext|>" for role in ("bos", "eos", "pad")},
        wordings=lambda relation: relation.patterns,
        steps=2000,
        lr=2e-3,
        passages=3,
        edition=1,
    ),
}
