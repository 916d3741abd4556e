"""The classes for transformers in an exported modeling file.

artifacts/hf/export.py replaces the imports from models/ by their definitions. Shape suffixes as in
models/layers.py.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.versions import require_version

from models.cache import HeldAttention
from models.layers import Attend, BlockStack, Embedding, Linear, Rotary, rotary_table
from models.losses import log_probs
from models.recursive_reasoning import build_recursion


class TRMConfig(PreTrainedConfig):
    """The architecture, as in `arch` of the run (config/schema/arch.py), and the depth to use."""

    model_type = "tiny_recursive_model"

    name: str = "trm"
    vocab_size: int = 32000
    hidden_size: int = 512
    num_heads: int = 8
    expansion: float = 4.0
    H_layers: int = 0
    L_layers: int = 2
    H_cycles: int = 3
    L_cycles: int = 6
    norm: str = "post"
    qk_norm: bool = False
    attention: str = "causal"
    pos_encodings: str = "rope"
    rope_theta: float = 10000.0
    loss: str = "softmax"
    halt_max_steps: int = 4
    halt_scale: list[float] | None = None
    """With halt_shift, the calibration of the halting logit at each ACT step; None: uncalibrated."""
    halt_shift: list[float] | None = None
    act_steps: int | None = None
    """ACT steps per token; None: halt_max_steps."""
    halt_threshold: float | None = None
    """A token of an answer halts once its halting probability exceeds this; None: every token takes all steps."""
    tags: dict[str, list[int]] | None = None
    """For each role, the ids of its tag after BOS."""

    def __post_init__(self, **others: Any) -> None:
        self.head_dim = self.hidden_size // self.num_heads
        self.halt_scale = self.halt_scale or [1.0] * self.halt_max_steps
        self.halt_shift = self.halt_shift or [0.0] * self.halt_max_steps
        self.act_steps = self.act_steps or self.halt_max_steps
        # The cache's layers: one for each ACT step, level call and block.
        recursion = build_recursion(self)
        self.num_hidden_layers = self.halt_max_steps * sum(recursion.levels[level] for level in recursion.calls)
        super().__post_init__(**others)


ArchConfig = TRMConfig  # as models/layers.py and the recursions call it


class LaneAttention:
    """Attention of new positions. Each call uses the next lane, a layer of `cache`.

    visible: bool [B, 1, T, S], whether each of T new positions sees each of S positions.
    """

    def __init__(self, cache: DynamicCache | None, visible: Tensor) -> None:
        self.cache, self.visible = cache, visible
        self.numbers = itertools.count()

    def __call__(self, q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor) -> Tensor:
        k_BHSK, v_BHSK = self.keep(k_BTHK, v_BTHK)
        return F.scaled_dot_product_attention(q_BTHK.transpose(1, 2), k_BHSK, v_BHSK, attn_mask=self.visible).transpose(1, 2)

    def keep(self, k_BTHK: Tensor, v_BTHK: Tensor) -> tuple[Tensor, Tensor]:
        """Add new positions' keys and values to the next lane; returns all of it, [B, H, S, K]."""
        k_BHTK, v_BHTK = k_BTHK.transpose(1, 2), v_BTHK.transpose(1, 2)
        if self.cache is None:
            return k_BHTK, v_BHTK
        k_BHSK, v_BHSK = self.cache.update(k_BHTK, v_BHTK, next(self.numbers))
        return k_BHSK, v_BHSK


def prompt_segments(ids_BT: Tensor, config: TRMConfig, is_begun: bool) -> Tensor:
    """The prompt segment of each id [B, T], from 1: a run of turns up to an assistant's tag; 0 in
    an answer.

    is_begun: the ids continue earlier ones, with an answer up to the first BOS. A BOS without a tag
    begins raw text, which counts as an answer.
    """
    positions = ids_BT.shape[1]
    is_bos_BT = ids_BT == config.bos_token_id
    begins_BT = torch.zeros_like(is_bos_BT)  # the first id of each answer
    begins_BT[:, 0] = is_begun
    is_raw_BT = is_bos_BT.clone()
    for role, tag in (config.tags or {}).items():
        tagged_BT = is_bos_BT.clone()
        for place, tag_id in enumerate(tag, 1):
            tagged_BT &= F.pad(ids_BT[:, place:] == tag_id, (0, min(place, positions)))
        is_raw_BT &= ~tagged_BT
        if role == "assistant":
            begins_BT |= F.pad(tagged_BT, (1 + len(tag), 0))[:, :positions]
    begins_BT |= F.pad(is_raw_BT, (1, 0))[:, :positions]
    place_T = torch.arange(positions, device=ids_BT.device)
    last_begin_BT, last_bos_BT = (torch.where(found, place_T, -1).cummax(1).values for found in (begins_BT, is_bos_BT))
    return (1 + begins_BT.cumsum(1)).masked_fill(last_begin_BT > last_bos_BT, 0)


