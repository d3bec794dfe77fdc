"""tools/reference_methods.py against itself, where no program is needed: limits in which a method is the dense model or
another one, the definitions again as loops over single rows, and gradients against differences of the loss.
"""

import pathlib
import sys

import pytest
import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent / "tools"))
from reference_config import Decision  # noqa: E402
from reference_methods import Config, Exit, Model  # noqa: E402

torch.set_num_threads(1)

SHAPE = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5}
IDS = torch.randint(0, 40, (37,), generator=torch.Generator().manual_seed(3))
DENSE = {"method": "dense"}
WINDOW = {"method": "dtrnet", "layers": [1, 3], "bypass": "window", "window": 5, "sink": 3}
SOFT = {"method": "dtrnet", "layers": [1, 3], "estimator": "soft"}
BLOCKS = {"method": "blocks", "block_size": 16, "top_k": 2}
RECURSION = {"method": "recursion", "recursions": 2, "causal_coeff": 0.2, "aux_loss_coeff": 0.3}


def random_model(routing, seed=1, params=(), **keys):
    """A random model in float64; `params` replaces some of its parameters."""
    config = Config.from_dict(SHAPE | keys | {"routing": routing})
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, shape in sorted(config.shapes().items()):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        drawn[name] = 1 + 0.2 * noise if "norm" in name else noise / (shape[-1]**0.5 if len(shape) > 1 else 10)
    drawn |= {name: params[name] for name in drawn.keys() & dict(params).keys()}
    return Model(config, drawn, torch.float64)


def twin(model, routing, **keys):
    """Another model with the parameters that both have."""
    return random_model(routing, params={n: p.detach() for n, p in model.params.items()}, **keys)


def assert_equal(a, b):
    assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def assert_differ(a, b):
    assert (a - b).abs().max() > 1e-3 * b.abs().max()


def attention_of_row(model, i, x, p, seen):
    """W_O Attn [D] of the row at position p over the positions `seen`, a list per head, one key after the other."""
    cfg, params, prefix = model.config, model.params, f"model.layers.{i}."
    norm = params[prefix + "input_layernorm.weight"]
    h = [norm * row / (row.pow(2).mean() + cfg.rms_norm_eps).sqrt() for row in x]
    half = cfg.head_dim // 2

    def turned(name, head, t):
        w = params[f"{prefix}self_attn.{name}_proj.weight"][head * cfg.head_dim:(head + 1) * cfg.head_dim]
        z = torch.view_as_complex(torch.stack((w @ h[t]).split(half), -1).contiguous())
        angle = t * cfg.rope_theta**(-torch.arange(half, dtype=x.dtype) / half)
        return torch.view_as_real(z * torch.polar(torch.ones_like(angle), angle)).T.flatten()

    heads = []
    for head in range(cfg.num_heads):
        group = head // (cfg.num_heads // cfg.num_kv_heads)
        wv = params[prefix + "self_attn.v_proj.weight"][group * cfg.head_dim:(group + 1) * cfg.head_dim]
        query = turned("q", head, p)
        scores = torch.stack([query @ turned("k", group, t) for t in seen[head]]) / cfg.head_dim**0.5
        heads.append(sum(w * (wv @ h[t]) for w, t in zip(scores.softmax(0), seen[head])))
    return params[prefix + "self_attn.o_proj.weight"] @ torch.cat(heads)


def layer_input(model, i, mode):
    return model.forward(IDS, mode).states[i - 1].detach()


