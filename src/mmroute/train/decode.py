"""What the small model writes: greedy chains of a whole batch, and how many are right.

Legend: B batch, N positions, P vision tokens of one image.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, Qwen2_5_VLForConditionalGeneration

from mmroute.train.examples import IGNORED, Batch
from mmroute.train.fast import Positions, encode_tiles, run_text

__all__ = ["embed", "greedy", "right"]


def embed(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: Batch,
    atlas: Float[Tensor, "A px px 3"],
    dtype: torch.dtype,
    blank: bool = False,
) -> Float[Tensor, "B N D"]:
    """Embeddings of a batch, its vision tokens in place.

    Args:
        atlas: all tiles; rows are what `batch.tiles` counts.
        blank: every tile is the same mid-grey, so the image says nothing.
    """
    if blank:
        shown, where = torch.full_like(atlas[:1], 127), torch.zeros_like(batch.tiles)
    else:
        distinct, where = torch.unique(batch.tiles, return_inverse=True)
        shown = atlas[distinct]
    vision = torch.nn.functional.embedding(where, encode_tiles(model, shown, dtype))
    words = model.model.language_model.embed_tokens(batch.ids).to(dtype)
    return torch.cat([words[:, : batch.first], vision, words[:, batch.first + vision.shape[1] :]], 1)


@torch.no_grad()
def greedy(
    model: Qwen2_5_VLForConditionalGeneration,
    batch: Batch,
    atlas: Float[Tensor, "A px px 3"],
    max_new: int,
    blank: bool = False,
) -> list[list[int]]:
    """The most likely continuation of each prompt, in fp32, up to and with the end token.

    Args:
        batch: bare prompts of one length.
        max_new: tokens after which a row that has not ended is cut.
    """
    text = model.model.language_model
    x = embed(model, batch, atlas, torch.float32, blank)
    places = Positions(batch.first, batch.side, batch.ids.shape[1], x.device).ids[:, None].expand(-1, len(x), -1)
    cache = DynamicCache(config=text.config)
    end, pad = text.config.eos_token_id, text.config.pad_token_id
    place = int(places.max())
    done = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    written: list[Int[Tensor, " B"]] = []
    while len(written) < max_new and not bool(done.all()):
        h = text(inputs_embeds=x, position_ids=places, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        token = model.lm_head(h).argmax(-1).masked_fill(done, pad)
        written.append(token)
        done = done | (token == end)
        place += 1
        x, places = text.embed_tokens(token[:, None]), torch.full((3, len(token), 1), place, device=token.device)
    rows = torch.stack(written, 1).tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@torch.no_grad()
def right(
    model: Qwen2_5_VLForConditionalGeneration, batch: Batch, atlas: Float[Tensor, "A px px 3"], dtype: torch.dtype
) -> tuple[Bool[Tensor, "B M"], Bool[Tensor, "B M"]]:
    """Which learned words are the most likely one, all before them given; and which are learned at all (M = N - 1)."""
    places = Positions(batch.first, batch.side, batch.ids.shape[1], batch.ids.device).ids
    h, _ = run_text(model, embed(model, batch, atlas, dtype), places)
    labels = batch.labels[:, 1:]
    learned = labels != IGNORED
    return (model.lm_head(h[:, :-1].float()).argmax(-1) == labels) & learned, learned
