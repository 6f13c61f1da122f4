"""The hooks of an attached model: what each position is, one `Step` per forward call, the routed cache.

The controller keeps nothing between calls; what the base model's hook learns travels to the text model's hook in a
thread-local slot that the latter empties.

Legend: B batch, N positions of this call.
"""

import threading
import types
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from mmroute.backbones.base import Family
from mmroute.backbones.tower import tower_of
from mmroute.cache import Chunk, RaggedCache
from mmroute.deepen.base import Deepener
from mmroute.engine.choice import build_groups
from mmroute.engine.compiled import Compiled
from mmroute.engine.layer import Step
from mmroute.engine.positions import describe, describe_next, merged
from mmroute.engine.train import GrowingCache
from mmroute.errors import UnsupportedCall
from mmroute.prune.base import Keep, Pruner
from mmroute.select import Group
from mmroute.tokens import MAX_HOPS, Modality, Tokens
from mmroute.trace import Call, Trace

__all__ = ["Controller", "prepare_cache"]


@dataclass
class _Pending:
    """What the base model's hook hands to the text model's hook."""

    chunk: Chunk
    route: bool
    ids: Tensor | None = None


_SLOT = threading.local()


class Controller:
    """One per attached model."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        pruner: Pruner | None,
        deepener: Deepener | None,
        prefix_tokens: int,
        strip_padding: bool,
        executor: Literal["dense", "physical"],
    ) -> None:
        self.model, self.family = model, family
        self.base, self.text = family.base_model(model), family.text_model(model)
        self.shape = family.shape(model)
        self.pruner, self.deepener = pruner, deepener
        self.prefix_tokens, self.strip_padding, self.executor = prefix_tokens, strip_padding, executor
        self.compiled: Compiled | None = None
        self.full_trace = False
        self.trace: Trace | None = None
        """Of the last call without a cache, and of the last cache used."""
        self.aux: dict[int, Keep] = {}
        """What the pruner returned at each layer of the last routed call."""
        self.tokens: Tokens | None = None
        """What the positions of that call were."""
        self.checkpointed: set[int] = set()
        self.tower = tower_of(family.name, model) if pruner is not None and "tower" in pruner.needs else None
        device = next(self.text.parameters()).device
        self.table = torch.zeros(self.shape.vocab, dtype=torch.long, device=device)
        self.table[family.vision_ids(model)] = int(Modality.VISION)
        self.delimiters = torch.zeros(self.shape.vocab, dtype=torch.bool, device=device)
        self.delimiters[family.delimiter_ids(model)] = True

    # ------------------------------------------------------------------ state

    @property
    def is_off(self) -> bool:
        return any(c is self for c in getattr(_SLOT, "off", ()))

    @contextmanager
    def off(self) -> Any:
        """The stock model with stock caches, in this thread, until the block ends."""
        before = getattr(_SLOT, "off", ())
        _SLOT.off = (*before, self)
        try:
            yield self.model
        finally:
            _SLOT.off = before

    def __getstate__(self) -> dict[str, Any]:
        """A copied model does not take along what the last call left: training tensors cannot be copied."""
        return {**self.__dict__, "trace": None, "aux": {}, "tokens": None}

    @property
    def routes(self) -> bool:
        """Whether anything at all is routed; if not, the stock path runs untouched."""
        layers = range(self.shape.layers)
        if self.deepener is not None and any(self.deepener.acts(i, self.shape.layers) for i in layers):
            return True
        return self.pruner is not None and not self.pruner.is_identity(self.shape.layers)

    @property
    def executes(self) -> bool:
        """Whether calls run the executor: something is routed, or it was asked for."""
        return self.routes or self.strip_padding or self.compiled is not None

    def new_cache(self, differentiable: bool = False) -> RaggedCache:
        depth = self.deepener.max_depth if self.deepener is not None else 0
        cache = (GrowingCache if differentiable else RaggedCache)(self.shape.layers, self.shape, depth)
        cache.trace.full = self.full_trace
        return cache

    # ------------------------------------------------------------------ hooks

    def before_base(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Reads what the ids are and takes our own keywords out of the call."""
        given = {k: kwargs.pop(k, None) for k in ("modality", "hop_ids", "generated", "relevance", "protected")}
        route = kwargs.pop("route", True)
        ids = kwargs.get("input_ids", args[0] if args else None)
        modality, protected = given["modality"], given["protected"]
        if ids is not None:
            ids = ids.to(self.table.device)
            modality = self.table[ids] if modality is None else modality
            delimiters = self.delimiters[ids]
            protected = delimiters if protected is None else delimiters | protected.bool()
        chunk = Chunk(modality, given["hop_ids"], None, protected, given["generated"], given["relevance"])
        _SLOT.pending = _Pending(chunk, route, ids)
        return args, kwargs

    def before_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Builds the `Step` and supplies the cache."""
        pending: _Pending | None = getattr(_SLOT, "pending", None)
        _SLOT.pending = None
        cache = kwargs.get("past_key_values")
        training = self.text.training and torch.is_grad_enabled()
        if self.is_off:
            if isinstance(cache, RaggedCache):
                raise UnsupportedCall("a routed cache cannot be used while routing is off; leave the off() block")
            self.stock_checkpointing()
            return args, kwargs
        if not (isinstance(cache, RaggedCache) or self.executes):
            self.stock_checkpointing()
            return args, kwargs
        self._check(cache, args, kwargs, training)
        given = kwargs.get("inputs_embeds")
        x: Any = given if given is not None else kwargs.get("input_ids", args[0] if args else None)
        if training:
            self._warn_frozen()
            kwargs["use_cache"] = False
        elif cache is None:
            use_cache = kwargs.get("use_cache")
            if self.text.config.use_cache if use_cache is None else use_cache:
                cache = kwargs["past_key_values"] = self.new_cache()
        step = self._step(x, cache, kwargs.get("attention_mask"), pending, training)
        if step.deep is not None:
            kwargs.update(self.family.carry(step.deep.to(x.device, x.dtype)))
        elif step.watch:
            step.deep = self.family.deep(kwargs)
        kwargs["mmroute_step"] = step
        # No layer reads a mask; a ready-made one keeps the text model from building (B, 1, N, S) of them.
        kwargs["attention_mask"] = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=x.device)
        return args, kwargs

    def after_text(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> Any:
        """Advances the cache, only now that every layer has run, and files what happened."""
        step: Step | None = kwargs.get("mmroute_step")
        if step is not None and out is None and step.cache is not None:  # the call failed: the cache is as before it
            for each in (step.cache, *step.cache.depth):
                each.forget_from(step.call.start)
            step.cache.in_hop, step.cache.last_hop = step.before
        if step is None or out is None:
            return out
        step.call.layers = [step.records[i] for i in sorted(step.records)]
        if step.full:
            here = zip(step.tokens.modality, step.tokens.valid, strict=True)
            step.call.modality = [kind[valid].tolist() for kind, valid in here]
            if step.ids is not None:
                step.call.ids = [ids[v].tolist() for ids, v in zip(step.ids, step.tokens.valid, strict=True)]
        cache = step.cache
        if cache is None:
            self.trace = Trace(self.shape, [step.call], full=self.full_trace)
        else:
            for each in (cache, *cache.depth):
                each.seen += step.tokens.shape[1]
            cache.remember(step.tokens)
            cache.trace.calls.append(step.call)
            if step.watch:
                cache.watched = step.watched()
            if self.pruner is not None and self.pruner.cap is not None:
                cache.trim(self.pruner)
            self.trace = cache.trace
        self.aux, self.tokens = step.aux, step.tokens
        attentions = getattr(out, "attentions", None)
        if attentions and len(attentions) != self.shape.layers:
            out.attentions = ()  # packed or empty layers have no map; the others would not stand in their place
        return out

    # ------------------------------------------------------------------ parts of a call

    def _check(self, cache: Any, args: tuple, kwargs: dict[str, Any], training: bool) -> None:
        if self.model._modules.get("mmroute") is not self.model.__dict__["_mmroute"].parts:
            raise UnsupportedCall(
                "model.mmroute was replaced (PEFT's modules_to_save trains a copy that is never called); leave it out "
                "of modules_to_save and call routed.unfreeze_parts() after get_peft_model"
            )
        if cache is not None and not isinstance(cache, RaggedCache):
            kind = type(cache).__name__ if isinstance(cache, Cache) else type(cache)
            raise UnsupportedCall(
                f"past_key_values is a {kind}; an attached model keeps its own routed cache: pass none, or one from an "
                "earlier routed call, or use routed.off()"
            )
        if training and cache is not None and not isinstance(cache, GrowingCache):
            raise UnsupportedCall(
                "this cache is written in place, which cannot be differentiated; train on the whole sequence with "
                "hop_ids, or hop by hop on routed.new_cache(differentiable=True)"
            )
        if len(args) > 1:
            raise UnsupportedCall(
                "an attached model takes everything but input_ids by keyword, attention_mask above all"
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim != 2):
            given = "a dict of masks" if isinstance(mask, dict) else f"a {mask.ndim}-D mask"
            raise UnsupportedCall(f"attention_mask is {given}; routing takes the 2-D padding mask (batch, columns)")

    def _warn_frozen(self) -> None:
        learned = list(self.model.__dict__["_mmroute"].parts.parameters())
        if learned and not any(p.requires_grad for p in learned):
            warnings.warn(
                "training with every routing part frozen: the routers learn nothing (get_peft_model freezes them); "
                "call routed.unfreeze_parts() after it",
                stacklevel=2,
            )

    def _step(
        self, x: Tensor, cache: RaggedCache | None, mask: Tensor | None, pending: _Pending | None, training: bool
    ) -> Step:
        B, N = x.shape[:2]
        chunk = pending.chunk if pending is not None else Chunk()
        route = pending.route if pending is not None else True
        start, drafts = 0, 0
        before: tuple[Tensor | None, Tensor | None] = (None, None)
        if cache is not None:
            if cache.batch_size not in (-1, B):
                raise UnsupportedCall(
                    f"this cache holds {cache.batch_size} rows, the call brings {B}; use its own batch, or select rows "
                    "with cache.batch_select_indices"
                )
            start, before = cache.seen, (cache.in_hop, cache.last_hop)
            if cache.next is not None:
                chunk, cache.next = merged(cache.next, chunk), None
            if cache.drafts_from is not None and N > 1:
                route = route and start < cache.drafts_from
                drafts = max(0, min(N, start + N - cache.drafts_from))
                chunk.generated = (torch.arange(start, start + N) >= cache.drafts_from).expand(B, N)
        if chunk.modality is None:
            raise UnsupportedCall(
                "embeddings came without saying what they are, and images would silently count as text; pass "
                "modality=(batch, positions) with 0 text, 1 vision, 2 latent, or set cache.next = Chunk(modality=...)"
            )
        if chunk.modality.shape != (B, N):
            raise UnsupportedCall(f"modality is {tuple(chunk.modality.shape)}, the call brings {(B, N)} positions")
        single = N == 1 and start > 0 and chunk.valid is None
        plain = single and chunk.hop is chunk.generated is None
        if plain and cache is not None and cache.last_hop is not None:
            tokens = describe_next(chunk, cache, self.prefix_tokens, x.device)
        else:
            tokens = describe(chunk, mask, cache, start, single, self.prefix_tokens, x.device)
        call = Call("decode" if single else "prefill", [], [], [], start)
        groups: list[Group] = []
        if single:
            new, hops = [[1, 0, 0] for _ in range(B)], [cache.hop if cache else 0] * B
        else:
            many = chunk.hop is not None
            first = 0 if many or cache is None else cache.hop
            groups, new = build_groups(tokens, MAX_HOPS if many else 1, first)
            hops = [groups[-1].hop if groups else first] * B
        call.new, call.hop = new, hops
        return Step(
            family=self.family,
            text=self.text,
            shape=self.shape,
            tokens=tokens,
            cache=cache,
            pruner=self.pruner if route else None,
            deepener=self.deepener if route else None,
            call=call,
            counts=[sum(row) for row in new],
            groups={0: groups},
            relevance=chunk.relevance,
            checkpoints=self._checkpoints(training),
            compiled=None if torch.is_grad_enabled() else self.compiled,
            dense=training and self.executor == "dense" and cache is None,
            full=self.full_trace,
            ids=pending.ids if pending is not None else None,
            single=single,
            drafts=drafts,
            before=before,
            seen=None if self.tower is None else self.tower.take(),
            watch=chunk.watch,
            deep=chunk.deep,
        )

    # ------------------------------------------------------------------ gradient checkpointing

    def _checkpoints(self, training: bool) -> frozenset[int]:
        """Layers to checkpoint, taken over from them: theirs would recompute the routing after the call is gone."""
        if not self.text.training:
            return frozenset()
        flagged = {i for i, layer in enumerate(self.text.layers) if getattr(layer, "gradient_checkpointing", False)}
        if flagged:  # checkpointing was switched on since the last call, for these layers
            self.checkpointed = flagged
            for i in flagged:
                self.text.layers[i].gradient_checkpointing = False
        if not (training and self._checkpointing):
            return frozenset()
        options = getattr(self.text.layers[0]._gradient_checkpointing_func, "keywords", None)
        if options is not None and options.get("use_reentrant", True):
            raise UnsupportedCall(
                "reentrant gradient checkpointing loses the gradients of keyword arguments; enable it with "
                'activation_checkpointing_enable({"use_reentrant": False})'
            )
        return frozenset(self.checkpointed)

    @property
    def _checkpointing(self) -> bool:
        return bool(getattr(self.text, "gradient_checkpointing", False))

    def stock_checkpointing(self) -> None:
        """Gives the layers back what `_checkpoints` took."""
        for i in self.checkpointed:
            self.text.layers[i].gradient_checkpointing = self._checkpointing
        self.checkpointed = set()


def prepare_cache(
    self: Any,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
) -> None:
    """Bound in place of `_prepare_cache_for_generation`: `generate()` gets a routed cache when anything is routed."""
    controller: Controller = self.__dict__["_mmroute"].controller
    stock = types.MethodType(type(self)._prepare_cache_for_generation, self)
    given = model_kwargs.get("past_key_values")
    routed = controller.executes and not controller.is_off
    if not routed and not isinstance(given, RaggedCache):
        stock(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
        return
    if generation_config.cache_implementation is not None:
        raise UnsupportedCall(
            f"cache_implementation={generation_config.cache_implementation!r} cannot hold rows of different lengths; "
            "leave it out: the routed cache replaces it"
        )
    if generation_config.use_cache is False:
        return
    if given is None:
        given = model_kwargs["past_key_values"] = controller.new_cache()
    elif not isinstance(given, RaggedCache):
        raise UnsupportedCall(
            f"past_key_values is a {type(given).__name__}; pass none, or the routed cache of an earlier call"
        )
    given.reserve(max_cache_length)
    given._is_user_defined = True
    given.drafts_from = None
    if "assisted" in str(generation_mode).lower():
        # The first call already brings drafts behind the prompt. A mask of ones was dropped by now, positions never.
        known = model_kwargs.get("attention_mask")
        columns = (known if known is not None else model_kwargs["position_ids"]).shape[-1]
        given.drafts_from = columns if columns > given.seen else given.seen + columns
    if generation_config.prefill_chunk_size is not None and controller.routes:
        warnings.warn(
            f"prefill_chunk_size={generation_config.prefill_chunk_size}: each chunk of the prompt chooses among its "
            "own positions, which is not what the whole prompt would choose; leave it out to route the prompt at once",
            stacklevel=3,
        )