def after_attention(model, i, x, increments):
    """The layer's output, if attention and its bypass add `increments`."""
    prefix = f"model.layers.{i}."
    y = x + increments
    h = F.rms_norm(y, y.shape[-1:], model.params[prefix + "post_attention_layernorm.weight"], model.config.rms_norm_eps)
    gate, up, down = (model.params[f"{prefix}mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return y + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T


def decision_of_all(x):
    return Decision(torch.ones(len(x), 1), torch.ones(len(x), dtype=torch.bool))


@pytest.mark.parametrize("estimator,mode", [("prob_gate", "infer"), ("ste", "train"), ("soft", "train")])
def test_window_row_by_row(estimator, mode):
    model = random_model(WINDOW | {"estimator": estimator})
    with torch.no_grad():
        out = model.forward(IDS, mode)
        x = layer_input(model, 3, mode)
        decision = out.routes["layer3"].decision
        routed, p = decision.routed, decision.probs[:, 0]
        assert 5 < routed.sum() < 32
        increments = []
        for t in range(len(x)):
            near = [s for s in range(t + 1) if t - s < 5]
            sink = [s for s in range(t + 1) if t - s >= 5 and s < 3]
            kept = [s for s in range(t + 1) if t - s >= 5 and (s < 3 or routed[s] or estimator == "soft")]
            full = attention_of_row(model, 3, x, t, [sorted(kept + near)] * 4)
            short = attention_of_row(model, 3, x, t, [sorted(sink + near)] * 4)
            if estimator == "prob_gate":
                increments.append(p[t] * full if routed[t] else (1 - p[t]) * short)
            elif estimator == "ste":
                increments.append(full if routed[t] else short)
            else:
                increments.append(p[t] * full + (1 - p[t]) * short)
        assert_equal(after_attention(model, 3, x, torch.stack(increments)), out.states[3])


def test_gradient_of_a_window_gate():
    """Of a straight-through gate: (routed answer - bypassed answer) dp of each row."""
    model = random_model(WINDOW | {"estimator": "ste", "layers": [3], "budget": "none"})
    gate = {n: p for n, p in model.params.items() if "router" in n}
    out = model.forward(IDS, "train")
    signal = torch.randn(out.states[3].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = torch.autograd.grad((out.states[3] * signal).sum(), gate.values())
    x = out.states[2].detach()
    decision = out.routes["layer3"].decision
    p = model._score("model.layers.3.router.", "mlp", x).sigmoid()
    answers = [model._attention(3, x, decision_of_all(x), decision, bypassed).detach() for bypassed in (False, True)]
    taken = torch.where(decision.routed[:, None], *answers).requires_grad_()
    d_attention = torch.autograd.grad((after_attention(model, 3, x, taken) * signal).sum(), taken)[0]
    d_gate = (d_attention * (answers[0] - answers[1])).sum(-1)
    for a, b in zip(got, torch.autograd.grad((p * d_gate).sum(), gate.values())):
        assert_equal(a, b)


def test_limits_of_the_window():
    model = random_model(WINDOW | {"estimator": "ste"})
    dense = twin(model, DENSE).forward(IDS).logits
    assert_differ(model.forward(IDS).logits, dense)
    for keys in ({"window": 37}, {"sink": 37}, {"reserved": 37}):  # no key out of sight
        assert_equal(twin(model, WINDOW | {"estimator": "ste"} | keys).forward(IDS).logits, dense)
    # Where no row is routed and the window is one, rows see themselves and the sink; without a sink, the value bypass.
    value = {"method": "dtrnet", "layers": [3], "decider": "every_nth", "share": 0.0}
    alone = twin(model, value | {"bypass": "window", "window": 1, "sink": 0}).forward(IDS).logits
    assert_differ(twin(model, value | {"bypass": "window", "window": 1, "sink": 1}).forward(IDS).logits, alone)
    assert_equal(alone, twin(model, value).forward(IDS).logits)


def test_soft_keys():
    """Entries of the attention matrix times the gate of their key: with p = 1 the dense model, else log p in scores."""
    model = random_model(SOFT | {"soft_keys": True, "layers": [3]})
    x, prefix = layer_input(model, 3, "train"), "model.layers.3.self_attn."
    with torch.no_grad():
        out = model.forward(IDS, "train")
        p = out.routes["layer3"].decision.gate
        h = model._norm(x, "model.layers.3.input_layernorm.weight")
        q = model._rope((h @ model.params[prefix + "q_proj.weight"].T).view(-1, 4, 8))
        k, v = (z.repeat_interleave(2, 1) for z in (
            model._rope((h @ model.params[prefix + "k_proj.weight"].T).view(-1, 2, 8)),
            (h @ model.params[prefix + "v_proj.weight"].T).view(-1, 2, 8)))
        bias = torch.where(torch.ones(37, 37, dtype=torch.bool).tril(), p.log()[None, :], -torch.inf)
        mixed = F.scaled_dot_product_attention(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1), bias)
        wo = model.params[prefix + "o_proj.weight"].T
        increments = p[:, None] * (mixed.transpose(0, 1).flatten(1) @ wo) + (1 - p)[:, None] * (v.flatten(1) @ wo)
        assert_equal(after_attention(model, 3, x, increments), out.states[3])
        plain = twin(model, SOFT | {"layers": [3]})
        assert_differ(plain.forward(IDS, "train").logits, out.logits)
        assert_equal(plain.forward(IDS).logits, model.forward(IDS).logits)
        reserved = twin(model, SOFT | {"soft_keys": True, "reserved": 37}).forward(IDS, "train")
        assert_equal(reserved.logits, twin(model, DENSE).forward(IDS).logits)


def test_blocks_row_by_row():
    model = random_model(BLOCKS | {"layers": [3]})
    with torch.no_grad():
        x, rest = layer_input(model, 3, "infer"), 0
        h = model._norm(x, "model.layers.3.input_layernorm.weight")
        q = model._rope((h @ model.params["model.layers.3.self_attn.q_proj.weight"].T).view(-1, 4, 8))
        k = model._rope((h @ model.params["model.layers.3.self_attn.k_proj.weight"].T).view(-1, 2, 8))
        increments = []
        for t in range(len(x)):
            own, seen = t // 16, []
            for head in range(4):
                score = {b: sum(q[t, head] @ k[s, head // 2] for s in range(16 * b, 16 * b + 16)) for b in range(own)}
                best = sorted(score, key=lambda b: (-score[b], b))[:1]
                seen.append([s for b in best for s in range(16 * b, 16 * b + 16)] + list(range(16 * own, t + 1)))
                rest += best == [0] and own == 2
            increments.append(attention_of_row(model, 3, x, t, seen))
        assert 0 < rest < 20  # the choice is one
        assert_equal(after_attention(model, 3, x, torch.stack(increments)), model.forward(IDS).states[3])


def test_limits_of_blocks():
    model = random_model(BLOCKS)
    dense = twin(model, DENSE).forward(IDS).logits
    assert model.config.shapes() == twin(model, DENSE).config.shapes()
    assert_differ(model.forward(IDS).logits, dense)
    for keys in ({"block_size": 48, "top_k": 1}, {"top_k": 3}):
        assert_equal(twin(model, BLOCKS | keys).forward(IDS).logits, dense)
    # A block's first rows do not depend on blocks that are not seen: top_k 1 cuts the text, but for positions.
    short = twin(model, BLOCKS | {"top_k": 1}).forward(IDS).logits
    assert_equal(short[:16], dense[:16])


def test_exits():
    model = random_model(DENSE)
    with torch.no_grad():
        full = model.forward(IDS)
        never = model.forward(IDS, exit=Exit("margin", 2.0))
        assert_equal(never.logits, full.logits)
        for measure in ("margin", "state"):
            out = model.forward(IDS, exit=Exit(measure, -2.0, 1))  # at once: every row has the state after layer 1
            assert out.depth.tolist() == [2] * 37
            assert_equal(out.logits, model._head(full.states[1]))
        # A row's answer is the head's on its state at the exit, and does not depend on later rows.
        threshold = model.forward(IDS, exit=Exit("state", 2.0)).sure[0].quantile(0.9).item()
        out = model.forward(IDS, exit=Exit("state", threshold))
        assert {1, 4} <= set(out.depth.tolist())
        part = model.forward(IDS[:20], exit=Exit("state", threshold))
        assert_equal(part.logits, out.logits[:20])
        for t, depth in enumerate(out.depth.tolist()):
            assert_equal(out.logits[t], model._head(out.states[depth - 1][t:t + 1])[0])
        # Keys of a layer above come from the state at the exit.
        x, sees = out.states[2], [list(range(37))] * 4
        last = after_attention(model, 3, x, torch.stack([attention_of_row(model, 3, x, 36, sees)] * 37))[36]
        assert_equal(out.states[3][36], last if out.depth[36] == 4 else x[36])


def test_exit_losses():
    exits = {"method": "early_exit", "max_dropout": 0.0, "exit_scale": 0.5}
    model = random_model(exits | {"curriculum": "all"})
    ids, labels = [IDS[:-1]], [IDS[1:]]
    with torch.no_grad():
        states = model.forward(ids[0], "train").states
        ce = [F.cross_entropy(model._head(x), labels[0]) for x in states]
        assert_equal(model.loss(ids, labels).loss, ce[3])
        assert_equal(model.loss(ids, labels).total, (0.5 * ce[1] + 1.5 * ce[2] + 4.5 * ce[3]) / 6.5)
        rotational = twin(model, exits | {"rotation": 2})
        assert_equal(rotational.loss(ids, labels, step=6).total, (1.5 * ce[2] + 4.5 * ce[3]) / 6.0)
        assert_equal(rotational.loss(ids, labels, step=7).total, (0.5 * ce[1] + 4.5 * ce[3]) / 5.0)
        gradual = twin(model, exits | {"curriculum": "gradual"})
        assert_equal(gradual.loss(ids, labels, step=0, steps=8).total, ce[3])
        assert_equal(gradual.loss(ids, labels, step=1, steps=8).total, (1.5 * ce[2] + 4.5 * ce[3]) / 6.0)
        assert_equal(gradual.loss(ids, labels, step=4, steps=8).total, model.loss(ids, labels).total)


def stack(model, h, rows, layers=(1, 2), attend=None):
    """Layers on a part of the rows, gathered: a dense decoder that knows their positions only. Of these, those of
    `attend` attend."""
    places = (rows if attend is None else attend).nonzero()[:, 0].tolist()
    x = h.clone()
    for i in layers:
        attended = {t: attention_of_row(model, i, x, t, [[s for s in places if s <= t]] * 4) for t in places}
        y = after_attention(model, i, x, torch.stack([attended.get(t, torch.zeros(16)) for t in range(len(x))]))
        x = torch.where(rows[:, None], y, x)
    return x


def test_expert_choice_row_by_row():
    model = random_model(RECURSION | {"recursions": 3}, num_hidden_layers=8)
    names = model.config.shapes()
    assert not any(n.startswith(("model.layers.3.m", "model.layers.4.", "model.layers.6.")) for n in names)
    with torch.no_grad():
        for mode, length in (("train", 17), ("infer", 17)):
            out = model.forward(IDS[:length], mode)
            h, alive = out.states[0], torch.ones(length, dtype=torch.bool)
            for r in range(3):
                prefix = f"model.layers.{1 + 2 * r}.recursion_router."
                score = (h @ model.params[prefix + "weight"].T)[:, 0]
                if r and mode == "train":
                    best = sorted(alive.nonzero()[:, 0].tolist(), key=lambda t: -score[t])[:[17, 12, 6][r]]
                    alive = torch.zeros(length, dtype=torch.bool)
                    alive[best] = True
                elif r:
                    alive = alive & (score + model.params[prefix + "causal_bias"] > 0)
                    assert 0 < alive.sum() < length
                h = torch.where(alive[:, None], 0.1 * score.sigmoid()[:, None] * stack(model, h, alive) + h, h)
            assert_equal(model._layer(7, h, None, mode, {}), out.states[1])


@pytest.mark.parametrize("keys", [{}, {"alpha": 0.4}])
def test_token_choice_row_by_row(keys):
    model = random_model(RECURSION | {"recursions": 3, "choice": "token", "z_loss_coeff": 0.2} | keys,
                         num_hidden_layers=8)
    ids, labels = IDS[:17], IDS[1:18]
    with torch.no_grad():
        out = model.forward(ids, "train")
        first = out.states[0]
        raw = first @ model.params["model.layers.1.recursion_router.weight"].T
        p, depth = raw.softmax(-1), raw.argmax(-1) + 1
        assert set(depth.tolist()) == {1, 2, 3}
        h, ends = first, torch.zeros_like(first)
        for r in (1, 2, 3):
            h = stack(model, h, depth >= r)
            weighted = first + keys.get("alpha", 1) * p[:, r - 1:r] * h
            ends = torch.where((depth == r)[:, None], weighted, ends)
        assert_equal(model._layer(7, ends, None, "train", {}), out.states[1])
        balance = 3 * sum((depth == r).double().mean() * p[:, r - 1].mean() for r in (1, 2, 3))
        losses = model.loss([ids], [labels])
        assert_equal(losses.aux_loss, balance)
        assert_equal(losses.total, losses.loss + 0.3 * balance + 0.2 * raw.exp().sum(-1).log().square().mean())


def test_the_rule_that_serves_is_trained():
    """Cross-entropy of top-k membership, mean over the documents' rows that were asked."""
    model = random_model(RECURSION | {"recursions": 3}, num_hidden_layers=5)
    ids, labels = [IDS[:12], IDS[12:30]], [IDS[1:13], IDS[13:31]]
    with torch.no_grad():
        out = model.loss(ids, labels, "teacher_forced")
        penalty = 0
        for r in (1, 2):
            terms = []
            for forward in out.outs:
                routed, before = (forward.routes[f"layer{1 + n}"].routed for n in (r, r - 1))
                p = forward.routes[f"layer{1 + r}"].decision.probs[:, 0]
                terms += [-torch.where(routed, p, 1 - p)[t].log() for t in before.nonzero()[:, 0]]
            assert len(terms) == 30 - 10 * (r - 1)
            penalty += 0.2 * sum(terms) / len(terms)
        assert_equal(out.total - out.loss, penalty)


def test_recursions_that_are_drawn():
    for choice in ("expert", "token"):
        model = random_model(RECURSION | {"recursions": 3, "choice": choice, "decider": "every_nth", "alpha": 0.3},
                             num_hidden_layers=5)
        out = model.forward(IDS[:17])
        with torch.no_grad():
            h = ends = first = out.states[0]
            for r in range(3):
                rows = torch.tensor([3 - t % 3 > r for t in range(17)])
                assert torch.equal(out.routes[f"layer{1 + r}"].routed, rows)
                f = stack(model, h, rows, (1,))
                h = torch.where(rows[:, None], 0.3 * f + h, h) if choice == "expert" else f
                ends = torch.where(rows[:, None], h if choice == "expert" else first + 0.3 * f, ends)
            assert_equal(model._layer(4, ends, None, "infer", {}), out.states[1])


def test_routers_in_recursions():
    """Of every unrolled layer's own: with one of its rows only, the others take the bypass in that layer."""
    gate = {"method": "dtrnet", "layers": [1, 2, 3, 4], "estimator": "ste", "bypass": "identity"}
    model = random_model([RECURSION, gate], num_hidden_layers=6)
    assert {f"model.layers.{i}.router.weight_predictor.2.bias" for i in (1, 2, 3, 4)} <= model.config.shapes().keys()
    out = model.forward(IDS)
    assert list(out.routes)[:4] == ["layer1", "layer1.mixer", "layer2", "layer2.mixer"]
    with torch.no_grad():
        h = out.states[0]
        for r in (0, 1):
            x, rows = h, out.routes[f"layer{1 + 2 * r}"].routed
            for i in (1, 2):
                p = model._score(f"model.layers.{i + 2 * r}.router.", "mlp", x).sigmoid()
                attends = rows & (p > 0.5)
                assert torch.equal(out.routes[f"layer{i + 2 * r}.mixer"].routed, attends)
                assert 0 < attends.sum() < rows.sum()
                x = stack(model, x, rows, (i,), attends)
            score = h @ model.params[f"model.layers.{1 + 2 * r}.recursion_router.weight"].T
            h = torch.where(rows[:, None], 0.1 * score.sigmoid() * x + h, h)
        assert_equal(model._layer(5, h, None, "infer", {}), out.states[1])


def test_one_recursion():
    """Of one recursion: a sigmoid(theta H) f(H) + H of every row; by token choice f(H) + H."""
    model = random_model(RECURSION | {"recursions": 1})
    with torch.no_grad():
        first = model.forward(IDS).states[0]
        f = stack(model, first, torch.ones(37, dtype=torch.bool))
        g = 0.1 * (first @ model.params["model.layers.1.recursion_router.weight"].T).sigmoid()
        assert_equal(model.forward(IDS).states[1], model._layer(3, g * f + first, None, "infer", {}))
        token = twin(model, RECURSION | {"recursions": 1, "choice": "token"})
        assert_equal(token.forward(IDS).states[1], model._layer(3, f + first, None, "infer", {}))


SMOOTH = {  # where a small step changes no decision
    "window": WINDOW | {"budget": "target_l2", "aux_loss_coeff": 0.3},
    "soft_window": WINDOW | {"estimator": "soft"},
    "soft_keys": SOFT | {"soft_keys": True, "reserved": 2},
    "skip_soft_keys": {"method": "skip", "estimator": "soft", "soft_keys": True, "kv": "executed"},
    "blocks": BLOCKS,
    "recursion": RECURSION,
    "recursion_token": RECURSION | {"choice": "token"},
    "early_exit": {"method": "early_exit", "max_dropout": 0.0, "curriculum": "all"},
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_are_differences(name):
    model = random_model(SMOOTH[name], seed=2)
    ids, labels = [IDS[:24], IDS[24:36]], [IDS[1:25], IDS[25:37]]
    losses, grads = model.gradients(ids, labels)
    assert torch.isfinite(losses.total)
    generator = torch.Generator().manual_seed(4)
    for part in ("router", "self_attn", "mlp", "embed"):
        params = {n: p for n, p in model.params.items() if part in n and grads[n].abs().max() > 0}
        if not params:
            assert part == "router"
            continue
        step = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
        totals = []
        with torch.no_grad():
            for size in (1e-6, -2e-6, 1e-6):
                for n, p in params.items():
                    p += size * step[n]
                totals.append(model.loss(ids, labels).total.item())
        slope = sum((grads[n] * step[n]).sum().item() for n in params)
        assert abs((totals[0] - totals[1]) / 2e-6 - slope) <= 1e-5 * abs(slope) + 1e-8, part
