"""A Llama whose tokens choose their own way: the model that Detour trains, as it serves.

Decisions are hard and causal: a token's depends on itself, its position and the tokens before it. Inside there is no
padding: the real tokens of a batch are N rows, one sequence after the other, and each sequence attends to itself alone.
Written to be read, with gathered rows and a mask per sequence; Detour's own engine is the fast one. Left out: packed
documents, inputs_embeds, inner states as outputs, assisted generation, whatever training does beyond the loss.

One class per family of methods: Gate (dtrnet, dllm, skip), TopTokens (mod), Experts (moe), Blocks, Recursion.
early_exit serves as a dense model. Tensors are in modules of the layer that are named as in the checkpoint.

Shapes: N rows, D model, H heads, G kv heads, K head dim, S cached entries of a sequence, E experts.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration_detour import DetourConfig


class Columns:
    """A dataclass of tensors that have the same first dimension."""

    def __getitem__(self, which):
        return type(self)(*(column[which] for column in vars(self).values()))

    def followed_by(self, other):
        return type(self)(*(torch.cat(pair) for pair in zip(vars(self).values(), vars(other).values())))


@dataclasses.dataclass
class Rows(Columns):
    """The tokens of one call. Positions count the real tokens of a sequence."""

    ids: torch.Tensor  # int64 [N]
    sequences: torch.Tensor  # int64 [N], ascending
    positions: torch.Tensor  # int64 [N]
    cos: torch.Tensor  # [N,1,K/2]
    sin: torch.Tensor

    def turn(self, x):
        """x [N,heads,K] turned by its positions."""
        a, b = x.chunk(2, -1)
        return torch.cat([a * self.cos - b * self.sin, b * self.cos + a * self.sin], -1)


@dataclasses.dataclass
class Entries(Columns):
    """Keys and values that a sequence left in a layer, in the order of their positions."""

    keys: torch.Tensor  # [S,G,K]
    values: torch.Tensor  # [S,G,K]
    positions: torch.Tensor  # int64 [S]
    routed: torch.Tensor  # bool [S]: of rows that took the layer's attention


class DetourCache(Cache):
    """For each layer the entries of each sequence; a layer holds those of the rows that wrote there."""

    def __init__(self):
        super().__init__(layers=[])
        self.reset()

    def reset(self):
        self.num_columns = 0  # of input_ids, padding included
        self.lengths = None  # int64 [B], of each sequence
        self.entries = {}  # layer -> {sequence: Entries}

    def positions_of(self, real):
        """Positions [B,T] of the next columns; `real` says which are no padding, bool [B,T]."""
        lengths = torch.zeros_like(real[:, 0], dtype=torch.long) if self.lengths is None else self.lengths
        if len(lengths) != len(real):
            raise ValueError(f"past_key_values: expected {len(real)} sequences, got {len(lengths)}")
        self.num_columns += real.shape[1]
        self.lengths = lengths + real.sum(1)
        return lengths[:, None] + real.long().cumsum(1) - 1

    def batch_select_indices(self, indices):
        order = indices.tolist()
        self.lengths = self.lengths[indices.to(self.lengths.device)]
        for i, entries in self.entries.items():
            self.entries[i] = {new: entries[old] for new, old in enumerate(order) if old in entries}

    reorder_cache = batch_select_indices

    def batch_repeat_interleave(self, repeats):
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def get_seq_length(self, layer_idx=0):
        return self.num_columns

    def get_max_length(self, layer_idx=None):
        return -1

    def crop(self, *args, **kwargs):
        raise NotImplementedError("entries that fell out of a window are gone: tokens cannot be taken back")

    @property
    def batch_size(self):
        return -1 if self.lengths is None else len(self.lengths)

    @property
    def is_croppable(self):
        return False


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.group = config.num_attention_heads // config.num_key_value_heads
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def heads(self, x):
        return x.view(len(x), x.shape[1] // self.head_dim, self.head_dim)

    def own_values(self, h):
        """What rows would get that see themselves only, before W_O [N,H·K]."""
        return self.heads(self.v_proj(h)).repeat_interleave(self.group, 1).flatten(1)

    def forward(self, h, rows, entries, asks, writes, routed, rule):
        """Answers [asking rows,H·K], before W_O, of the rows `asks` among the keys of rows that `writes`; bool [N]."""
        asking = rows[asks]
        q = asking.turn(self.heads(self.q_proj(h[asks])))
        new = Entries(rows[writes].turn(self.heads(self.k_proj(h[writes]))), self.heads(self.v_proj(h[writes])),
                      rows.positions[writes], routed[writes])
        out = torch.zeros_like(q)
        for b in rows.sequences.unique().tolist():
            mine, its = asking.sequences == b, new[rows.sequences[writes] == b]
            seen = entries[b].followed_by(its) if b in entries else its
            entries[b] = rule.keep(seen)
            mask = seen.positions <= asking.positions[mine, None]
            mask = mask & rule.sees(q[mine], asking.positions[mine], routed[asks][mine], seen)
            k, v = (x.repeat_interleave(self.group, 1).transpose(0, 1) for x in (seen.keys, seen.values))
            answer = F.scaled_dot_product_attention(q[mine].transpose(0, 1)[None], k[None], v[None], attn_mask=mask)
            out[mine] = answer[0].transpose(0, 1)
        return out.flatten(1)


class Mixer:
    """Attention of all rows among all keys: what a layer does without a router there."""

    def mix(self, attention, x, h, rows, entries):
        """What attention adds to x [N,D]; h is x, normalised."""
        every = torch.ones(len(x), dtype=torch.bool, device=x.device)
        return attention.o_proj(attention(h, rows, entries, every, every, every, self))

    def sees(self, q, positions, routed, seen):
        """Of the keys before them, those that rows see: bool, [Q,S], [H,Q,S] or less. q [Q,H,K]."""
        return torch.ones((), dtype=torch.bool, device=q.device)

    def keep(self, seen):
        """The entries that later rows may see."""
        return seen


class Control:
    """Decides without a look at the content: random, every_nth, or frequency, by a table of the training text."""

    def __init__(self, tensors, method, layer, config):
        self.tensors, self.layer = tensors, layer
        self.kind, self.share, self.seed = method["decider"], method["share"], method["decider_seed"]
        if self.kind == "frequency":
            tensors.token_quantile = nn.Parameter(torch.zeros(config.vocab_size), requires_grad=False)
        elif self.kind not in ("random", "every_nth"):
            raise ValueError(f"decider: expected learned, random, every_nth or frequency, got {self.kind}")

    def score(self, rows):
        """In [0, 1), float64 [N]."""
        if self.kind == "random":
            return uniform(self.seed, 0, self.layer, rows.positions)
        if self.kind == "every_nth":
            steps = rows.positions.double() * self.share
            return steps - steps.floor()
        return self.tensors.token_quantile.double()[rows.ids]

    def takes(self, rows):
        return self.score(rows) < self.share

    def choice(self, rows, ways):
        """Which of `ways`, int64 [N]."""
        return rows.positions % ways if self.kind == "every_nth" else (self.score(rows) * ways).long()


def uniform(seed, a, b, index):
    """Random numbers of Philox4x32-10 in [0, 1), float64, for `index` < 2^32 and counters a, b: tensors or ints."""
    low = 0xFFFFFFFF
    c = [index, torch.zeros_like(index), torch.as_tensor(a).to(index), torch.as_tensor(b).to(index)]
    key = [seed & low, (seed >> 32) ^ (7 << 24)]  # 7: routing
    for _ in range(10):
        p, r = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # modulo 2^64
        c = [(r >> 32) & low ^ c[1] ^ key[0], r & low, (p >> 32) & low ^ c[3] ^ key[1], p & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    bits = c[1] << 32 | c[0]
    return ((bits >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def add_scorer(tensors, kind, hidden, config):
    """`weight_predictor`: two logits per row."""
    if kind not in ("mlp", "linear", "norm_mlp"):
        raise ValueError(f"scorer: expected mlp, linear or norm_mlp, got {kind}")
    width = 2 if kind == "linear" else hidden or max(config.hidden_size // 2, 1)
    net = {"0": nn.Linear(config.hidden_size, width)}
    if kind == "norm_mlp":
        net["norm"] = nn.RMSNorm(width, eps=config.rms_norm_eps)
    if kind != "linear":
        net["2"] = nn.Linear(width, 2)
    tensors.weight_predictor = nn.ModuleDict(net)


def logit_of(tensors, x):
    """logit(take) − logit(leave) [N]."""
    net = tensors.weight_predictor
    y = net["0"](x)
    y = net["norm"](y) if "norm" in net else y
    y = net["2"](F.silu(y)) if "2" in net else y
    return y[:, 1] - y[:, 0] if "norm" in net else y[:, 0] - y[:, 1]  # D-LLM's second column takes


class Gate:
    """Two ways: take the span, or leave it (dtrnet, dllm, skip)."""

    def __init__(self, tensors, method, layer, config):
        self.tensors, self.reserved = tensors, method["reserved"]
        self.weighted = method["estimator"] == "prob_gate"
        self.control = None
        if method["decider"] == "learned":
            add_scorer(tensors, method["scorer"], method["hidden"], config)
        else:
            self.control = Control(tensors, method, layer, config)

    def decide(self, x, rows):
        """Rows that take the span, bool [N], and the weight of the way that each takes [N]."""
        reserved = rows.positions < self.reserved
        if self.control:
            return self.control.takes(rows) | reserved, x.new_ones(len(x))
        logit = logit_of(self.tensors, x)
        p = logit.sigmoid()
        takes = (p > 0.5) | reserved
        return takes, torch.where(takes, p, (-logit).sigmoid()) if self.weighted else torch.ones_like(p)


class GatedMixer(Mixer):
    """Attention with a gate: rows that do not attend get a bypass."""

    def __init__(self, tensors, method, layer, config):
        self.gate, self.tensors, self.bypass = Gate(tensors, method, layer, config), tensors, method["bypass"]
        self.all_write = method["kv"] == "all"
        self.window, self.sink = method["window"], method["sink"]
        if self.bypass not in ("value", "constant", "identity", "window"):
            raise ValueError(f"bypass: expected value, constant, identity or window, got {self.bypass}")
        if self.bypass == "constant":
            tensors.bypass_constant = nn.Parameter(torch.zeros(config.hidden_size))
        self.scales = method["value_scale"]
        if self.scales:
            tensors.bypass_scale = nn.Parameter(torch.ones(config.num_attention_heads))

    def mix(self, attention, x, h, rows, entries):
        routed, weight = self.gate.decide(x, rows)
        every = torch.ones_like(routed)
        asks = every if self.bypass == "window" else routed
        writes = every if self.bypass == "window" or self.all_write else routed
        heads = h.new_zeros(len(h), attention.o_proj.in_features)
        heads[asks] = attention(h, rows, entries, asks, writes, routed, self)
        if self.bypass in ("value", "constant"):
            values = attention.own_values(h[~routed])
            if self.scales:
                values = (values.unflatten(1, (len(self.tensors.bypass_scale), -1))
                          * self.tensors.bypass_scale[:, None]).flatten(1)
            heads[~routed] = values
        y = attention.o_proj(heads)
        if self.bypass == "constant":
            y = y + ~routed[:, None] * self.tensors.bypass_constant
        return weight[:, None] * y

    def sees(self, q, positions, routed, seen):
        if self.bypass != "window":
            return super().sees(q, positions, routed, seen)
        near = (seen.positions > positions[:, None] - self.window) | (seen.positions < self.sink)
        return near | routed[:, None] & seen.routed

    def keep(self, seen):
        if self.bypass != "window" or len(seen.positions) == 0:
            return seen
        recent = seen.positions > seen.positions[-1] + 1 - self.window
        return seen[recent | seen.routed | (seen.positions < self.sink)]


class Blocks(Mixer):
    """Each head sees its own block of keys and the best earlier ones (MoBA)."""

    def __init__(self, tensors, method, layer, config):
        self.size, self.top_k, self.layer = method["block_size"], method["top_k"], layer
        self.random, self.seed = method["decider"] == "random", method["decider_seed"]

    def sees(self, q, positions, routed, seen):
        entry = torch.searchsorted(seen.positions, positions)
        own, block = entry // self.size, torch.arange(len(seen.positions), device=q.device) // self.size
        number = torch.arange(int(block[-1]) + 1, device=q.device)
        if self.random:
            head = torch.arange(q.shape[1], device=q.device)[:, None, None]
            scores = uniform(self.seed, positions[:, None], self.layer * 1024 + head, number)
        else:
            keys = F.pad(seen.keys.double(), (0, 0, 0, 0, 0, len(number) * self.size - len(block)))
            sums = keys.view(len(number), self.size, *keys.shape[1:]).sum(1)
            sums = sums.repeat_interleave(q.shape[1] // sums.shape[1], 1)
            scores = torch.einsum("qhk,nhk->hqn", q.double(), sums)
        earlier = number < own[:, None]
        order = scores.masked_fill(~earlier, -torch.inf).sort(descending=True, stable=True).indices
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :self.top_k - 1], True)
        return (chosen & earlier | (number == own[:, None]))[..., block]


class TopTokens:
    """The layer for tokens of a high score (mod), by the causal rule that was trained beside it."""

    def __init__(self, tensors, method, layer, config):
        self.tensors, self.causal, self.control = tensors, method["causal"], None
        if method["decider"] != "learned":
            self.control = Control(tensors, method, layer, config)
            return
        if self.causal == "none":
            raise ValueError('mod with causal "none": top-k looks ahead, so that this model cannot serve')
        tensors.weight = nn.Parameter(torch.zeros(1, config.hidden_size))
        if self.causal == "bce":
            tensors.causal_bias = nn.Parameter(torch.zeros(1))
        else:
            tensors.predictor = nn.Module()
            add_scorer(tensors.predictor, "mlp", method["hidden"], config)

    def decide(self, x, rows):
        if self.control:
            return self.control.takes(rows), x.new_ones(len(x))
        score = (x @ self.tensors.weight.T)[:, 0]
        rule = score + self.tensors.causal_bias if self.causal == "bce" else logit_of(self.tensors.predictor, x)
        return rule > 0, score


class SwiGlu(nn.Module):
    def __init__(self, config, gate, up, down):
        super().__init__()
        self.names = gate, up, down
        narrow, wide = config.hidden_size, config.intermediate_size
        for name, inputs, outputs in ((gate, narrow, wide), (up, narrow, wide), (down, wide, narrow)):
            self.add_module(name, nn.Linear(inputs, outputs, bias=False))

    def forward(self, h):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(h)) * up(h))


class Mlp:
    """The MLP for every row: what a layer does without a router there."""

    def feed(self, mlp, x, h, rows):
        """What it adds [N,D] to rows of which h are the normalised ones; x is the layer's input."""
        return mlp(h)


