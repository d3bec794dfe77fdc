"""PyTorch reference of a Llama decoder with any routing method: dtrnet, mod, dllm, moe, skip, early_exit, blocks, and
lists of them; recursion.

An oracle, written to be read: one document at a time, every row through every way, masks and weights say what counts.
No cache, no gathered rows. It computes in the dtype that it is loaded with, so that float64 gives the value which
float32 results are judged by. Gradients come from autograd; what draws random numbers (Gumbel noise, jitter, the random
control, fallback rows) or depends on the order of documents (expert capacity) is refused or left out.

    model = load("model/", torch.float64)
    model.forward(ids, "infer")         # logits, and per router what it said of each row
    model.loss(documents, targets)      # one training step's losses; .total.backward() gives the gradients

A span (the layer, its attention, or its MLP) adds `take` times its increment and `leave` times what the bypass adds:

    prob_gate  p, 1 - p of the way taken; 0 for the other
    ste        1 and 0, with the gradients of p and 1 - p
    soft       in training p and 1 - p on every row; hard otherwise
    mod        r on the chosen rows

Config and decisions are in reference_config.py, Mixture-of-Recursions in reference_recursion.py.

Shapes: T tokens of a document, D model, H heads, G kv heads, K head dim, E experts, C ways of a router, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from reference_config import Config, Decision, Method, ROUTERS, Route, require
from reference_recursion import Recursion
from safetensors.torch import load_file
from torch import Tensor

MODES = ("infer", "teacher_forced", "train")


@dataclass(frozen=True)
class Exit:
    """When a row stops: after the first layer from `first` on that is sure enough, the last one apart."""

    measure: str  # "margin" of the two largest probabilities, or "state": cosine of the layer's input and output
    threshold: float
    first: int = 0


@dataclass
class Forward:
    logits: Tensor  # [T,V]
    depth: Tensor  # int [T]: layers that a row took before it stopped
    routes: dict[str, Route] = field(default_factory=dict)  # by router name
    states: list[Tensor] = field(default_factory=list)  # [T,D] after every layer, recursive ones left out
    sure: list[Tensor] = field(default_factory=list)  # what exits compared with the threshold


@dataclass
class Loss:
    """Of one training step."""

    loss: Tensor  # mean cross-entropy
    aux_loss: Tensor  # the budgets' values, summed over methods, before their weights
    total: Tensor  # what is differentiated: also penalties of single routers, and losses at exits
    outs: list[Forward]  # of the documents


class Model:
    """A decoder: its config and its parameters by name."""

    def __init__(self, config: Config, params: Mapping[str, Tensor], dtype=torch.float32) -> None:
        shapes = config.shapes()
        got = {name: tuple(p.shape) for name, p in params.items()}
        wrong = sorted(n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n))
        require(not wrong, f"tensors missing, unexpected or of a wrong shape: {wrong}")
        self.config, self.dtype = config, dtype
        self.params = {name: params[name].detach().to(dtype, copy=True).requires_grad_() for name in shapes}

    def forward(self, ids: Tensor, mode: str = "infer", exit: Exit | None = None) -> Forward:
        """Logits of one document, ids [T]. A row that stops keeps its state, and layers above write its keys."""
        require(mode in MODES, f"mode {mode}: expected one of {MODES}")
        layers, recursion = self.config.num_layers, self.config.method("recursion")
        require(not exit or not recursion, "exits from recursions are not computed here")
        out = Forward(logits=ids, depth=torch.full((len(ids),), layers))
        x = self.params["model.embed_tokens.weight"][ids.long()]
        going = torch.ones(len(ids), dtype=torch.bool)
        for i in range(layers):
            if recursion and i in recursion.layers:
                if i == recursion.layers[0]:
                    x = Recursion(self, recursion).run(x, ids, mode, out.routes)
                continue
            y = torch.where(going[:, None], self._layer(i, x, ids, mode, out.routes), x)
            out.states.append(y)
            if exit and exit.first <= i < layers - 1:
                sure = self._sure(exit.measure, x, y)
                out.sure.append(sure[going])
                out.depth[going & (sure >= exit.threshold)] = i + 1
                going = out.depth == layers
            x = y
        out.logits = self._head(x)
        return out

    def loss(self, documents: Sequence[Tensor], targets: Sequence[Tensor], mode: str = "train", step: int = 0,
             steps: int = 1) -> Loss:
        """Mean next-token loss over the documents, and what budgets add; targets are already shifted."""
        outs = [self.forward(ids, mode) for ids in documents]
        labels = torch.cat(list(targets)).long()
        loss = F.cross_entropy(torch.cat([out.logits for out in outs]), labels)
        routes = {name: [out.routes[name] for out in outs] for name in outs[0].routes}
        aux_loss, total = torch.zeros((), dtype=self.dtype), loss
        if (method := self.config.method("early_exit")) and mode == "train":
            total = self._exit_loss(method, outs, labels, step, steps)
        for method in self.config.methods:
            budget = self._budget(method, routes)
            aux_loss = aux_loss + budget
            total = total + method.options.get("aux_loss_coeff", 0.0) * budget
        for parts in routes.values():  # mean over tokens, sum over routers
            total = total + sum((r.decision.penalty * r.reached).sum() for r in parts) / len(labels)
        return Loss(loss, aux_loss, total, outs)

    def gradients(self, documents: Sequence[Tensor], targets: Sequence[Tensor], step: int = 0,
                  steps: int = 1) -> tuple[Loss, dict[str, Tensor]]:
        """The losses of a training step (counted from 0), and the gradient of `total` by parameter."""
        loss = self.loss(documents, targets, "train", step, steps)
        grads = torch.autograd.grad(loss.total, list(self.params.values()), allow_unused=True)
        return loss, {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.params.items(), grads)}

    # Exits

    def _sure(self, measure: str, x: Tensor, y: Tensor) -> Tensor:
        """How sure rows [T] are after the layer that made y of x."""
        if measure == "state":
            return F.cosine_similarity(x, y, -1)
        best = self._head(y).softmax(-1).topk(2).values
        return best[:, 0] - best[:, 1]

    def _exit_loss(self, method: Method, outs: Sequence[Forward], labels: Tensor, step: int, steps: int) -> Tensor:
        """Mean of the losses after the layers that the curriculum lets in, and after the last one."""
        require(method["max_dropout"] == 0, "layer dropout draws random numbers")
        top, scale = self.config.num_layers - 1, method["exit_scale"]
        on = {"rotational": lambda i: i % method["rotation"] == step % method["rotation"],
              "gradual": lambda i: step >= (top - i) * steps / (2 * (top + 1)),
              "all": lambda i: True}[method["curriculum"]]
        weights = {i: scale * sum(range(i + 1)) for i in range(top) if on(i)} | {top: top + scale * sum(range(top))}
        losses = [w * F.cross_entropy(self._head(torch.cat([out.states[i] for out in outs])), labels)
                  for i, w in weights.items()]
        return sum(losses) / sum(weights.values())

    # One layer

    def _layer(self, i: int, x: Tensor, ids: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        everyone = torch.ones(len(x), dtype=torch.bool)
        layer = self._decide(i, "layer", x, x, ids, everyone, mode, routes)
        return x + _rows(layer.take) * (self.block(i, x, layer, ids, mode, routes) - x)

    def block(self, i: int, x: Tensor, layer: Decision, ids: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        """Attention and MLP on x [T,D], for the rows that `layer` lets in."""
        reached = torch.ones(len(x), dtype=torch.bool) & layer.enter
        mixer = self._decide(i, "mixer", x, x, ids, reached, mode, routes)
        y = x + _rows(mixer.take) * self._attention(i, x, layer, mixer) + _rows(mixer.leave) * self._bypass(
            i, x, layer, mixer)
        prefix = f"model.layers.{self.config.weights_layer(i)}."
        h = self._norm(y, prefix + "post_attention_layernorm.weight")
        ffn = self._decide(i, "ffn", x, h, ids, reached, mode, routes)
        if ffn.experts is None:
            return y + _rows(ffn.take) * self._swiglu(h, prefix + "mlp.", "gate_proj", "down_proj", "up_proj")
        return y + self._experts(i, h, ffn.experts)

    def _attention(self, i: int, x: Tensor, layer: Decision, mixer: Decision, bypassed: bool = False) -> Tensor:
        """W_O Attn [T,D] of all rows, as if each was routed, or as if each was bypassed."""
        held = f"model.layers.{self.config.weights_layer(i)}."
        cfg, prefix, length = self.config, held + "self_attn.", len(x)
        h = self._norm(x, held + "input_layernorm.weight")
        q = (h @ self.params[prefix + "q_proj.weight"].T).view(length, cfg.num_heads, cfg.head_dim)
        k = (h @ self.params[prefix + "k_proj.weight"].T).view(length, cfg.num_kv_heads, cfg.head_dim)
        v = (h @ self.params[prefix + "v_proj.weight"].T).view(length, cfg.num_kv_heads, cfg.head_dim)
        group = cfg.num_heads // cfg.num_kv_heads
        q, k = self._rope(q), self._rope(k).repeat_interleave(group, 1)
        scores = torch.einsum("qhk,shk->hqs", q, k) / math.sqrt(cfg.head_dim)
        rows = torch.arange(length)
        scores = scores.masked_fill(rows[None, :] > rows[:, None], -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp()
        weights = weights * self._counts(i, q, k, layer, mixer, bypassed)
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)  # no key at all: 0
        mixed = torch.einsum("hqs,shk->qhk", weights, v.repeat_interleave(group, 1)).flatten(1)
        return mixed @ self.params[prefix + "o_proj.weight"].T

    def _counts(self, i: int, q: Tensor, k: Tensor, layer: Decision, mixer: Decision, bypassed: bool) -> Tensor:
        """How often each key counts for each query [T,T] or, if that depends on the head, [H,T,T]."""
        ones = q.new_ones(len(q))
        back = torch.arange(len(q))[:, None] - torch.arange(len(q))  # how far behind the query the key is

        def written(decision: Decision) -> Tensor:
            return (back > 0) * (ones * decision.keys) + torch.diag(ones * decision.own_key)

        blocks = next((m for m in self.config.methods if m.name == "blocks" and i in m.layers), None)
        if blocks:
            return written(layer) * self._blocks(blocks, q, k, back, layer)
        method = self.config.method_of(i, "mixer")
        if method and method["bypass"] == "window":
            kept = torch.arange(len(q)) < method["sink"]
            if not bypassed:
                kept = kept | (ones * mixer.keys).bool()
            return written(layer) * ((back >= 0) & ((back < method["window"]) | kept))
        return written(layer) * written(mixer)

    def _blocks(self, method: Method, q: Tensor, k: Tensor, back: Tensor, layer: Decision) -> Tensor:
        """Keys of MoBA, bool [H,T,T]: of the query's own block, and of the best earlier ones. Blocks are of rows that
        write keys."""
        require(method["decider"] == "learned", f"blocks with decider {method['decider']} is not computed here")
        writes = (q.new_ones(len(q)) * layer.keys).bool()
        block = (writes.cumsum(0) - 1).clamp(min=0) // method["block_size"]
        number = torch.arange(int(block[-1]) + 1)
        means = torch.stack([k[(block == n) & writes].mean(0) for n in number])
        scores = torch.einsum("qhk,nhk->hqn", q, means).detach()
        earlier = number < block[:, None]
        order = scores.masked_fill(~earlier, -math.inf).argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :method["top_k"] - 1], True)
        seen = chosen & earlier | (number == block[:, None])
        return seen[..., block] & (back >= 0)

    def _bypass(self, i: int, x: Tensor, layer: Decision, mixer: Decision) -> Tensor:
        """What rows get that do not attend [T,D]."""
        method = self.config.method_of(i, "mixer")
        if method and method["bypass"] == "window":
            return self._attention(i, x, layer, mixer, bypassed=True)
        return self._value_way(i, x)

    def _value_way(self, i: int, x: Tensor) -> Tensor:
        """What the value bypass adds: W_O repeat_kv(W_V h), and a constant with it; the identity bypass nothing."""
        method = self.config.method_of(i, "mixer")
        if method is None or method["bypass"] == "identity":
            return torch.zeros_like(x)
        held = f"model.layers.{self.config.weights_layer(i)}."
        cfg, prefix = self.config, held + "self_attn."
        h = self._norm(x, held + "input_layernorm.weight")
        v = (h @ self.params[prefix + "v_proj.weight"].T).view(len(x), cfg.num_kv_heads, cfg.head_dim)
        v = v.repeat_interleave(cfg.num_heads // cfg.num_kv_heads, 1)
        own = f"model.layers.{i}.{ROUTERS[method.name]['mixer']}bypass_"
        if method.options.get("value_scale"):
            v = v * self.params[own + "scale"][:, None]
        value = v.flatten(1) @ self.params[prefix + "o_proj.weight"].T
        return value + self.params[own + "constant"] if method["bypass"] == "constant" else value

    def _experts(self, i: int, h: Tensor, weights: Tensor) -> Tensor:
        prefix = f"model.layers.{i}."
        y = torch.zeros_like(h)
        if prefix + "mlp.gate_proj.weight" in self.params:
            y = y + self._swiglu(h, prefix + "mlp.", "gate_proj", "down_proj", "up_proj")
        for e in range(weights.shape[1]):
            y = y + weights[:, e:e + 1] * self._swiglu(h, f"{prefix}block_sparse_moe.experts.{e}.", "w1", "w2", "w3")
        return y

    def _swiglu(self, h: Tensor, prefix: str, gate: str, down: str, up: str) -> Tensor:
        w = {name: self.params[f"{prefix}{name}.weight"] for name in (gate, down, up)}
        return (F.silu(h @ w[gate].T) * (h @ w[up].T)) @ w[down].T

    def _head(self, x: Tensor) -> Tensor:
        """Logits [T,V] of states [T,D]."""
        head = self.params["model.embed_tokens.weight" if self.config.tied else "lm_head.weight"]
        return self._norm(x, "model.norm.weight") @ head.T

    def _norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        eps = self.config.rms_norm_eps if eps is None else eps
        return self.params[name] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def _rope(self, x: Tensor) -> Tensor:
        """x [T,heads,K] turned by its positions; a dimension is paired with the one K/2 further on."""
        half = x.shape[-1] // 2
        frequencies = self.config.rope_theta ** (-torch.arange(half, dtype=self.dtype) / half)
        angles = (torch.arange(len(x), dtype=self.dtype)[:, None] * frequencies)[:, None, :]
        a, b = x[..., :half], x[..., half:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    # Decisions

    def _decide(self, i: int, site: str, x: Tensor, h: Tensor, ids: Tensor, reached: Tensor, mode: str,
                routes: dict[str, Route]) -> Decision:
        """The decision of the span's router, noted in `routes`; without a router every row takes it."""
        method = self.config.method_of(i, site)
        if method is None:
            return Decision(probs=x.new_ones(len(x), 1), routed=torch.ones(len(x), dtype=torch.bool))
        prefix = f"model.layers.{i}.{ROUTERS[method.name][site]}"
        if method["decider"] != "learned":
            decision = self._control(method, prefix, ids)
        elif method.name == "mod":
            decision = self._mod(method, prefix, x, mode)
        elif method.name == "moe":
            decision = self._moe(method, prefix, h, mode)
        else:
            decision = self._gate(method, prefix, x, mode)
        routes[self.config.routers()[i, site]] = Route(reached, decision)
        return decision

    def _gate(self, method: Method, prefix: str, x: Tensor, mode: str) -> Decision:
        """A two-way gate with estimators. Reserved rows take the span whatever the router says."""
        estimator = method["estimator"]
        require(mode != "train" or estimator != "gumbel_ste", "training with gumbel_ste draws random numbers")
        difference = self._score(prefix, method["scorer"], x)
        p = difference.sigmoid()
        reserved = torch.arange(len(x)) < method["reserved"]
        routed = (p > 0.5) | reserved
        hard = routed.to(self.dtype)
        decision = Decision(torch.stack([p, (-difference).sigmoid()], 1).detach(), routed)
        if estimator == "prob_gate":
            decision.gate = p
            decision.take, decision.leave = hard * p, (1 - hard) * (1 - p)
        elif mode != "train":
            decision.take, decision.leave = hard, 1 - hard
        elif estimator == "soft":
            decision.gate = decision.take = torch.where(reserved, 1.0, p)
            decision.leave = 1 - decision.take
            if method["soft_keys"]:
                decision.keys = decision.own_key = decision.gate
            return decision
        else:
            # Nothing is decided about a reserved row, so that it has no gradient.
            decision.gate = torch.where(reserved, 1.0, hard + (p - p.detach()))
            decision.take, decision.leave = decision.gate, 1 - decision.gate
        decision.enter = routed
        if method["kv"] == "executed":
            counted = estimator == "ste" and mode == "train" and method["key_gradient"]
            decision.keys = decision.gate if counted else hard
            decision.own_key = routed
        return decision

    def _score(self, prefix: str, scorer: str, x: Tensor) -> Tensor:
        """logit(take) - logit(leave) [T]."""
        w = {n.removeprefix(prefix + "weight_predictor."): p for n, p in self.params.items() if n.startswith(prefix)}
        if scorer == "linear":
            logits = x @ w["0.weight"].T + w["0.bias"]
        elif scorer == "mlp":
            logits = F.silu(x @ w["0.weight"].T + w["0.bias"]) @ w["2.weight"].T + w["2.bias"]
        else:  # D-LLM: column 1 takes the span
            hidden = self._norm(x @ w["0.weight"].T + w["0.bias"], prefix + "weight_predictor.norm.weight")
            return (F.silu(hidden) @ w["2.weight"].T + w["2.bias"]) @ x.new_tensor([-1.0, 1.0])
        return logits[:, 0] - logits[:, 1]

    def _mod(self, method: Method, prefix: str, x: Tensor, mode: str) -> Decision:
        """Top-k of the document with weight r, or, when serving, the causal rule's rows."""
        r = (x @ self.params[prefix + "weight"].T)[:, 0]
        causal = None
        if method["causal"] == "bce":
            causal = r + self.params[prefix + "causal_bias"]
        elif method["causal"] == "predictor":
            causal = self._score(prefix + "predictor.", "mlp", x.detach())
        require(mode != "infer" or causal is not None, "causal none: this model does not serve")
        if mode == "infer":
            routed = causal > 0
        else:
            k = math.ceil(round(method["capacity"] * len(x), 6))
            routed = torch.zeros(len(x), dtype=torch.bool)
            routed[r.argsort(descending=True, stable=True)[:k]] = True
        hard = routed.to(self.dtype)
        logit = (r if causal is None else causal).detach()
        decision = Decision(torch.stack([logit, -logit], 1).sigmoid(), routed, take=hard * r, keys=hard, own_key=routed,
                            enter=routed)
        if mode != "infer" and causal is not None:
            decision.causal = causal > 0
            decision.penalty = method["causal_coeff"] * F.binary_cross_entropy_with_logits(causal, hard,
                                                                                           reduction="none")
        return decision

    def _moe(self, method: Method, prefix: str, h: Tensor, mode: str) -> Decision:
        """Experts of the highest probability (plus bias), weighted with it, or with its part of the chosen ones'."""
        require(mode != "train" or method["jitter"] == method["capacity_factor"] == 0,
                 "training with jitter or expert capacity is not computed here")
        logits = h @ self.params[prefix + "gate.weight"].T
        probs = logits.softmax(-1)
        bias = self.params[prefix + "expert_bias"].detach() if method["bias_rate"] > 0 else 0.0
        order = (probs.detach() + bias).argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(probs, dtype=torch.bool).scatter(1, order[:, :method["top_k"]], True)
        weights = probs * chosen
        if method["normalize"]:
            weights = weights / weights.sum(-1, keepdim=True)
        decision = Decision(probs, torch.ones(len(h), dtype=torch.bool), experts=weights, chosen=chosen)
        if mode == "train":
            decision.penalty = method["z_loss_coeff"] * logits.logsumexp(-1).square()
        return decision

    def _control(self, method: Method, prefix: str, ids: Tensor) -> Decision:
        """A decider that knows no content: rows have weight 1, and there is nothing to learn."""
        require(method.name != "moe" and method["decider"] in ("every_nth", "frequency"),
                 f"{method.name} with decider {method['decider']} is not computed here")
        share = method["share"]
        if method["decider"] == "every_nth":
            scores = [t * share - math.floor(t * share) for t in range(len(ids))]
        else:
            scores = self.params[prefix + "token_quantile"][ids.long()].tolist()
        routed = torch.tensor([score < share for score in scores], dtype=torch.bool)
        routed |= torch.arange(len(ids)) < method.options.get("reserved", 0)
        hard = routed.to(self.dtype)
        keep_all = method.options.get("kv") == "all"
        return Decision(torch.stack([hard, 1 - hard], 1), routed, take=hard, leave=1 - hard, enter=routed,
                        keys=1.0 if keep_all else hard, own_key=True if keep_all else routed)

    # Budgets

    def _budget(self, method: Method, routes: Mapping[str, list[Route]]) -> Tensor:
        """The method's budget over all documents, before its weight."""
        names = {(i, site): name for (i, site), name in self.config.routers().items()
                 if self.config.method_of(i, site) is method}
        zero = torch.zeros((), dtype=self.dtype)
        if not names or method["decider"] != "learned":
            return zero
        if method.name == "recursion":
            return self._balance(routes[f"layer{method.layers[0]}"]) if method["choice"] == "token" else zero
        if method.name == "moe":
            return sum(self._balance(routes[name]) for name in names.values())
        budget, target = method.options.get("budget", "none"), method.options.get("budget_target", 0.0)
        require(budget != "compute", "the compute budget is not computed here")
        if budget == "none" or any(r.decision.gate is None for name in names.values() for r in routes[name]):
            return zero
        gates = {key: torch.cat([r.decision.gate[r.reached] for r in routes[name]]) for key, name in names.items()}
        if budget == "mean_prob":
            shares = {key: torch.cat([r.routed for r in routes[name]]).to(self.dtype).mean()
                      for key, name in names.items()}
            total = sum(shares.values())
            return sum(shares[key] * gates[key].mean() for key in names) / total if total > 0 else zero
        if budget == "target_token_l1":
            return self._token_budget(method, names, routes)
        excess = torch.cat(list(gates.values())).mean() - target
        return excess.abs() if budget == "target_l1" else excess.square()

    def _token_budget(self, method: Method, names: Mapping, routes: Mapping[str, list[Route]]) -> Tensor:
        """Mean over tokens, reserved ones left out, of |mean over all layers - target|; a layer without gate is 1."""
        off = []
        for d in range(len(next(iter(routes.values())))):
            layers = []
            for i in range(self.config.num_layers):
                gates = [routes[name][d].decision.gate for (layer, _), name in names.items() if layer == i]
                layers.append(sum(gates) / len(gates) if gates else None)
            length = len(next(g for g in layers if g is not None))
            mean = sum(torch.ones(length, dtype=self.dtype) if g is None else g for g in layers) / len(layers)
            off.append((mean - method["budget_target"]).abs()[method["reserved"]:])
        return torch.cat(off).mean()

    def _balance(self, parts: Sequence[Route]) -> Tensor:
        """E sum_e f_e P_e: f the expert's part of all choices (no gradient), P its mean probability over tokens."""
        chosen = torch.cat([r.decision.chosen[r.reached] for r in parts]).sum(0).to(self.dtype)
        probs = torch.cat([r.probs if r.decision.choice_probs is None else r.decision.choice_probs
                           for r in parts]).mean(0)
        return len(chosen) * (chosen / chosen.sum() * probs).sum()


def load(directory: Path | str, dtype=torch.float32) -> Model:
    """The model of a directory with config.json and model.safetensors."""
    directory = Path(directory)
    config = Config.from_dict(json.loads((directory / "config.json").read_text()))
    params = load_file(directory / "model.safetensors")
    if config.tied:
        params.pop("lm_head.weight", None)
    return Model(config, params, dtype)


def grad_norm(grads: Mapping[str, Tensor]) -> float:
    """Euclidean norm over all parameters."""
    return math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))


def _rows(weight: Tensor | float) -> Tensor | float:
    """A weight per row as a column, to multiply [T,D] with."""
    return weight[:, None] if isinstance(weight, Tensor) else weight