class TRMForCausalLM(PreTrainedModel, GenerationMixin):
    """The recursion with its embedding and heads: next-token logits at a fixed depth, or with early
    halting of each token.

    Logits of a stablemax model are log p, because transformers applies a softmax to them. With
    attention "prefix", pass a prompt whole.
    """

    config_class = TRMConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.embedding_weight"}  # noqa: RUF012

    def __init__(self, config: TRMConfig) -> None:
        require_version("transformers>=5.24")  # earlier ones name `cache` otherwise
        super().__init__(config)
        self.recursion = build_recursion(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.q_head = Linear(config.hidden_size, 2, bias=True)
        for name, layers in self.recursion.levels.items():
            self.add_module(name, BlockStack(layers, config))
        for name in self.recursion.initial_states:
            self.register_buffer(name, torch.zeros(config.hidden_size))
        self.post_init()

    @deprecate_kwarg("past_key_values", "6.0.0", new_name="cache")
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: DynamicCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        act_steps: int | None = None,
        halt_threshold: float | None = None,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of `input_ids` [B, T], which follow those in `cache`. None: the config's value."""
        config = self.config
        act_steps, threshold = act_steps or config.act_steps, halt_threshold or config.halt_threshold
        if not 1 <= act_steps <= config.halt_max_steps:
            raise ValueError(f"act_steps is {act_steps}: the model has 1 to {config.halt_max_steps}")
        if use_cache and cache is None:
            cache = DynamicCache(config=config)
        past = cache.get_seq_length() if cache is not None else 0
        if attention_mask is None:
            attention_mask = input_ids.new_ones(len(input_ids), past + input_ids.shape[1])
        if position_ids is None:
            position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, past:]
        exact = torch.promote_types(self.dtype, torch.float32)
        rotary = None
        if config.pos_encodings == "rope":
            # On the host: not every device has float64.
            table = rotary_table(position_ids.cpu(), config.head_dim, config.rope_theta, exact)
            rotary = Rotary(*(part.to(self.device) for part in table))
        present_BT = attention_mask[:, past:] != 0
        segments_BT = prompt_segments(input_ids.masked_fill(~present_BT, -1), config, past > 0)
        lanes = LaneAttention(cache, self._visible(attention_mask, segments_BT))
        held = HeldAttention(lanes)
        x_BTD = self.embed_tokens(input_ids, self.dtype) * math.sqrt(config.hidden_size)
        states = tuple(self.get_buffer(name).expand_as(x_BTD) for name in self.recursion.initial_states)
        active_BT = torch.ones_like(present_BT)
        output_BTD = x_BTD
        for step in range(act_steps):
            if threshold is None:
                states, output_BTD = self._act_step(states, x_BTD, rotary, lanes)
            elif active_BT.any():
                new_states, new_output_BTD = self._act_step(states, x_BTD, rotary, held)
                active_BT1 = active_BT.unsqueeze(-1)
                states = tuple(torch.where(active_BT1, new, old) for new, old in zip(new_states, states, strict=True))
                output_BTD = torch.where(active_BT1, new_output_BTD, output_BTD)
                scale, shift = config.halt_scale[step], config.halt_shift[step]
                halting_BT = (self.q_head(output_BTD)[..., 0].to(exact) * scale + shift).sigmoid() > threshold
                active_BT = held.active_BT = active_BT & ~(halting_BT & (segments_BT == 0))
            else:
                for kv in held.lanes:
                    lanes.keep(*kv)
        shown = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = self.lm_head(output_BTD[:, shown]).to(exact)
        if config.loss == "stablemax":
            logits_BTV = log_probs(logits_BTV, config.loss)
        loss = None if labels is None else self.loss_function(logits_BTV, labels, config.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits_BTV, cache=cache)

    def _act_step(self, states: Any, x_BTD: Tensor, rotary: Any, attend: Attend) -> Any:
        def call(level: str, h_BTD: Tensor) -> Tensor:
            result: Tensor = self.get_submodule(level)(h_BTD, rotary, attend)
            return result

        return self.recursion.step(states, x_BTD, call)

    def _visible(self, attention_mask: Tensor, segments_BT: Tensor) -> Tensor:
        """What new positions see: the past, and with attention "prefix" their prompt segment."""
        key_S = torch.arange(attention_mask.shape[1], device=attention_mask.device)
        past = len(key_S) - segments_BT.shape[1]
        query_T1 = key_S[past:, None]
        visible = (key_S <= query_T1).unsqueeze(0)
        if self.config.attention == "prefix":
            is_prompt_BT1 = (segments_BT != 0).unsqueeze(2)
            visible = visible | F.pad((segments_BT.unsqueeze(2) == segments_BT.unsqueeze(1)) & is_prompt_BT1, (past, 0))
        # A softmax over nothing would be NaN.
        return (visible & (attention_mask != 0).unsqueeze(1) | (key_S == query_T1)).unsqueeze(1)

    def _prepare_generation_config(self, generation_config: Any, **kwargs: Any) -> Any:
        """Pass the depth in a generation config on to `forward`."""
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name in ("act_steps", "halt_threshold"):
            model_kwargs.setdefault(name, getattr(generation_config, name, None))
        return generation_config, model_kwargs