class GatedMlp(Mlp):
    """The MLP for some rows (skip)."""

    def __init__(self, tensors, method, layer, config):
        self.gate = Gate(tensors, method, layer, config)

    def feed(self, mlp, x, h, rows):
        takes, weight = self.gate.decide(x, rows)
        y = torch.zeros_like(h)
        y[takes] = weight[takes, None] * mlp(h[takes])
        return y


class Experts(Mlp):
    """A few of several MLPs for each row (moe)."""

    def __init__(self, tensors, method, layer, config):
        self.tensors, self.count, self.top_k = tensors, method["experts"], method["top_k"]
        self.normalize, self.control = method["normalize"], None
        tensors.experts = nn.ModuleList(SwiGlu(config, "w1", "w3", "w2") for _ in range(self.count))
        if method["decider"] != "learned":
            self.control = Control(tensors, method, layer, config)
            return
        tensors.gate = nn.Linear(config.hidden_size, self.count, bias=False)
        if method["bias_rate"] > 0:
            tensors.expert_bias = nn.Parameter(torch.zeros(self.count), requires_grad=False)

    def scores(self, h, rows):
        """Probabilities of the experts [N,E]."""
        if not self.control:
            return self.tensors.gate(h).softmax(-1)
        following = torch.arange(self.top_k, device=h.device)
        chosen = (self.control.choice(rows, self.count)[:, None] + following) % self.count
        return h.new_full((len(h), self.count), -20.0).scatter(1, chosen, 20.0).softmax(-1)

    def feed(self, mlp, x, h, rows):
        scores = self.scores(h, rows)
        order = (scores + getattr(self.tensors, "expert_bias", 0.0)).sort(descending=True, stable=True).indices
        chosen = order[:, :self.top_k]
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / weights.sum(1, keepdim=True)
        y = torch.zeros_like(h) if mlp is None else mlp(h)
        for e, expert in enumerate(self.tensors.experts):
            row, place = (chosen == e).nonzero(as_tuple=True)
            y[row] = y[row] + weights[row, place, None] * expert(h[row])
        return y


