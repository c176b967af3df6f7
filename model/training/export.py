"""From a trained module to a checkpoint directory in the Hugging Face layout."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from model.training.data import END_OF_TEXT
from model.transformer import Transformer


def write_checkpoint(model: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """config.json, generation_config.json, tokenizer.json and model.safetensors (bf16),
    named as a Llama checkpoint is."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    end_id = tokenizer.token_to_id(END_OF_TEXT)
    (folder / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": config.vocab_size,
                "hidden_size": config.hidden_size,
                "intermediate_size": config.intermediate_size,
                "num_hidden_layers": config.num_layers,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "head_dim": config.head_dim,
                "max_position_embeddings": config.max_positions,
                "rms_norm_eps": config.norm_eps,
                "rope_theta": config.rope_theta,
                "hidden_act": "silu",
                "attention_bias": False,
                "mlp_bias": False,
                "tie_word_embeddings": config.tie_embeddings,
                "bos_token_id": end_id,
                "eos_token_id": end_id,
                "torch_dtype": "bfloat16",
            },
            indent=2,
        )
        + "\n"
    )
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": end_id, "eos_token_id": end_id}, indent=2) + "\n"
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    weights = llama_weights(model)
    save_file(
        {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def llama_weights(model: Transformer) -> dict[str, torch.Tensor]:
    """The module's parameters under the names of a Llama checkpoint, fused ones split."""
    config = model.config
    weights = {
        "model.embed_tokens.weight": model.embedding.weight.detach(),
        "model.norm.weight": model.final_norm.get_parameter("weight").detach(),
    }
    if not config.tie_embeddings:
        weights["lm_head.weight"] = model.lm_head.weight.detach()
    qkv_sizes = (config.query_size, config.kv_size, config.kv_size)
    for layer, block in enumerate(model.blocks):
        prefix = f"model.layers.{layer}."
        q, k, v = block.get_parameter("attention.qkv.weight").detach().split(qkv_sizes)
        gate, up = block.get_parameter("mlp.gate_up.weight").detach().chunk(2)
        weights |= {
            prefix + "input_layernorm.weight": block.get_parameter("attention_norm.weight"),
            prefix + "self_attn.q_proj.weight": q,
            prefix + "self_attn.k_proj.weight": k,
            prefix + "self_attn.v_proj.weight": v,
            prefix + "self_attn.o_proj.weight": block.get_parameter("attention.out.weight"),
            prefix + "post_attention_layernorm.weight": block.get_parameter("mlp_norm.weight"),
            prefix + "mlp.gate_proj.weight": gate,
            prefix + "mlp.up_proj.weight": up,
            prefix + "mlp.down_proj.weight": block.get_parameter("mlp.down.weight"),
        }
    return {name: tensor.detach() for name, tensor in weights.items()}


def draw_loss_curve(log: Path, picture: Path) -> None:
    """Training and held-out loss against steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    # A resumed run repeats the steps after its last save: the later record counts.
    records = {r["step"]: r for r in map(json.loads, log.read_text().splitlines())}
    steps = sorted(records)
    held_out = [s for s in steps if "held_out_loss" in records[s]]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, [records[s]["loss"] for s in steps], lw=0.5, alpha=0.6, label="training")
    axes.plot(held_out, [records[s]["held_out_loss"] for s in held_out], "o-", label="held out")
    axes.set(xlabel="step", ylabel="loss, nats per token", ylim=(1.0, 6.0))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(picture, dpi=120)
    plt.close(figure)
