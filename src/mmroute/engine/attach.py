"""`attach` makes a stock `from_pretrained` model routable in place; `detach` leaves it bit-identical."""

import logging
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from mmroute import backbones
from mmroute.backbones.base import Family
from mmroute.cache import RaggedCache
from mmroute.deepen.base import Deepener
from mmroute.engine.attention import register
from mmroute.engine.compiled import Compiled
from mmroute.engine.controller import Controller, prepare_cache
from mmroute.engine.layer import routed_forward
from mmroute.engine.windows import InOneCall
from mmroute.errors import ConfigError, UnsupportedCall
from mmroute.prune.base import Pruner
from mmroute.think.base import Thinker
from mmroute.trace import Trace

__all__ = ["Parts", "Routed", "attach", "detach", "fit"]

log = logging.getLogger(__name__)


class Parts(nn.Module):
    """What was added to the model: everything learned lives here, under `model.mmroute`."""

    def __init__(self, prune: Pruner | None, deepen: Deepener | None, think: Thinker | None = None) -> None:
        super().__init__()
        self.prune, self.deepen = prune, deepen
        self.think = None if think is None else think.learned


def attach(
    model: nn.Module,
    processor: Any = None,
    *,
    prune: Pruner | None = None,
    deepen: Deepener | None = None,
    think: Thinker | None = None,
    prefix_tokens: int = 2,
    strip_padding: bool = False,
    executor: Literal["dense", "physical"] | None = None,
) -> "Routed":
    """Makes a stock model routable, in place.

    Args:
        model: a `from_pretrained` model of a supported family.
        processor: turns chat messages into tensors; default the one `mmroute.load` put on the model.
        prune: which positions run each layer; None runs all.
        deepen: which positions run a layer again; None is none.
        think: how `answer` reasons unless told otherwise; None is written text.
        prefix_tokens: positions at the start of each hop that are never pruned; kappa in DARE.
        strip_padding: run the executor even where nothing is routed, so that padding costs nothing.
        executor: for training: "dense" gives kept and pruned positions a gradient, "physical" is fast.
            Default: dense if the pruner has parameters.

    Returns:
        A handle that answers, generates, saves and detaches; `model` itself works on as before.

    Raises:
        UnsupportedBackbone: no family file knows the model.
        UnsupportedCall: attached already, loaded with an attention backend that would run unmasked, or spread over
            devices by hand.
        ConfigError: the processor is another model's, or a part is not of its kind.
    """
    if "_mmroute" in model.__dict__:
        raise UnsupportedCall("the model is attached already; call routed.detach() first")
    if prefix_tokens < 0:
        raise ConfigError(f"prefix_tokens is a count of positions, given {prefix_tokens}; 0 protects none")
    if executor not in (None, "dense", "physical"):
        raise ConfigError(f"executor is 'dense' or 'physical', given {executor!r}")
    for name, part, kind in (("prune", prune, Pruner), ("deepen", deepen, Deepener), ("think", think, Thinker)):
        if part is not None and not isinstance(part, kind):
            raise ConfigError(
                f"{name} takes a {kind.__name__}, given {type(part).__name__}; build one with "
                f'mmroute.hub.load("{name}", "<name>", ...)'
            )
    family = backbones.of(model)
    processor = processor if processor is not None else model.__dict__.get("processor")
    if processor is not None:
        family.check_processor(model, processor)
    text = family.text_model(model)
    _check_devices(text)
    base = text.config._attn_implementation
    if prune is not None:
        prune.fit(family.shape(model))
    if deepen is not None:
        deepen.fit(family.shape(model))
    if think is not None:
        fit(think, family, model)
    learned = prune is not None and any(True for _ in prune.parameters())
    name = register(base)
    controller = Controller(
        model, family, prune, deepen, prefix_tokens, strip_padding, executor or ("dense" if learned else "physical")
    )
    parts = Parts(prune, deepen, think)
    if parts.state_dict():
        parts.to(next(text.parameters()).device, torch.float32)
    routed = Routed(model, processor, controller, parts)
    routed.think = think
    routed._splice(name, base)
    return routed


