"""Models of the families that transformers knows, saved by it with random weights, in the program: logits of `detour
logits` against transformers (f32, eager), and what `detour verify` holds for any model (the same bits in every mode,
batch and thread count; counted operations equal the formula)."""
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import detour_e2e as e2e

SIZES = {"vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.2,
         "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LENGTHS = [90, 1, 33]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

# name -> (class of transformers, what its config says beside SIZES)
CASES = {
    "llama": ("Llama", {}),
    "llama_biases": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama_dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 3.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama_yarn": ("Llama", {"rope_parameters": YARN}),
    "llama_yarn_mscale": ("Llama", {"rope_parameters": YARN | {"mscale": 0.8, "mscale_all_dim": 1.2, "beta_fast": 8.0}}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2_sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "qwen3_sliding": ("Qwen3", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1,
                                "attention_bias": True}),
    "smollm3": ("SmolLM3", {"no_rope_layers": [1, 0, 1, 0]}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 30}),
    "qwen2_moe": ("Qwen2Moe", {"num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24,
                               "shared_expert_intermediate_size": 40, "decoder_sparse_step": 2}),
    "qwen3_moe": ("Qwen3Moe", {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 28,
                               "norm_topk_prob": True, "mlp_only_layers": [1]}),
}


def save(name, directory, dtype=torch.float32, **how):
    """The model of a case, with random biases and norms, as transformers writes it; and itself in float32."""
    prefix, keys = CASES[name]
    config = getattr(transformers, prefix + "Config")(**(SIZES | keys))
    config._attn_implementation = "eager"
    torch.manual_seed(5)
    model = getattr(transformers, prefix + "ForCausalLM")(config).eval().to(dtype)
    with torch.no_grad():
        for key, p in model.named_parameters():
            if p.dim() == 1:
                p.copy_(torch.randn_like(p) * 0.2 + ("norm" in key))
    model.save_pretrained(directory, **how)
    # Not model.float(): that would keep rotary frequencies rounded to half precision.
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32,
                                                             attn_implementation="eager").eval()


def tokens(directory):
    torch.manual_seed(7)
    ids = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int32)
    for b, n in enumerate(LENGTHS):
        ids[b, :n] = torch.randint(3, SIZES["vocab_size"], (n,))
    path = directory / "tokens.safetensors"
    save_file({"input_ids": ids, "lengths": torch.tensor(LENGTHS, dtype=torch.int32)}, path)
    return path, ids


def assert_equal_logits(model, directory, tmp_path):
    path, ids = tokens(tmp_path)
    out = tmp_path / "logits.safetensors"
    e2e.detour("logits", "--model", directory, "--tokens", path, "--out", out, "--threads", 1)
    logits = load_file(out)["logits"]
    for b, n in enumerate(LENGTHS):
        with torch.no_grad():
            expected = model(ids[b:b + 1, :n].long(), use_cache=False).logits[0]
        error = ((logits[b, :n] - expected).abs().max() / expected.abs().max()).item()
        assert error <= 1e-4, (n, error)


@pytest.mark.parametrize("name", CASES)
def test_logits(name, tmp_path):
    assert_equal_logits(save(name, tmp_path / "model"), tmp_path / "model", tmp_path)
    e2e.detour("verify", tmp_path / "model", "--tokens", 300)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_shards(dtype, tmp_path):
    model = save("qwen2_moe", tmp_path / "model", dtype, max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert_equal_logits(model, tmp_path / "model", tmp_path)
