"""PyTorch reference of Mixture-of-Recursions (arXiv 2507.10524, middle cycle), part of tools/reference_methods.py.

A stack f of M layers is run up to N times; of the routed layers, `layers`, those of the first cycle have the weights.

    expert choice  recursion r takes ceil(T (N - r) / N) of the rows that took the one before, those of highest score
                   s = theta_r H, and all at r = 0: H <- a sigmoid(s) f(H) + H. Serving: rows with s + bias > 0.
    token choice   p = softmax(theta H1) of the first recursion's input H1 says how many recursions a row takes:
                   H <- p_r f(H), and + H1 at its last.

f(H) is the stack's whole output, residuals included. Attention is among the rows of the recursion.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from reference_config import Decision, Method, Route, require
from torch import Tensor

if TYPE_CHECKING:
    from reference_methods import Model


class Recursion:
    """The recursive layers of a model."""

    def __init__(self, model: Model, method: Method) -> None:
        require(method["decider"] == "learned", f"recursion with decider {method['decider']} is not computed here")
        self.model, self.method, self.count = model, method, method["recursions"]

    def run(self, x: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        """What the recursions make of a document's rows x [T,D]; their decisions are noted in `routes`."""
        return (self._token if self.method["choice"] == "token" else self._expert)(x, mode, routes)

    def _expert(self, x: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        chosen = torch.ones(len(x), dtype=torch.bool)
        for r in range(self.count):
            score = (x @ self._router(r, "weight").T)[:, 0]
            if r > 0:
                decision = self._choose(r, score, chosen, mode)
                routes[f"layer{self._layer(r)}"] = Route(chosen, decision)
                chosen = decision.routed
            weight = self.method["alpha"] * score.sigmoid()
            x = torch.where(chosen[:, None], weight[:, None] * self._stack(x, chosen) + x, x)
        return x

    def _choose(self, r: int, score: Tensor, reached: Tensor, mode: str) -> Decision:
        """Rows of recursion r > 0, among those that reached it."""
        causal = score + self._router(r, "causal_bias") if self.method["causal"] == "bce" else None
        require(mode != "infer" or causal is not None, "causal none: this model does not serve")
        if mode == "infer":
            routed = reached & (causal > 0)
        else:
            k = -(-len(score) * (self.count - r) // self.count)
            order = score.masked_fill(~reached, -torch.inf).argsort(descending=True, stable=True)
            routed = torch.zeros_like(reached)
            routed[order[:k]] = True
        logit = (score if causal is None else causal).detach()
        decision = Decision(torch.stack([logit, -logit], 1).sigmoid(), routed)
        if mode != "infer" and causal is not None:
            decision.causal = causal > 0
            decision.penalty = self.method["causal_coeff"] * F.binary_cross_entropy_with_logits(
                causal, routed.to(score.dtype), reduction="none")
        return decision

    def _token(self, x: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        probs = (x @ self._router(0, "weight").T).softmax(-1)
        last = probs.argmax(-1)
        everyone = torch.ones(len(x), dtype=torch.bool)
        routes[f"layer{self._layer(0)}"] = Route(
            everyone, Decision(probs, everyone, chosen=F.one_hot(last, self.count).bool()))
        h = x
        for r in range(self.count):
            chosen = last >= r
            update = probs[:, r:r + 1] * self._stack(h, chosen) + (last == r)[:, None] * x
            h = torch.where(chosen[:, None], update, h)
        return h

    def _stack(self, x: Tensor, rows: Tensor) -> Tensor:
        """f(x) [T,D] of the rows, bool [T], that take it; what it says of others is to be ignored."""
        among = Decision(torch.ones(len(x), 1), rows, keys=rows.to(x.dtype), own_key=rows)
        for i in self.method.layers[:self.method.period]:
            x = self.model.block(i, x, among)
        return x

    def _layer(self, r: int) -> int:
        return self.method.layers[r * self.method.period]

    def _router(self, r: int, name: str) -> Tensor:
        return self.model.params[f"model.layers.{self._layer(r)}.recursion_router.{name}"]
