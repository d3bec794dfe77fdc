"""PyTorch reference of a Llama-family decoder with DTRNet layers (arXiv 2509.00925).

An oracle, written to be read: no cache, no fused kernels, attention document by document over
gathered rows. It computes in the dtype of its parameters, so the same code in float64 is the
exact value that float32 results are judged by.

Weights are a dict named as in Hugging Face's Llama, plus
`model.layers.N.router.weight_predictor.{0,2}.{weight,bias}` on routed layers.
Shapes: B batch, T tokens, N = B*T flat rows, D model, H heads, G kv heads, K head dim.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

IGNORED = -100  # a target without loss


@dataclass(frozen=True)
class Config:
    """The keys of config.json that change what is computed."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    routed_layers: tuple[int, ...]
    aux_loss_coeff: float

    @staticmethod
    def from_dict(keys: Mapping) -> Config:
        """Reads Llama's old and new keys, `dtrnet_layers` (the dense ones) or `routing`."""
        rope = keys.get("rope_parameters") or keys.get("rope_scaling") or {}
        routing = keys.get("routing") or {"method": "dense"}
        _require(rope.get("rope_type", "default") == "default", f"rope {rope} is not supported")
        _require(keys.get("hidden_act", "silu") == "silu", "only hidden_act silu is supported")
        _require(not keys.get("attention_bias") and not keys.get("mlp_bias"), "biases: unsupported")
        _require(routing["method"] in ("dense", "dtrnet"), f"routing {routing} is not supported")
        num_layers = keys["num_hidden_layers"]
        if keys.get("routing") is None and "dtrnet_layers" in keys:
            dense = set(keys["dtrnet_layers"])
            routed = tuple(i for i in range(num_layers) if i not in dense)
            aux_loss_coeff = keys.get("aux_loss_coeff", 8e-4)
        else:
            routed = tuple(sorted(routing.get("layers", ())))
            _require(bool(routed) == (routing["method"] == "dtrnet"),
                     f"routing {routing}: dtrnet needs the routed layers as a list, dense has none")
            aux_loss_coeff = routing.get("aux_loss_coeff", 0.0)
        heads = keys["num_attention_heads"]
        return Config(
            vocab_size=keys["vocab_size"],
            hidden_size=keys["hidden_size"],
            intermediate_size=keys["intermediate_size"],
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=keys.get("num_key_value_heads") or heads,
            head_dim=keys.get("head_dim") or keys["hidden_size"] // heads,
            rms_norm_eps=keys.get("rms_norm_eps", 1e-6),
            rope_theta=float(rope.get("rope_theta", keys.get("rope_theta", 10000.0))),
            tied=keys.get("tie_word_embeddings", False),
            routed_layers=routed,
            aux_loss_coeff=aux_loss_coeff,
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's name and shape."""
        d, f = self.hidden_size, self.intermediate_size
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            layer = {
                "input_layernorm.weight": (d,),
                "self_attn.q_proj.weight": (query, d),
                "self_attn.k_proj.weight": (kv, d),
                "self_attn.v_proj.weight": (kv, d),
                "self_attn.o_proj.weight": (d, query),
                "post_attention_layernorm.weight": (d,),
                "mlp.gate_proj.weight": (f, d),
                "mlp.up_proj.weight": (f, d),
                "mlp.down_proj.weight": (d, f),
            }
            if i in self.routed_layers:
                layer |= {
                    "router.weight_predictor.0.weight": (d // 2, d),
                    "router.weight_predictor.0.bias": (d // 2,),
                    "router.weight_predictor.2.weight": (2, d // 2),
                    "router.weight_predictor.2.bias": (2,),
                }
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (d,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes


@dataclass
class Forward:
    """What one forward pass computed; per-layer entries of routed layers are keyed by layer."""

    logits: Tensor  # [B,T,V]
    layer_outputs: list[Tensor]  # [B,T,D] each: the residual stream after the layer
    router_probs: dict[int, Tensor] = field(default_factory=dict)  # [B,T,2]
    routed: dict[int, Tensor] = field(default_factory=dict)  # bool [B,T]
    aux_loss: Tensor | None = None  # scalar, training only: sum_l f_l mean(p0_l) / sum_l f_l


class Model:
    """A decoder: its config and its parameters by name."""

    def __init__(self, config: Config, params: Mapping[str, Tensor], dtype=torch.float32) -> None:
        shapes = config.shapes()
        params = dict(params)
        if config.tied:
            params.pop("lm_head.weight", None)
        got = {name: tuple(p.shape) for name, p in params.items()}
        wrong = sorted(n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n))
        _require(not wrong, f"tensors missing, unexpected or of a wrong shape: {wrong}")
        self.config = config
        self.params = {n: params[n].detach().to(dtype, copy=True) for n in shapes}
        self.dtype = dtype

    @staticmethod
    def load(directory: Path | str, dtype=torch.float32) -> Model:
        """Reads config.json and model.safetensors (or its shards) of a model directory."""
        directory = Path(directory)
        config = Config.from_dict(json.loads((directory / "config.json").read_text()))
        index = directory / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        params: dict[str, Tensor] = {}
        for name in files:
            params |= load_file(directory / name)
        return Model(config, params, dtype)

    def forward(
        self,
        input_ids: Tensor,
        document_ids: Tensor | None = None,
        *,
        train: bool = False,
        fallback_rows: Mapping[int, Tensor] | None = None,
    ) -> Forward:
        """Computes the logits of input_ids [B,T].

        With document_ids [B,T] each run of equal ids in a sequence is a document: attention stays
        inside it and positions restart; without, each sequence is one document. In training, a
        layer that routes no row routes fallback_rows[layer] (flat rows b*T+t), if given.
        """
        cfg, p = self.config, self.params
        batch, length = input_ids.shape
        documents = _documents(input_ids, document_ids)
        positions = torch.cat([torch.arange(len(rows)) for rows in documents])
        cos, sin = self._rope(positions)
        x = p["model.embed_tokens.weight"][input_ids.reshape(-1).long()]
        out = Forward(logits=x, layer_outputs=[])
        for i in range(cfg.num_layers):
            prefix = f"model.layers.{i}."
            w = {n.removeprefix(prefix): t for n, t in p.items() if n.startswith(prefix)}
            h = self._norm(x, w["input_layernorm.weight"])
            if i in cfg.routed_layers:
                probs = _router(x, w)
                routed = probs[:, 0] > 0.5
                if train and not routed.any() and i in (fallback_rows or {}):
                    routed = torch.zeros_like(routed)
                    routed[fallback_rows[i].long()] = True
                attended = self._attention(h, w, cos, sin, documents, routed)
                value = h @ w["self_attn.v_proj.weight"].T
                value = self._repeat_kv(value.view(len(x), cfg.num_kv_heads, cfg.head_dim))
                bypassed = value.flatten(1) @ w["self_attn.o_proj.weight"].T
                p_attend, p_bypass = probs[:, :1], probs[:, 1:]
                x = x + torch.where(routed[:, None], p_attend * attended, p_bypass * bypassed)
                out.router_probs[i] = probs.view(batch, length, 2)
                out.routed[i] = routed.view(batch, length)
            else:
                everyone = torch.ones(len(x), dtype=torch.bool)
                x = x + self._attention(h, w, cos, sin, documents, everyone)
            h = self._norm(x, w["post_attention_layernorm.weight"])
            gate = F.silu(h @ w["mlp.gate_proj.weight"].T)
            x = x + (gate * (h @ w["mlp.up_proj.weight"].T)) @ w["mlp.down_proj.weight"].T
            out.layer_outputs.append(x.view(batch, length, -1))
        head = p["model.embed_tokens.weight" if cfg.tied else "lm_head.weight"]
        logits = self._norm(x, p["model.norm.weight"]) @ head.T
        out.logits = logits.view(batch, length, -1)
        if train:
            out.aux_loss = self._aux_loss(out)
        return out

    def gradients(
        self,
        input_ids: Tensor,
        targets: Tensor,
        document_ids: Tensor | None = None,
        fallback_rows: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], Forward]:
        """Training loss = mean cross-entropy + coefficient * aux; its gradient by parameter."""
        for p in self.params.values():
            p.requires_grad_(True)
            p.grad = None
        out = self.forward(input_ids, document_ids, train=True, fallback_rows=fallback_rows)
        loss = cross_entropy(out.logits, targets) + self.config.aux_loss_coeff * out.aux_loss
        loss.backward()
        # A parameter that no row used (the queries of a layer that routed none) has gradient zero.
        grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for name, p in self.params.items()
        }
        return loss.detach(), grads, out

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin [N,K] of each row's angles, the two halves of K alike."""
        k = self.config.head_dim
        exponents = torch.arange(0, k, 2, dtype=self.dtype) / k
        angles = positions[:, None].to(self.dtype) * (1.0 / self.config.rope_theta**exponents)
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        variance = x.square().mean(-1, keepdim=True)
        return weight * (x * torch.rsqrt(variance + self.config.rms_norm_eps))

    def _repeat_kv(self, x: Tensor) -> Tensor:
        """[rows,G,K] -> [rows,H,K]: query head j reads kv head j // (H/G)."""
        return x.repeat_interleave(self.config.num_heads // self.config.num_kv_heads, dim=1)

    def _attention(
        self,
        h: Tensor,
        w: Mapping[str, Tensor],
        cos: Tensor,
        sin: Tensor,
        documents: list[Tensor],
        routed: Tensor,
    ) -> Tensor:
        """W_O Attn among the routed rows of each document, [N,D]; zero on the other rows."""
        cfg = self.config
        out = torch.zeros_like(h)
        for rows in documents:
            rows = rows[routed[rows]]
            n = len(rows)
            if n == 0:
                continue
            q = (h[rows] @ w["self_attn.q_proj.weight"].T).view(n, cfg.num_heads, cfg.head_dim)
            k = (h[rows] @ w["self_attn.k_proj.weight"].T).view(n, cfg.num_kv_heads, cfg.head_dim)
            v = (h[rows] @ w["self_attn.v_proj.weight"].T).view(n, cfg.num_kv_heads, cfg.head_dim)
            c, s = cos[rows, None], sin[rows, None]
            q, k = _rotate(q, c, s), _rotate(k, c, s)
            k, v = self._repeat_kv(k), self._repeat_kv(v)
            scores = torch.einsum("qhk,shk->hqs", q, k) * cfg.head_dim**-0.5
            future = torch.ones(n, n, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            mixed = torch.einsum("hqs,shk->qhk", weights, v).flatten(1)
            out = out.index_copy(0, rows, mixed @ w["self_attn.o_proj.weight"].T)
        return out

    def _aux_loss(self, out: Forward) -> Tensor:
        """sum_l f_l mean(p0_l) / sum_l f_l; the routed fractions f_l carry no gradient."""
        total, weight = torch.zeros((), dtype=self.dtype), 0.0
        for i, probs in out.router_probs.items():
            fraction = out.routed[i].double().mean().item()
            total = total + fraction * probs[..., 0].mean()
            weight += fraction
        return total / weight if weight > 0 else total


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the rows with a target >= 0; targets [B,T] are already shifted."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=IGNORED)


def next_token_targets(input_ids: Tensor, document_ids: Tensor | None = None) -> Tensor:
    """targets i32 [B,T]: the next token, IGNORED at the end of a document or sequence."""
    targets = torch.full_like(input_ids, IGNORED)
    targets[:, :-1] = input_ids[:, 1:]
    if document_ids is not None:
        targets[:, :-1][document_ids[:, 1:] != document_ids[:, :-1]] = IGNORED
    return targets


def _router(x: Tensor, w: Mapping[str, Tensor]) -> Tensor:
    """softmax(W2 SiLU(W1 x + b1) + b2) [N,2] of the un-normalised layer input; column 0 attends."""
    hidden = F.silu(F.linear(x, w["router.weight_predictor.0.weight"],
                             w["router.weight_predictor.0.bias"]))
    return F.linear(hidden, w["router.weight_predictor.2.weight"],
                    w["router.weight_predictor.2.bias"]).softmax(-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _documents(input_ids: Tensor, document_ids: Tensor | None) -> list[Tensor]:
    """The flat rows of each document, in order."""
    batch, length = input_ids.shape
    ids = torch.zeros_like(input_ids) if document_ids is None else document_ids
    documents = []
    for b in range(batch):
        cuts = (ids[b, 1:] != ids[b, :-1]).nonzero().flatten() + 1
        edges = [0, *cuts.tolist(), length]
        documents += [b * length + torch.arange(s, e) for s, e in zip(edges, edges[1:])]
    return documents


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