# What a method decides in a layer, the module that holds its tensors there, and its class.
ROUTERS = {
    "dtrnet": [("mixer", "router", GatedMixer)],
    "dllm": [("decider", "layer_router", Gate)],
    "skip": [("mixer", "attn_router", GatedMixer), ("ffn", "mlp_router", GatedMlp)],
    "mod": [("decider", "mod_router", TopTokens)],
    "moe": [("ffn", "block_sparse_moe", Experts)],
    "blocks": [("mixer", None, Blocks)],
}


def tensors_of(layer, holder):
    """The module of this name in the layer; two routers may share one."""
    if holder is not None and not hasattr(layer, holder):
        setattr(layer, holder, nn.Module())
    return holder and getattr(layer, holder)


class DetourLayer(nn.Module):
    """One layer: its weights, unless it runs with another layer's, and its routers."""

    def __init__(self, config, i):
        super().__init__()
        methods = {m["method"]: m for m in config.methods_of(i)}
        self.decider, self.mixer, self.ffn = None, Mixer(), Mlp()
        for name, method in methods.items():
            for place, holder, kind in ROUTERS.get(name, ()):
                setattr(self, place, kind(tensors_of(self, holder), method, i, config))
        if config.weights_layer(i) == i:
            self.self_attn = Attention(config)
            self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            if "moe" not in methods or methods["moe"]["shared_expert"]:
                self.mlp = SwiGlu(config, "gate_proj", "up_proj", "down_proj")

    def forward(self, x, rows, entries, held):
        """x [N,D] of all rows -> the same; `held` is the layer whose weights this one uses."""
        if self.decider is None:
            return self.block(x, rows, entries, held)
        takes, weight = self.decider.decide(x, rows)
        inner, y = x[takes], x.clone()
        y[takes] = inner + weight[takes, None] * (self.block(inner, rows[takes], entries, held) - inner)
        return y

    def block(self, x, rows, entries, held):
        """Attention and MLP of rows that take the layer."""
        y = x + self.mixer.mix(held.self_attn, x, held.input_layernorm(x), rows, entries)
        h = held.post_attention_layernorm(y)
        return y + self.ffn.feed(getattr(held, "mlp", None), x, h, rows)


