"""Configuration of a Detour model: Llama's keys and `routing`, which says what tokens may skip and who decides.

`routing` is an object, or a list of objects, one per method: its name (`method`), the layers that it governs (`layers`)
and all of its options. See docs/routing.md and docs/formats.md of Detour.
"""

from transformers import PretrainedConfig

METHODS = ("dtrnet", "dllm", "skip", "mod", "moe", "blocks", "recursion", "early_exit")


class DetourConfig(PretrainedConfig):
    model_type = "detour"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, vocab_size=32000, hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
                 num_attention_heads=15, num_key_value_heads=None, head_dim=None, hidden_act="silu",
                 max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=None, rope_parameters=None,
                 rope_scaling=None, tie_word_embeddings=False, initializer_range=0.02, use_cache=True, routing=None,
                 **kwargs):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        self.routing = routing
        # transformers 5 writes rope_parameters; older ones rope_theta, and rope_scaling where positions are scaled.
        rope = {"rope_type": "default", "rope_theta": rope_theta or 10000.0} | (rope_scaling or {}) | (
            rope_parameters or {})
        self.rope_parameters = rope
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
        if rope["rope_type"] != "default":
            raise ValueError(f"rope_type: expected \"default\", got \"{rope['rope_type']}\"")
        if hidden_act != "silu":
            raise ValueError(f'hidden_act: expected "silu", got "{hidden_act}"')
        for method in self.methods:
            if method["method"] not in METHODS:
                raise ValueError(f"routing: expected one of {', '.join(METHODS)}, got \"{method['method']}\"")
            if "layers" not in method:
                raise ValueError(f"routing: {method['method']} has no layers")

    @property
    def rope_theta(self):
        return self.rope_parameters["rope_theta"]

    @property
    def methods(self):
        """The objects of `routing`, none of a dense model."""
        objects = self.routing if isinstance(self.routing, list) else [self.routing]
        return [o for o in objects if o and o["method"] != "dense"]

    def methods_of(self, layer):
        return [m for m in self.methods if layer in m["layers"]]

    @property
    def recursion(self):
        return next((m for m in self.methods if m["method"] == "recursion"), None)

    def weights_layer(self, layer):
        """The layer whose attention, MLP and norms a layer uses: another one in the recursions after the first."""
        if self.recursion is None or layer not in self.recursion["layers"]:
            return layer
        first = self.recursion["layers"][0]
        return first + (layer - first) % (len(self.recursion["layers"]) // self.recursion["recursions"])
