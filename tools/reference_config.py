"""What the PyTorch references of routing methods share: options and tensors by config.json, and what routers say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import reference_dtrnet
import torch
from torch import Tensor

SITES = ("layer", "mixer", "ffn")

GATE = {"scorer": "mlp", "hidden": 0, "estimator": "prob_gate", "bypass": "identity", "kv": "executed",
        "key_gradient": False, "reserved": 0, "budget": "none", "aux_loss_coeff": 0.0, "budget_target": 0.5,
        "fallback_share": 0.0, "temperature": 1.0, "dual_rate": 0.0, "window": 128, "sink": 4, "soft_keys": False,
        "value_scale": False}
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
    "early_exit": {"max_dropout": 0.1, "exit_scale": 0.2, "curriculum": "rotational", "rotation": 4},
    "blocks": CONTROL | {"block_size": 128, "top_k": 3},
    "recursion": CONTROL | {"recursions": 3, "choice": "expert", "alpha": 0.0, "causal": "bce", "causal_coeff": 1e-3,
                            "aux_loss_coeff": 0.1, "z_loss_coeff": 0.0},
}
# Site of each router of a method, and how the names of its tensors begin. Methods that are not here have no router of a
# span of one layer.
ROUTERS = {"dtrnet": {"mixer": "router."}, "dllm": {"layer": "layer_router."}, "mod": {"layer": "mod_router."},
           "skip": {"mixer": "attn_router.", "ffn": "mlp_router."}, "moe": {"ffn": "block_sparse_moe."},
           "recursion": {"layer": "recursion_router."}}
LAYOUTS: dict[str, Callable[[int, int], bool]] = {
    "bilayer": lambda i, n: i % 2 == 1,
    "bilayer_dense_ends": lambda i, n: i % 2 == 0 and 2 <= i <= n - 2,
    "trilayer": lambda i, n: i % 3 != 0,
    "all": lambda i, n: True,
    "all_but_two": lambda i, n: i >= 2,
    "middle": lambda i, n: 0 < i < n - 1,
}
OWN_LAYOUT = {"dtrnet": "bilayer", "mod": "bilayer", "dllm": "all_but_two", "recursion": "middle"}  # others: "all"


@dataclass(frozen=True)
class Method:
    """One object of `routing`: its layers and all its options."""

    name: str
    layers: tuple[int, ...]
    options: Mapping

    def __getitem__(self, key: str):
        return self.options[key]

    @property
    def period(self) -> int:
        """Layers of one recursion."""
        return len(self.layers) // self["recursions"]


@dataclass(frozen=True)
class Config(reference_dtrnet.Config):
    """The keys of config.json that change what is computed: those of a dense decoder, and its methods."""

    methods: tuple[Method, ...]

    @staticmethod
    def from_dict(keys: Mapping) -> Config:
        dense = reference_dtrnet.Config.from_dict({**keys, "routing": {"method": "dense"}})
        routing = keys.get("routing") or []
        objects = routing if isinstance(routing, list) else [routing]
        methods = tuple(_method(o, dense.num_layers) for o in objects if o["method"] != "dense")
        return Config(**vars(dense), methods=methods)

    def method(self, name: str) -> Method | None:
        return next((m for m in self.methods if m.name == name), None)

    def method_of(self, layer: int, site: str) -> Method | None:
        """Who decides for the span."""
        for method in self.methods:
            if layer in method.layers and site in ROUTERS.get(method.name, {}):
                return method
        return None

    def weights_layer(self, layer: int) -> int:
        """The layer whose attention, MLP and norms a layer uses."""
        recursion = self.method("recursion")
        if recursion is None or layer not in recursion.layers:
            return layer
        first = recursion.layers[0]
        return first + (layer - first) % recursion.period

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
        shared = tuple(f"model.layers.{i}." for i in range(self.num_layers) if self.weights_layer(i) != i)
        shapes = {n: s for n, s in super().shapes().items() if not n.startswith(shared)}
        for i in range(self.num_layers):
            prefix, moe = f"model.layers.{i}.", self.method_of(i, "ffn")
            if moe and moe.name == "moe":
                if not moe["shared_expert"]:
                    shapes = {n: s for n, s in shapes.items() if not n.startswith(prefix + "mlp.")}
                for e in range(moe["experts"]):
                    expert = f"{prefix}block_sparse_moe.experts.{e}."
                    shapes |= {expert + "w1.weight": (f, d), expert + "w2.weight": (d, f), expert + "w3.weight": (f, d)}
            for site in SITES:
                if method := self.method_of(i, site):
                    router = prefix + ROUTERS[method.name][site]
                    shapes |= self._router_shapes(method, router)
                    if site == "mixer" and method["bypass"] == "constant":
                        shapes |= {router + "bypass_constant": (d,)}
                    if site == "mixer" and method.options.get("value_scale"):
                        shapes |= {router + "bypass_scale": (self.num_heads,)}
        if method := self.method("recursion"):
            shapes |= self._recursion_shapes(method)
        return shapes

    def _router_shapes(self, method: Method, prefix: str) -> dict[str, tuple[int, ...]]:
        d = self.hidden_size
        if method.name == "recursion":
            return {}
        if method["decider"] != "learned":
            return {prefix + "token_quantile": (self.vocab_size,)} if method["decider"] == "frequency" else {}
        if method.name == "moe":
            bias = {prefix + "expert_bias": (method["experts"],)} if method["bias_rate"] > 0 else {}
            return {prefix + "gate.weight": (method["experts"], d)} | bias
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

    def _recursion_shapes(self, method: Method) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        by_token = method["choice"] == "token"
        for r, i in enumerate(method.layers[::method.period][:1 if by_token else None]):
            prefix = f"model.layers.{i}.recursion_router."
            if method["decider"] == "frequency":
                shapes[prefix + "token_quantile"] = (self.vocab_size,)
            elif method["decider"] == "learned":
                shapes[prefix + "weight"] = (method["recursions"] if by_token else 1, self.hidden_size)
                if r > 0 and method["causal"] == "bce":
                    shapes[prefix + "causal_bias"] = (1,)
        return shapes


@dataclass
class Decision:
    """What one router made of the rows of a document. Rows that did not reach it have no effect on other rows."""

    probs: Tensor  # [T,C]
    routed: Tensor  # bool [T]: takes the span
    take: Tensor | float = 1.0  # [T]
    leave: Tensor | float = 0.0  # [T]
    keys: Tensor | float = 1.0  # [T], weight of each row's key for later rows
    own_key: Tensor | bool = True  # [T], weight of a row's key for itself
    enter: Tensor | bool = True  # bool [T]: rows that inner routers are asked about
    gate: Tensor | None = None  # [T], what budgets act on
    penalty: Tensor | float = 0.0  # [T], more loss
    causal: Tensor | None = None  # bool [T]: what the rule that serves says, where top-k decided
    experts: Tensor | None = None  # [T,E], weight of each expert, 0 if not chosen
    chosen: Tensor | None = None  # bool [T,E]
    choice_probs: Tensor | None = None  # [T,E] of `chosen`, if `probs` are of other ways


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


def _method(keys: Mapping, num_layers: int) -> Method:
    name = keys["method"]
    require(name in DEFAULTS, f"method {name}: expected one of {sorted(DEFAULTS)}")
    unknown = keys.keys() - DEFAULTS[name].keys() - {"method", "layers", "layout"}
    require(not unknown, f"{name}: unknown options {sorted(unknown)}")
    layers = keys.get("layers")
    if layers is None:
        layout = LAYOUTS[keys.get("layout", OWN_LAYOUT.get(name, "all"))]
        layers = [i for i in range(num_layers) if layout(i, num_layers)]
    options = DEFAULTS[name] | {key: value for key, value in keys.items() if key in DEFAULTS[name]}
    require(options.get("bypass") != "window" or options["kv"] == "executed" and not options["key_gradient"],
            f"{name}: bypass window goes with kv executed, and no gradient goes through its keys")
    require(not options.get("soft_keys") or options["estimator"] == "soft" and options["bypass"] != "window",
            f"{name}: soft_keys goes with estimator soft, and not with bypass window")
    if name == "recursion":
        first, count = layers[0], options["recursions"]
        require(list(layers) == list(range(first, first + len(layers))) and len(layers) % count == 0,
                f"recursion: layers {layers} are not {count} cycles")
    return Method(name, tuple(layers), options)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
