"""PyTorch reference of Mixture-of-Recursions (arXiv 2507.10524, middle cycle), part of tools/reference_methods.py.

A stack F of M layers runs up to N times; of the routed layers, `layers`, those of the first cycle have the weights.

    expert choice  recursion r takes ceil(T (N - r) / N) of the rows that took the one before, those of highest score
                   s = theta_r H, and all at r = 0: H <- H + a sigmoid(s) F(H). Serving: rows with s + bias > 0.
    token choice   p = softmax(W H1) of the first recursion's input H1: a row takes the i recursions of its largest p
                   and gets H1 + a p_i F(... F(H1)).
    a control      gives each row a number of recursions, and weight a.

F(H) is the stack's whole output, residuals included. Attention is among the rows of the recursion. Routers of other
methods are those of the unrolled layer.
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
        self.model, self.method, self.count = model, method, method["recursions"]
        self.by_token = method["choice"] == "token"
        self.alpha = method["alpha"] or (1.0 if self.by_token else 0.1)

    def run(self, x: Tensor, ids: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        """What the recursions make of a document's rows x [T,D]; their decisions are noted in `routes`."""
        first, gate, depth = x, x.new_full((len(x),), self.alpha), None
        chosen = torch.ones(len(x), dtype=torch.bool)
        lead = _layer_of(chosen)
        if self.method["decider"] != "learned":
            depth = self._drawn(ids)
        elif self.by_token:
            depth, gate = self._depths(x, lead, mode)
        if depth is not None:
            lead.chosen = F.one_hot(depth - 1, self.count).bool()
        for r in range(self.count):
            if depth is None:
                score = (x @ self._router(r, "weight").T)[:, 0]
                gate = self.alpha * score.sigmoid()
                lead = self._choose(r, score, chosen, mode) if r > 0 else lead
                chosen = lead.routed
            elif r > 0:
                chosen = depth > r
                lead = _layer_of(chosen)
            y = self._stack(r, x, lead, ids, mode, routes)
            if self.by_token:
                x = torch.where((depth == r + 1)[:, None], first + gate[:, None] * y, y)
            else:
                x = torch.where(chosen[:, None], x + gate[:, None] * y, x)
        return x

    def _stack(self, r: int, x: Tensor, lead: Decision, ids: Tensor, mode: str, routes: dict[str, Route]) -> Tensor:
        """F(x) [T,D] of the rows that take recursion r, and x of others; `lead` is the first layer's decision."""
        everyone = torch.ones(len(x), dtype=torch.bool)
        period = self.method.period
        for i in self.method.layers[r * period:(r + 1) * period]:
            routes[f"layer{i}"] = Route(everyone, lead)
            x = torch.where(lead.routed[:, None], self.model.block(i, x, lead, ids, mode, routes), x)
            lead = _layer_of(lead.routed)
        return x

    def _choose(self, r: int, score: Tensor, before: Tensor, mode: str) -> Decision:
        """Expert choice of recursion r > 0, among the rows that took the one before."""
        causal = score + self._router(r, "causal_bias") if self.method["causal"] == "bce" else None
        require(mode != "infer" or causal is not None, "causal none: this model does not serve")
        if mode == "infer":
            routed = before & (causal > 0)
        else:
            k = -(-len(score) * (self.count - r) // self.count)
            order = score.masked_fill(~before, -torch.inf).argsort(descending=True, stable=True)
            routed = torch.zeros_like(before)
            routed[order[:k]] = True
        decision = _layer_of(routed)
        logit = (score if causal is None else causal).detach().masked_fill(~before, -torch.inf)
        decision.probs = torch.stack([logit, -logit], 1).sigmoid()
        if mode != "infer" and causal is not None:
            # Mean over the rows that were asked: of all tokens, (N - r + 1) / N.
            coeff = self.method["causal_coeff"] * self.count / (self.count - r + 1)
            decision.causal = before & (causal > 0)
            decision.penalty = coeff * F.binary_cross_entropy_with_logits(
                causal, routed.to(score.dtype), reduction="none") * before
        return decision

    def _depths(self, x: Tensor, lead: Decision, mode: str) -> tuple[Tensor, Tensor]:
        """Token choice: each row's number of recursions [T] and weight [T]; what is learned is noted in `lead`."""
        logits = x @ self._router(0, "weight").T
        lead.choice_probs = logits.softmax(-1)
        if mode == "train":
            lead.penalty = self.method["z_loss_coeff"] * logits.logsumexp(-1).square()
        best = lead.choice_probs.max(-1)
        return best.indices + 1, self.alpha * best.values

    def _drawn(self, ids: Tensor) -> Tensor:
        """A control's number of recursions of each row [T]."""
        if self.method["decider"] == "every_nth":
            return self.count - torch.arange(len(ids)) % self.count
        require(self.method["decider"] == "frequency", f"recursion with {self.method['decider']} is not computed here")
        return self.count - (self._router(0, "token_quantile")[ids.long()] * self.count).floor().long()

    def _router(self, r: int, name: str) -> Tensor:
        layer = self.method.layers[r * self.method.period]
        return self.model.params[f"model.layers.{layer}.recursion_router.{name}"]


def _layer_of(routed: Tensor) -> Decision:
    """The decision of a layer that these rows take, bool [T], and attend among themselves in."""
    return Decision(torch.stack([routed, ~routed], 1).float(), routed, keys=routed, own_key=routed, enter=routed)