def _check_devices(text: Any) -> None:
    """Layers on several devices run only where accelerate's hooks move what goes from one to the next."""
    places = {str(p.device): i for i, layer in enumerate(text.layers) for p in layer.parameters()}
    hooked = all(any(hasattr(m, "_hf_hook") for m in layer.modules()) for layer in text.layers)
    if len(places) > 1 and not hooked:
        listed = ", ".join(f"{place} (layer {i})" for place, i in sorted(places.items()))
        raise UnsupportedCall(
            f"the model's layers lie on several devices ({listed}) and nothing moves hidden states between them; load "
            'it with device_map="auto", or put it on one device: model.to(...)'
        )


def fit(think: Thinker, family: Family, model: nn.Module) -> None:
    """Lets a way to think read off the model what its latent steps need; once, the first time.

    Raises:
        UnsupportedCall: it looks at image tokens by their place, and some of this family's have none.
    """
    if think.needs_row and family.lead(model):
        raise UnsupportedCall(
            f"{family.name}: {family.lead(model)} positions of every image lie in no grid, so image tokens cannot be "
            "replayed by place; think with coconut or pause, or take another family"
        )
    text = family.text_model(model)
    words = text.embed_tokens.weight
    is_text = torch.ones(len(words), dtype=torch.bool, device=words.device)
    is_text[family.vision_ids(model)] = False
    think.fit(words[is_text], text.norm.weight)
    if think.learned is not None:
        think.learned.to(words.device)


def detach(model: nn.Module) -> None:
    """The stock model again, bit for bit."""
    routed = model.__dict__.get("_mmroute")
    if routed is None:
        raise UnsupportedCall("the model is not attached; nothing to detach")
    routed.detach()


def _save_with_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Bound in place of the model's `save_pretrained`: says what else goes into the file."""
    if any(True for _ in self.mmroute.parameters()):
        warnings.warn(
            "the checkpoint of an attached model holds extra mmroute.* keys, which stock loading reports as unexpected "
            "and leaves out; save the routing with routed.save_pretrained(folder), and detach() before saving the base",
            stacklevel=2,
        )
    return type(self).save_pretrained(self, *args, **kwargs)