class Recursion:
    """A stack of layers that runs several times, for each row as often as it needs (Mixture-of-Recursions)."""

    def __init__(self, config, layers):
        method = config.recursion
        self.layers, self.count = method["layers"], method["recursions"]
        self.period = len(self.layers) // self.count
        self.by_token, self.control = method["choice"] == "token", None
        self.alpha = method["alpha"] or (1.0 if self.by_token else 0.1)
        self.leaders = []
        for r in range(1 if self.by_token else self.count):
            tensors = tensors_of(layers[self.layers[r * self.period]], "recursion_router")
            self.leaders.append(tensors)
            if method["decider"] != "learned":  # all recursions go by the same
                self.control = Control(tensors, method, self.layers[0], config)
                continue
            tensors.weight = nn.Parameter(torch.zeros(self.count if self.by_token else 1, config.hidden_size))
            if not self.by_token and r > 0:
                if method["causal"] == "none":
                    raise ValueError('recursion with causal "none": top-k looks ahead, so that this model cannot serve')
                tensors.causal_bias = nn.Parameter(torch.zeros(1))

    def run(self, x, rows, run_layer):
        """x [N,D] after all recursions; run_layer(i, x, rows) runs layer i."""
        first, depth, gate = x, None, x.new_full((len(x),), self.alpha)
        if self.control:
            depth = self.count - self.control.choice(rows, self.count)
        elif self.by_token:
            best = (x @ self.leaders[0].weight.T).softmax(-1).max(-1)
            depth, gate = best.indices + 1, self.alpha * best.values
        takes = torch.ones_like(rows.positions, dtype=torch.bool)
        for r in range(self.count):
            if depth is not None:
                takes = depth > r
            else:
                score = (x @ self.leaders[r].weight.T)[:, 0]
                gate = self.alpha * score.sigmoid()
                takes = takes & (score + self.leaders[r].causal_bias > 0) if r > 0 else takes
            inner, its, y = x[takes], rows[takes], x.clone()
            for i in self.layers[r * self.period:(r + 1) * self.period]:
                inner = run_layer(i, inner, its)
            if self.by_token:  # rows that are done add to what they came with
                inner = torch.where(depth[takes, None] == r + 1, first[takes] + gate[takes, None] * inner, inner)
            else:
                inner = x[takes] + gate[takes, None] * inner
            y[takes] = inner
            x = y
        return x


