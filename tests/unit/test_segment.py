"""What enters a session beside words: pictures between two steps, and ground truth at the positions of images.

Legend: B batch, N positions.
"""

import families
import pytest
import torch
from conversations import STEPS, asked, picture, routed_as

import mmroute
from mmroute import hub
from mmroute.backbones.images import prepare, user_message
from mmroute.errors import InputError, UnsupportedCall
from mmroute.session import Session
from mmroute.tokens import Modality

PICTURES = [[picture(5, (40, 40)), picture(6, (60, 30))], [], [picture(7, (30, 50))]]


@pytest.mark.parametrize("method", ["none", "random", "fastv"])
@pytest.mark.parametrize("name", families.NAMES)
def test_pictures_that_enter_between_steps_are_those_of_each_conversation_alone(name, method, loaded):
    """Every token begins a step here, so a picture enters behind each of the first ones."""
    think = hub.load("think", "text", hop_pattern="", max_new_tokens=STEPS)
    with routed_as(loaded(name), method) as routed:
        batch = routed.answer_many(asked(), think=think, observations=PICTURES)
        for conversation, pictures, together in zip(asked(), PICTURES, batch, strict=True):
            alone = routed.answer_many([conversation], think=think, observations=[pictures])[0]
            if method == "fastv":  # what a call's probe costs is shared by positions, not by each row's keys
                for layer in (x for answer in (together, alone) for call in answer.trace.calls for x in call.layers):
                    layer.extra_flops = 0
            assert (together.ids, together.hops, together.trace) == (alone.ids, alone.hops, alone.trace)
            seen = [call.hop[0] for call in together.trace.calls[1:] if call.kind == "prefill"]
            assert seen == list(range(1, len(pictures) + 1))
            hops = [call.hop[0] for call in together.trace.calls]
            assert hops == sorted(hops)
        assert batch[0].ids != routed.answer_many(asked(), think=think)[0].ids


@pytest.mark.parametrize("name", families.NAMES)
def test_an_observed_picture_is_read_as_if_it_had_stood_in_the_prompt(name, loaded):
    model = loaded(name)
    first, second = picture(1, (48, 48)), picture(2, (32, 48))
    batch = prepare(model, model.processor, [user_message("which?", [first])])
    with mmroute.attach(model, strip_padding=True) as routed, torch.no_grad():
        session = Session(routed)
        session.append(batch)
        session.step(torch.tensor([7]), [1])
        session.observe([second], [1])
        got = session.step(torch.tensor([9]), [2])
        ids, grids = session.ids, session.grids
    other = prepare(model, model.processor, [user_message("", [second])])
    pixels = [each["pixel_values"] for each in (batch, other)]
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    family = mmroute.backbones.of(model)
    if grids is not None:
        whole |= {"image_grid_thw": grids, "mm_token_type_ids": (ids == model.config.image_token_id).long()}
    whole["pixel_values"] = torch.cat(pixels)
    if "image_sizes" in batch:
        whole["image_sizes"] = torch.cat([each["image_sizes"] for each in (batch, other)])
    whole["position_ids"] = family.positions(model, ids, whole["attention_mask"], grids)
    want = model(**whole).logits[:, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)  # fp32, other orders of sums over 6 layers
    vision = torch.isin(ids, torch.tensor(family.vision_ids(model)))
    assert int(vision[0, batch["input_ids"].shape[1] + 1 :].sum()) > 0


def test_observations_for_another_number_of_conversations_are_refused(loaded):
    with routed_as(loaded("llava"), "none") as routed, pytest.raises(InputError, match="observations has 1 entries"):
        routed.answer_many(asked(), observations=[[]])


@pytest.mark.parametrize("name", families.NAMES)
def test_relevance_reaches_the_positions_of_the_images(name, loaded):
    model = loaded(name)
    batch = prepare(model, model.processor, asked())
    with mmroute.attach(model, prune=hub.load("prune", "oracle", vision_keep=0.25)) as routed:
        vision = routed.controller.table[batch["input_ids"]] == Modality.VISION
        sizes = vision.sum(1).tolist()
        wanted = [[float(i % 4 == row) for i in range(n)] for row, n in enumerate(sizes)]
        routed.full_trace = True
        answers = routed.answer_many(asked(), max_new_tokens=2, relevance=wanted)
        for row, answer in enumerate(answers):
            real = batch["attention_mask"][row].bool()
            patches = vision[row, real].nonzero().flatten().tolist()
            needed = {patches[i] for i, value in enumerate(wanted[row]) if value}
            kept = set(answer.trace.calls[0].layers[1].kept[0])
            assert needed <= kept
            assert len(kept & set(patches)) < len(patches) / 2
        with pytest.raises(InputError, match=rf"conversation 1: relevance has 1 numbers, the prompt {sizes[1]} vision"):
            routed.answer_many(asked(), relevance=[wanted[0], [1.0], wanted[2]])
        with pytest.raises(InputError, match="relevance has 1 entries for 3 conversations"):
            routed.answer_many(asked(), relevance=wanted[:1])
        with pytest.raises(UnsupportedCall, match="pass relevance"):
            routed.answer_many(asked())
