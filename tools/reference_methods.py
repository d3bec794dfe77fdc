"""PyTorch reference of a Llama decoder with any routing method: dtrnet, mod, dllm, moe, skip, recursion, and lists
of them.

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

Shapes: T tokens of a document, D model, H heads, G kv heads, K head dim, E experts, C ways of a router, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

MODES = ("infer", "teacher_forced", "train")
SITES = ("layer", "mixer", "ffn")

GATE = {"scorer": "mlp", "hidden": 0, "estimator": "prob_gate", "bypass": "identity", "kv": "executed",
        "key_gradient": False, "reserved": 0, "budget": "none", "aux_loss_coeff": 0.0, "budget_target": 0.5,
        "fallback_share": 0.0, "temperature": 1.0, "dual_rate": 0.0}
CONTROL = {"decider": "learned", "share": 0.5, "decider_seed": 1}
DEFAULTS = {
    "dtrnet": GATE | CONTROL | {"bypass": "value", "budget": "mean_prob", "fallback_share": 0.15},
    "dllm": GATE | CONTROL | {"scorer": "norm_mlp", "hidden": 512, "estimator": "gumbel_ste", "key_gradient": True,
                              "reserved": 2, "budget": "target_token_l1", "aux_loss_coeff": 5.0},
    "skip": GATE | CONTROL | {"scorer": "linear", "estimator": "gumbel_ste", "kv": "all", "budget": "target_l1",
                              "aux_loss_coeff": 20.0, "budget_target": 0.75},
    "mod": CONTROL | {"capacity": 0.125, "causal": "bce", "causal_coeff": 0.01, "hidden": 0},
    "moe": CONTROL | {"experts": 8, "top_k": 2, "normalize": True, "capacity_factor": 0.0, "jitter": 0.0,
                      "aux_loss_coeff": 0.01, "z_loss_coeff": 0.0, "bias_rate": 0.0, "shared_expert": False},
    "recursion": CONTROL | {"recursions": 3, "choice": "expert", "alpha": 0.0, "causal": "bce", "causal_coeff": 1e-3,
                            "aux_loss_coeff": 0.1, "z_loss_coeff": 0.0},
}
# Site of each router of a method, and how the names of its tensors begin.
ROUTERS = {"dtrnet": {"mixer": "router."}, "dllm": {"layer": "layer_router."}, "mod": {"layer": "router."},
           "skip": {"mixer": "attn_router.", "ffn": "mlp_router."}, "moe": {"ffn": "block_sparse_moe."},
           "recursion": {"layer": "recursion_router."}}
LAYOUTS: dict[str, Callable[[int, int], bool]] = {
    "bilayer": lambda i, n: i % 2 == 1,
    "bilayer_dense_ends": lambda i, n: i % 2 == 0 and 2 <= i <= n - 2,
    "trilayer": lambda i, n: i % 3 != 0,
    "all": lambda i, n: True,
    "all_but_two": lambda i, n: i >= 2,
    "middle": lambda i, n: 1 <= i <= n - 2,
}
OWN_LAYOUT = {"dtrnet": "bilayer", "mod": "bilayer", "dllm": "all_but_two", "moe": "all", "skip": "all",
              "recursion": "middle"}


@dataclass(frozen=True)
class Method:
    """One object of `routing`: its layers and all its options."""

    name: str
    layers: tuple[int, ...]
    options: Mapping

    def __getitem__(self, key: str):
        return self.options[key]


@dataclass(frozen=True)
class Place:
    """Where a layer of a recursion method is: its recursion, and its place among the `cycle` layers of each."""

    method: Method
    first: int
    cycle: int
    recursion: int
    offset: int

    def share(self, recursion: int) -> float:
        """Of the tokens that take a recursion in training."""
        return (self.method["recursions"] - recursion) / self.method["recursions"]

    @property
    def alpha(self) -> float:
        return self.method["alpha"] or (0.1 if self.method["choice"] == "expert" else 1.0)


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
    methods: tuple[Method, ...]

    @staticmethod
    def from_dict(keys: Mapping) -> Config:
        heads, num_layers = keys["num_attention_heads"], keys["num_hidden_layers"]
        rope = keys.get("rope_parameters") or {}
        routing = keys.get("routing") or []
        objects = routing if isinstance(routing, list) else [routing]
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
            methods=tuple(_method(o, num_layers) for o in objects if o["method"] != "dense"),
        )

    def method_of(self, layer: int, site: str) -> Method | None:
        """Who decides for the span."""
        for method in self.methods:
            if layer in method.layers and site in ROUTERS[method.name]:
                return method
        return None

    def place(self, layer: int) -> Place | None:
        """None outside of a recursion method."""
        method = self.method_of(layer, "layer")
        if method is None or method.name != "recursion":
            return None
        cycle = len(method.layers) // method["recursions"]
        recursion, offset = divmod(layer - method.layers[0], cycle)
        return Place(method, method.layers[0], cycle, recursion, offset)

    def weights_layer(self, layer: int) -> int:
        """The layer whose attention, MLP and norms a layer uses."""
        place = self.place(layer)
        return layer if place is None else place.first + place.offset

    def routers(self) -> dict[tuple[int, str], str]:
        """(layer, site) -> name, by layer, then site: "layerN" is the layer's first."""
        names: dict[tuple[int, str], str] = {}
        for layer in range(self.num_layers):
            sites = [site for site in SITES if self.method_of(layer, site)]
            names |= {(layer, site): f"layer{layer}" + (f".{site}" if n else "") for n, site in enumerate(sites)}
        return names

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape."""
        d, f = self.hidden_size, self.intermediate_size
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,),
                     "self_attn.q_proj.weight": (query, d), "self_attn.k_proj.weight": (kv, d),
                     "self_attn.v_proj.weight": (kv, d), "self_attn.o_proj.weight": (d, query)}
            moe = self.method_of(i, "ffn")
            experts = moe is not None and moe.name == "moe"
            if not experts or moe["shared_expert"]:
                layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
            if self.weights_layer(i) != i:
                layer = {}
            for e in range(moe["experts"] if experts else 0):
                layer |= {f"block_sparse_moe.experts.{e}.w1.weight": (f, d),
                          f"block_sparse_moe.experts.{e}.w2.weight": (d, f),
                          f"block_sparse_moe.experts.{e}.w3.weight": (f, d)}
            for site in SITES:
                if method := self.method_of(i, site):
                    layer |= self._router_shapes(method, ROUTERS[method.name][site], i)
                    if site == "mixer" and method["bypass"] == "constant":
                        layer |= {ROUTERS[method.name][site] + "bypass_constant": (d,)}
            shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (d,)
        if not self.tied:
            shapes["lm_head.weight"] = (self.vocab_size, d)
        return shapes

    def _router_shapes(self, method: Method, prefix: str, layer: int) -> dict[str, tuple[int, ...]]:
        d = self.hidden_size
        place = self.place(layer) if method.name == "recursion" else None
        token = place is not None and method["choice"] == "token"
        if place and (place.offset > 0 or (token and place.recursion > 0)):
            return {}
        if method["decider"] != "learned":
            return {prefix + "token_quantile": (self.vocab_size,)} if method["decider"] == "frequency" else {}
        if method.name == "moe":
            bias = {prefix + "expert_bias": (method["experts"],)} if method["bias_rate"] > 0 else {}
            return {prefix + "gate.weight": (method["experts"], d)} | bias
        if place:
            bias = not token and method["causal"] == "bce" and place.recursion > 0
            return {prefix + "weight": (method["recursions"] if token else 1, d)} | (
                {prefix + "causal_bias": (1,)} if bias else {})
        scorer, hidden = method.options.get("scorer", "mlp"), method["hidden"] or d // 2
        net = {"0.weight": (hidden, d), "2.weight": (2, hidden), "2.bias": (2,)}
        net |= {"0.bias": (hidden,)} | ({"norm.weight": (hidden,)} if scorer == "norm_mlp" else {})
        if scorer == "linear":
            net = {"0.weight": (2, d), "0.bias": (2,)}
        inner = prefix + ("predictor." if method.name == "mod" else "") + "weight_predictor."
        net = {inner + name: shape for name, shape in net.items()}
        if method.name == "mod":
            causal = {"bce": {prefix + "causal_bias": (1,)}, "predictor": net, "none": {}}[method["causal"]]
            return {prefix + "weight": (1, d)} | causal
        return net


@dataclass
class Decision:
    """What one router made of the rows of a document. Rows that did not reach it have no effect on other rows."""

    probs: Tensor  # [T,C]
    routed: Tensor  # bool [T]: takes the span
    take: Tensor | float = 1.0  # [T]
    leave: Tensor | float = 0.0  # [T]
    keys: Tensor | float = 1.0  # [T], weight of each row's key for later rows
    own_key: Tensor | bool = True  # bool [T]: a row sees its own key
    enter: Tensor | bool = True  # bool [T]: rows that inner routers are asked about
    gate: Tensor | None = None  # [T], what budgets act on
    penalty: Tensor | float = 0.0  # [T], more loss
    causal: Tensor | None = None  # bool [T]: what the rule that serves says, where top-k decided
    experts: Tensor | None = None  # [T,E], weight of each expert, 0 if not chosen
    chosen: Tensor | None = None  # bool [T,E]
    choice_probs: Tensor | None = None  # [T,E] of `chosen`, if `probs` are of other ways
    gated: Tensor | None = None  # [T], recursion: weight of the layers' answer
    splits: bool = True  # the router is meant to leave rows out


@dataclass
class Route:
    """A decision, and the rows that it was about."""

    reached: Tensor  # bool [T]
    decision: Decision

    @property
    def probs(self) -> Tensor:
        return self.decision.probs * self.reached[:, None]

    @property
    def routed(self) -> Tensor:
        return self.decision.routed & self.reached


@dataclass
class Forward:
    logits: Tensor  # [T,V]
    routes: dict[str, Route] = field(default_factory=dict)  # by router name


@dataclass
class Loss:
    """Of one training step."""

    loss: Tensor  # mean cross-entropy
    aux_loss: Tensor  # the budgets' values, summed over methods, before their weights
    total: Tensor  # what is differentiated: also penalties of single routers


class Model:
    """A decoder: its config and its parameters by name."""

    def __init__(self, config: Config, params: Mapping[str, Tensor], dtype=torch.float32) -> None:
        shapes = config.shapes()
        got = {name: tuple(p.shape) for name, p in params.items()}
        wrong = sorted(n for n in shapes.keys() | got.keys() if shapes.get(n) != got.get(n))
        _require(not wrong, f"tensors missing, unexpected or of a wrong shape: {wrong}")
        self.config, self.dtype = config, dtype
        self.params = {name: params[name].detach().to(dtype, copy=True).requires_grad_() for name in shapes}

    def forward(self, ids: Tensor, mode: str = "infer") -> Forward:
        """Logits of one document, ids [T]."""
        _require(mode in MODES, f"mode {mode}: expected one of {MODES}")
        out = Forward(logits=ids)
        x = self.params["model.embed_tokens.weight"][ids.long()]
        start: dict[int, Tensor] = {}  # of recursions
        for i in range(self.config.num_layers):
            place = self.config.place(i)
            if place and place.offset == 0:
                start[place.recursion] = x
            x = self._layer(i, x, ids, mode, out.routes)
            if place and place.offset == place.cycle - 1:
                x = self._combine(place, start, x, out.routes)
        head = self.params["model.embed_tokens.weight" if self.config.tied else "lm_head.weight"]
        out.logits = self._norm(x, "model.norm.weight") @ head.T
        return out

    def loss(self, documents: Sequence[Tensor], targets: Sequence[Tensor], mode: str = "train") -> Loss:
        """Mean next-token loss over the documents, and what budgets add; targets are already shifted."""
        outs = [self.forward(ids, mode) for ids in documents]
        logits = torch.cat([out.logits for out in outs])
        loss = F.cross_entropy(logits, torch.cat(list(targets)).long())
        routes = {name: [out.routes[name] for out in outs] for name in self.config.routers().values()}
        aux_loss, total = torch.zeros((), dtype=self.dtype), loss
        for method in self.config.methods:
            budget = self._budget(method, routes)
            aux_loss = aux_loss + budget
            total = total + method.options.get("aux_loss_coeff", 0.0) * budget
        for parts in routes.values():  # mean over tokens, sum over routers
            total = total + sum((r.decision.penalty * r.reached).sum() for r in parts) / len(logits)
        return Loss(loss, aux_loss, total)

    def gradients(self, documents: Sequence[Tensor], targets: Sequence[Tensor]) -> tuple[Loss, dict[str, Tensor]]:
        """The losses of a training step, and the gradient of `total` by parameter."""
        loss = self.loss(documents, targets)
        grads = torch.autograd.grad(loss.total, list(self.params.values()), allow_unused=True)
        return loss, {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(self.params.items(), grads)}

    def _combine(self, place: Place, start: Mapping[int, Tensor], x: Tensor, routes: Mapping[str, Route]) -> Tensor:
        """The end of a recursion: H + g F(H) for rows that took it (expert) or took it last (token)."""
        name = self.config.routers()
        if place.method["choice"] == "expert":
            leader = routes[name[place.first + place.cycle * place.recursion, "layer"]].decision
            return torch.where(leader.routed[:, None], start[place.recursion] + _rows(leader.gated) * x, x)
        leader = routes[name[place.first, "layer"]].decision
        last = leader.chosen[:, place.recursion:place.recursion + 1]
        return torch.where(last, start[0] + _rows(leader.gated) * x, x)

    # One layer

    def _layer(self, i: int, x: Tensor, ids: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        everyone = torch.ones(len(x), dtype=torch.bool)
        layer = self._decide(i, "layer", x, x, ids, everyone, mode, routes)
        reached = everyone & layer.enter
        mixer = self._decide(i, "mixer", x, x, ids, reached, mode, routes)
        y = x + _rows(mixer.take) * self._attention(i, x, layer, mixer) + _rows(mixer.leave) * self._value_way(i, x)
        held = self.config.weights_layer(i)
        h = self._norm(y, f"model.layers.{held}.post_attention_layernorm.weight")
        ffn = self._decide(i, "ffn", x, h, ids, reached, mode, routes)
        if ffn.experts is None:
            y = y + _rows(ffn.take) * self._swiglu(h, f"model.layers.{held}.mlp.", "gate_proj", "down_proj", "up_proj")
        else:
            y = y + self._experts(i, h, ffn.experts)
        return x + _rows(layer.take) * (y - x)

    def _attention(self, i: int, x: Tensor, layer: Decision, mixer: Decision) -> Tensor:
        """W_O Attn [T,D]. Each earlier key counts with its gate, a row's own one once or not at all."""
        held = self.config.weights_layer(i)
        cfg, prefix, length = self.config, f"model.layers.{held}.self_attn.", len(x)
        h = self._norm(x, f"model.layers.{held}.input_layernorm.weight")
        q = (h @ self.params[prefix + "q_proj.weight"].T).view(length, cfg.num_heads, cfg.head_dim)
        k = (h @ self.params[prefix + "k_proj.weight"].T).view(length, cfg.num_kv_heads, cfg.head_dim)
        v = (h @ self.params[prefix + "v_proj.weight"].T).view(length, cfg.num_kv_heads, cfg.head_dim)
        group = cfg.num_heads // cfg.num_kv_heads
        q, k = self._rope(q), self._rope(k).repeat_interleave(group, 1)
        scores = torch.einsum("qhk,shk->hqs", q, k) / math.sqrt(cfg.head_dim)
        rows = torch.arange(length)
        ones = torch.ones(length, dtype=self.dtype)
        earlier = (rows[None, :] < rows[:, None]) * (ones * layer.keys * mixer.keys)[None, :]
        counts = earlier + torch.diag(ones * (ones.bool() & layer.own_key & mixer.own_key))
        scores = scores.masked_fill(rows[None, :] > rows[:, None], -math.inf)
        weights = (scores - scores.amax(-1, keepdim=True).detach()).exp() * counts
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)  # no key at all: 0
        mixed = torch.einsum("hqs,shk->qhk", weights, v.repeat_interleave(group, 1)).flatten(1)
        return mixed @ self.params[prefix + "o_proj.weight"].T

    def _value_way(self, i: int, x: Tensor) -> Tensor:
        """What the value bypass adds: W_O repeat_kv(W_V h), and a constant with it; the identity bypass nothing."""
        method = self.config.method_of(i, "mixer")
        if method is None or method["bypass"] == "identity":
            return torch.zeros_like(x)
        held = self.config.weights_layer(i)
        cfg, prefix = self.config, f"model.layers.{held}.self_attn."
        h = self._norm(x, f"model.layers.{held}.input_layernorm.weight")
        v = (h @ self.params[prefix + "v_proj.weight"].T).view(len(x), cfg.num_kv_heads, cfg.head_dim)
        value = v.repeat_interleave(cfg.num_heads // cfg.num_kv_heads, 1).flatten(1) @ self.params[
            prefix + "o_proj.weight"].T
        if method["bypass"] == "constant":
            value = value + self.params[f"model.layers.{i}.{ROUTERS[method.name]['mixer']}bypass_constant"]
        return value

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
        if method.name == "recursion":
            decision = self._recursion(self.config.place(i), prefix, x, mode, routes)
        elif method["decider"] != "learned":
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
        _require(mode != "train" or estimator != "gumbel_ste", "training with gumbel_ste draws random numbers")
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
        _require(mode != "infer" or causal is not None, "causal none: this model does not serve")
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

    def _recursion(self, place: Place, prefix: str, x: Tensor, mode: str, routes: Mapping[str, Route]) -> Decision:
        """Who takes a layer of a recursion. The layers answer with weight 1 here; `_combine` weights them."""
        method, length = place.method, len(x)
        everyone = torch.ones(length, dtype=torch.bool)
        token = method["choice"] == "token"
        by_layer = {i: routes[name].decision for (i, site), name in self.config.routers().items()
                    if site == "layer" and name in routes}
        leader = by_layer.get(place.first if token else place.first + place.cycle * place.recursion)
        fields: dict = {}
        if method["decider"] != "learned":
            _require(method["decider"] == "every_nth", "recursion with this decider is not computed here")
            recursions = method["recursions"]
            depth = torch.tensor([recursions - t % recursions for t in range(length)])
            routed = depth > place.recursion
            fields = {"gated": torch.full((length,), place.alpha, dtype=self.dtype),
                      "chosen": depth[:, None] == torch.arange(1, recursions + 1)}
        elif token and leader is not None:
            routed = leader.chosen[:, place.recursion:].any(1)
        elif token:
            logits = x @ self.params[prefix + "weight"].T
            probs = logits.softmax(-1)
            depth = probs.argmax(-1, keepdim=True)
            routed = everyone
            fields = {"gated": place.alpha * probs.gather(1, depth)[:, 0], "choice_probs": probs,
                      "chosen": depth == torch.arange(method["recursions"])}
            if mode == "train":
                fields["penalty"] = method["z_loss_coeff"] * logits.logsumexp(-1).square()
        elif leader is not None:
            routed = leader.routed
        else:
            score = (x @ self.params[prefix + "weight"].T)[:, 0]
            fields = {"gated": place.alpha * score.sigmoid()}
            if place.recursion == 0:
                routed = everyone
            else:
                before = by_layer[place.first + place.cycle * place.recursion - 1].routed
                causal = score + self.params[prefix + "causal_bias"] if method["causal"] == "bce" else None
                routed, more = self._experts_choice(place, score, causal, before, mode)
                fields |= more
        hard = routed.to(self.dtype)
        fields.setdefault("probs", torch.stack([hard, 1 - hard], 1))
        return Decision(routed=routed, take=hard, keys=hard, own_key=routed, enter=routed, splits=place.recursion > 0,
                        **fields)

    def _experts_choice(self, place: Place, score: Tensor, causal: Tensor | None, before: Tensor, mode: str):
        """Of the rows of the recursion before, the document's top-k or those of the causal rule; and what to learn."""
        method = place.method
        _require(mode != "infer" or causal is not None, "causal none: this model does not serve")
        logit = score if causal is None else causal
        if mode == "infer":
            routed = (causal > 0) & before
        else:
            k = math.ceil(round(place.share(place.recursion) * len(score), 6))
            order = score.masked_fill(~before, -math.inf).argsort(descending=True, stable=True)
            routed = torch.zeros_like(before)
            routed[order[:k]] = True
        asked = logit.detach().masked_fill(~before, -math.inf)
        fields = {"probs": torch.stack([asked, -asked], 1).sigmoid()}
        if mode != "infer" and causal is not None:
            cross_entropy = F.binary_cross_entropy_with_logits(causal, routed.to(self.dtype), reduction="none")
            fields["causal"] = (causal > 0) & before
            fields["penalty"] = method["causal_coeff"] * cross_entropy * before / place.share(place.recursion - 1)
        return routed, fields

    def _moe(self, method: Method, prefix: str, h: Tensor, mode: str) -> Decision:
        """Experts of the highest probability (plus bias), weighted with it, or with its part of the chosen ones'."""
        _require(mode != "train" or method["jitter"] == method["capacity_factor"] == 0,
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
        _require(method.name != "moe" and method["decider"] in ("every_nth", "frequency"),
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
        if method["decider"] != "learned" or not names:
            return zero
        if method.name == "moe":
            return sum(self._balance(routes[name]) for name in names.values())
        if method.name == "recursion":
            parts = routes[names[method.layers[0], "layer"]]
            return self._balance(parts) if method["choice"] == "token" else zero
        budget, target = method.options.get("budget", "none"), method.options.get("budget_target", 0.0)
        _require(budget != "compute", "the compute budget is not computed here")
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


def _method(keys: Mapping, num_layers: int) -> Method:
    name = keys["method"]
    _require(name in DEFAULTS, f"method {name}: expected one of {sorted(DEFAULTS)}")
    unknown = keys.keys() - DEFAULTS[name].keys() - {"method", "layers", "layout"}
    _require(not unknown, f"{name}: unknown options {sorted(unknown)}")
    layers = keys.get("layers")
    if layers is None:
        layout = LAYOUTS[keys.get("layout", OWN_LAYOUT[name])]
        layers = [i for i in range(num_layers) if layout(i, num_layers)]
    options = DEFAULTS[name] | {key: value for key, value in keys.items() if key in DEFAULTS[name]}
    return Method(name, tuple(layers), options)


def _rows(weight: Tensor | float) -> Tensor | float:
    """A weight per row as a column, to multiply [T,D] with."""
    return weight[:, None] if isinstance(weight, Tensor) else weight


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