class DetourModel(nn.Module):
    """Ids to states."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DetourLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.recursion = Recursion(config, self.layers) if config.recursion else None

    def forward(self, input_ids, attention_mask=None, cache=None):
        """Normalised states [B,T,D] of ids [B,T], 0 where the mask is 0; `cache` has what came before, and grows."""
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.dim() != 2 or attention_mask.shape[1] < input_ids.shape[1]:
                raise ValueError(f"attention_mask: expected {tuple(input_ids.shape)}, or with the tokens before, got "
                                 f"{tuple(attention_mask.shape)}")
            real = attention_mask[:, -input_ids.shape[1]:].to(input_ids.device) != 0
        cache = DetourCache() if cache is None else cache
        rows = self._rows(input_ids, real, cache)
        x = self.embed_tokens(rows.ids)

        def run_layer(i, x, rows):
            held = self.layers[self.config.weights_layer(i)]
            return self.layers[i](x, rows, cache.entries.setdefault(i, {}), held)

        recursive = self.recursion.layers if self.recursion else []
        for i in range(len(self.layers)):
            if i not in recursive:
                x = run_layer(i, x, rows)
            elif i == recursive[0]:
                x = self.recursion.run(x, rows, run_layer)
        states = x.new_zeros(*input_ids.shape, x.shape[1])
        states[real] = self.norm(x)
        return states

    def _rows(self, input_ids, real, cache):
        positions = cache.positions_of(real)[real]
        half = self.config.head_dim // 2
        exponents = torch.arange(half, dtype=torch.float64, device=positions.device) / half
        frequencies = 1.0 / (self.config.rope_theta**exponents).float()
        angles = (positions.float()[:, None] * frequencies)[:, None]
        dtype = self.embed_tokens.weight.dtype
        return Rows(input_ids[real], real.nonzero()[:, 0], positions, angles.cos().to(dtype), angles.sin().to(dtype))


class DetourForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = DetourConfig
    base_model_prefix = "model"
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.model = DetourModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, use_cache=None,
                logits_to_keep=0):
        """Logits [B,T,V] of ids int64 [B,T], or of the last `logits_to_keep` tokens; the loss if there are labels.

        attention_mask: [B,T], or longer by the tokens in the cache. 0 is padding, which is not routed, seen or counted;
        positions follow from it.
        """
        if past_key_values is not None and not isinstance(past_key_values, DetourCache):
            raise ValueError(f"past_key_values: expected a DetourCache, got {type(past_key_values).__name__}")
        if past_key_values is None and (self.config.use_cache if use_cache is None else use_cache):
            past_key_values = DetourCache()
        states = self.model(input_ids, attention_mask, past_key_values)
        if isinstance(logits_to_keep, int):
            logits_to_keep = slice(-logits_to_keep if logits_to_keep else None, None)
        logits = self.lm_head(states[:, logits_to_keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        """`generate` starts with a cache of this model's own kind."""
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = DetourCache()
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """Without what transformers 4 adds: positions follow from the mask and the cache."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        return {k: v for k, v in inputs.items() if v is not None and k not in ("position_ids", "cache_position")}