class Routed:
    """Handle of an attached model."""

    def __init__(self, model: nn.Module, processor: Any, controller: Controller, parts: Parts) -> None:
        self.model: Any = model
        self.processor = processor
        self.controller = controller
        self.parts = parts
        self.think: Thinker | None = None
        """How `answer` reasons unless told otherwise."""
        self._handles: list[RemovableHandle] = []
        self._windows: InOneCall
        self._base = ""
        self._own_forward: dict[int, Any] = {}

    # ------------------------------------------------------------------ splice

    def _splice(self, name: str, base: str) -> None:
        model, c = self.model, self.controller
        self._base = base
        # The setter would also switch the vision tower of families whose configuration is shared.
        c.text.config._attn_implementation_internal = name
        for i, layer in enumerate(c.text.layers):
            if "forward" in layer.__dict__:  # accelerate was here first
                self._own_forward[i] = layer.__dict__["forward"]
            layer._stock_forward = layer.forward
            layer.forward = types.MethodType(routed_forward, layer)
        self._handles = [
            c.base.register_forward_pre_hook(c.before_base, with_kwargs=True),
            c.text.register_forward_pre_hook(c.before_text, with_kwargs=True),
            c.text.register_forward_hook(c.after_text, with_kwargs=True, always_call=True),
        ]
        if c.tower is not None:
            self._handles += c.tower.watch()
        self._windows = InOneCall(c.family.windowed(model), c)
        model.save_pretrained = types.MethodType(_save_with_parts, model)
        model._prepare_cache_for_generation = types.MethodType(prepare_cache, model)
        model.mmroute = self.parts
        model.__dict__["_mmroute"] = self

    def detach(self) -> None:
        """Leaves the model as it was: forwards, hooks, configuration, keys.

        Raises:
            UnsupportedCall: a layer's forward was wrapped after attach, so what is below cannot be taken out.
        """
        model, c = self.model, self.controller
        for i, layer in enumerate(c.text.layers):
            if getattr(layer.forward, "__func__", None) is not routed_forward:
                raise UnsupportedCall(
                    f"layer {i} was wrapped after attach (accelerate hooks, offloading); take that off first, e.g. "
                    "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
                )
        for handle in self._handles:
            handle.remove()
        self._windows.end()
        for i, layer in enumerate(c.text.layers):
            del layer._stock_forward
            if i in self._own_forward:
                layer.forward = self._own_forward[i]
            else:
                del layer.forward
        c.compiled = None
        c.stock_checkpointing()
        c.family.lock_images(model)
        c.text.config._attn_implementation_internal = self._base
        del model._prepare_cache_for_generation
        del model.save_pretrained
        del model._modules["mmroute"]
        del model.__dict__["_mmroute"]
        self._handles = []

    @contextmanager
    def off(self) -> Iterator[Any]:
        """The stock model with stock caches, until the block ends."""
        with self.controller.off() as model:
            yield model

    def __enter__(self) -> "Routed":
        return self

    def __exit__(self, *error: Any) -> None:
        self.detach()

    # ------------------------------------------------------------------ use

    @property
    def family(self) -> Any:
        return self.controller.family

    @property
    def trace(self) -> Trace | None:
        """What the last call did; of a session with a cache, all its calls."""
        return self.controller.trace

    @property
    def full_trace(self) -> bool:
        """Whether traces record which positions ran, not only how many."""
        return self.controller.full_trace

    @full_trace.setter
    def full_trace(self, value: bool) -> None:
        self.controller.full_trace = value

    def new_cache(self, differentiable: bool = False) -> RaggedCache:
        """An empty routed cache for `model(..., past_key_values=cache)`.

        Args:
            differentiable: gradients flow through it, hop by hop; slower and larger, for training.
        """
        return self.controller.new_cache(differentiable)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate`, routed."""
        return self.model.generate(*args, **kwargs)

    def compile(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Runs the stock layers as compiled graphs from the next call on, wherever no gradient is asked for.

        Routing stays Python, and nothing of it is compiled away: one graph serves all layers, lengths and keep sets,
        one more the single positions of decoding. Equal to 1e-5, not bit for bit; compiled layers return no
        `attentions`. `off()` is the stock model, not compiled.

        Args:
            backend: of `torch.compile`.

        Raises:
            UnsupportedCall: hooks inside the layers move tensors, which a graph cannot hold.
        """
        c = self.controller
        hooked = [i for i, layer in enumerate(c.text.layers) if any(hasattr(m, "_hf_hook") for m in layer.modules())]
        if hooked:
            raise UnsupportedCall(
                f"layer {hooked[0]} carries accelerate hooks, which move tensors in the middle of what would be one "
                "graph; take them off first with accelerate.hooks.remove_hook_from_module(model, recurse=True), or "
                "leave the model uncompiled"
            )
        c.compiled = Compiled(backend, c.text.config._attn_implementation)

    def unfreeze_parts(self) -> None:
        """Learned parts take gradients again; PEFT freezes them."""
        self.parts.requires_grad_(True)

    def answer(self, question: str, images: Any = (), **options: Any) -> Any:
        """One answer about images; see `mmroute.reason.answer`."""
        from mmroute import reason

        return reason.answer(self, question, images, **options)

    def answer_many(self, conversations: list[Any], **options: Any) -> list[Any]:
        """Several conversations in one batch; see `mmroute.reason.answer_many`."""
        from mmroute import reason

        return reason.answer_many(self, conversations, **options)

    def save_pretrained(self, folder: str | Path, results: Iterable[str | Path] | None = None) -> None:
        """Writes the small part only: what was added, the base model's id, versions.

        Args:
            folder: where to.
            results: result files of this method; then a model card with their figures is written too.
        """
        from mmroute import sharing
        from mmroute.engine import saving

        saving.save(self, Path(folder))
        if results is not None:
            sharing.write_card(Path(folder), results)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the small part with a model card; see `mmroute.sharing.push`."""
        from mmroute import sharing

        return sharing.push(self, repo_id, **options)
