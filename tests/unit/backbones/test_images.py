"""Images and questions: what can be used is used as meant, what cannot is said."""

import io
import struct
import zlib

import families
import numpy as np
import pytest
import torch
from conversations import picture
from PIL import Image

from mmroute import backbones
from mmroute.backbones.images import MAX_SIDE, check_prompt, open_images, prepare, user_message
from mmroute.backbones.load import load
from mmroute.errors import InputError


def test_paths_bytes_and_pil_images_are_the_same_image(tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    opened = open_images([tmp_path / "a.png", str(tmp_path / "a.png"), data, image])
    assert all(np.array_equal(np.asarray(one), np.asarray(image)) for one in opened)
    assert len(open_images(tmp_path / "a.png")) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: d / "absent.png", "image 1 .*absent.png.: no such file"),
        (lambda d: d, "is a folder"),
        (lambda d: _write(d / "empty.png", b""), r"empty.png. is empty \(0 bytes\)"),
        (lambda d: _write(d / "text.png", b"hello, I am no image"), "cannot be read as an image"),
        (lambda d: _write(d / "half.png", _png(picture(size=(90, 90)))[:2000]), "cannot be read as an image"),
        (lambda d: _png(picture())[:60], r"image 1 \(60 bytes\) cannot be read"),
        (lambda d: b"", "is empty"),
        (lambda d: "https://example.com/a.png", "download it first"),
        (lambda d: Image.new("RGB", (1, 1)), r"1 x 1 px; allowed: sides of 4 to 10,000 px"),
        (lambda d: Image.new("L", (MAX_SIDE + 1, 200)), r"10001 x 200 px; allowed: sides of 4 to 10,000 px"),
        (lambda d: Image.new("L", (4000, 5)), "a ratio below 200:1"),
        (lambda d: Image.new("F", (8, 8)), "32-bit"),
        (lambda d: 7, "is a int; give a path, bytes or a PIL image"),
    ],
)
def test_an_image_that_cannot_be_used_says_why(make, message, tmp_path):
    with pytest.raises(InputError, match=message):
        open_images([make(tmp_path)])


def test_the_bad_one_of_several_is_numbered(tmp_path):
    with pytest.raises(InputError, match="image 2 "):
        open_images([picture(), tmp_path / "absent.png"])


def test_a_file_of_too_many_pixels_is_refused_from_its_header(tmp_path):
    for side, message in ((11_000, "11000 x 11000 px; allowed"), (20_000, "too many pixels; allowed")):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        file = _write(tmp_path / f"{side}.png", b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 9) + b"IDAT")
        with pytest.raises(InputError, match=f"{message}.*10,000 px"):
            open_images(file)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    (image,) = open_images(clear)
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (255, 0, 0)
    assert image.getpixel((4, 4)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 0)
    palette.info["transparency"] = 0
    assert open_images(palette)[0].getpixel((4, 4)) == (255, 255, 255)


def test_print_colours_and_sixteen_bits_become_rgb():
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert open_images(cmyk)[0].getpixel((0, 0)) == (255, 0, 0)
    deep = Image.fromarray(np.full((8, 8), 0x8000, dtype=np.uint16))
    assert open_images(deep)[0].getpixel((0, 0)) == (128, 128, 128)


def test_the_cameras_orientation_is_applied():
    image = Image.new("RGB", (8, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", exif=exif)
    assert open_images(buffer.getvalue())[0].size == (20, 8)


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_images(tmp_path / "a.gif")[0].getpixel((0, 0)) == (255, 0, 0)


def test_a_question_needs_words_and_an_image_and_a_place_for_each(loaded):
    processor = loaded("llava").processor
    check_prompt("where?", [picture()], processor)
    check_prompt("where?", [picture(), picture(1)], processor)
    with pytest.raises(InputError, match="question is empty"):
        check_prompt(" \n", [picture()], processor)
    with pytest.raises(InputError, match="no image given"):
        check_prompt("where?", [], processor)
    with pytest.raises(InputError, match="1 image where the prompt has 2 places"):
        check_prompt("what does <image> mean?", [picture()], processor)


def test_two_images_where_the_template_has_one_are_refused(loaded, monkeypatch):
    model = loaded("llava")
    single = "<image>\n{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(model.processor, "chat_template", single)
    with pytest.raises(InputError, match="2 images where the prompt has 1 place "):
        check_prompt("where?", [picture(), picture(1)], model.processor)
    with pytest.raises(InputError, match="2 images where the prompt has 1 place "):
        prepare(model, model.processor, user_message("where?", [picture(), picture(1)]))
    monkeypatch.setattr(model.processor, "chat_template", None)
    with pytest.raises(InputError, match="no chat template"):
        check_prompt("where?", [picture()], model.processor)


@pytest.mark.parametrize("name", families.NAMES)
@torch.no_grad()
def test_a_padded_batch_gives_each_conversation_what_it_gets_alone(name, loaded):
    model = loaded(name)
    family = backbones.of(model)
    asked = [
        user_message("where is the red ball?", [picture(0), picture(1, (30, 50))]),
        user_message("how many?", [picture(2)]),
        user_message("no image here", []),
    ]
    batch = prepare(model, model.processor, asked)
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1].tolist() == sorted(batch["attention_mask"][1].tolist())  # left padding
    assert len(family.image_grid(model, batch)) == 3
    assert ("mm_token_type_ids" in batch) == name.startswith("qwen")
    together = model.generate(**batch, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
    for row, conversation in enumerate(asked):
        alone = prepare(model, model.processor, conversation)
        real = batch["attention_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row, real], alone["input_ids"][0])
        out = model.generate(**alone, max_new_tokens=3, return_dict_in_generate=True, output_logits=True)
        torch.testing.assert_close(together.logits[0][row], out.logits[0][0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", families.NAMES)
def test_a_batch_carries_pixels_in_the_models_dtype_and_ids_as_integers(name, tiny_folder):
    model = load(tiny_folder(name), dtype="bfloat16")
    batch = prepare(model, model.processor, user_message("where?", [picture()]))
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert batch["input_ids"].dtype == torch.long
    assert all(isinstance(value, torch.Tensor) for value in batch.values())


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "no messages given"),
        (["hello"], "a message is a mapping"),
        ([{"role": "user"}], "a message is a mapping"),
        ([{"role": "user", "content": [{"type": "image"}]}], "an image entry without its image"),
        ([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}], "type 'video' given; allowed"),
        ([{"role": "user", "content": [{"type": "image", "image": "absent.png"}]}], "no such file"),
    ],
)
def test_malformed_messages_are_named(messages, message, loaded):
    model = loaded("llava")
    with pytest.raises(InputError, match=message):
        prepare(model, model.processor, messages)


def test_plain_text_content_is_a_message_too(loaded):
    model = loaded("qwen2_5_vl")
    batch = prepare(model, model.processor, [{"role": "user", "content": "hello"}])
    assert set(batch) == {"input_ids", "attention_mask"}


def _write(path, data):
    path.write_bytes(data)
    return path


def _png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_more_images_than_the_model_can_read_are_counted(tiny_folder):
    model = load(tiny_folder("llava"))
    model.config.text_config.max_position_embeddings = 60
    picture = Image.new("RGB", (32, 32))
    assert prepare(model, model.processor, user_message("?", [picture]))["input_ids"].shape[1] <= 60
    with pytest.raises(
        InputError, match=r"64 of them of its images, and this model reads at most 60; .*fewer or smaller"
    ):
        prepare(model, model.processor, user_message("?", [picture] * 4))


def test_a_template_without_a_place_for_images_is_named(tiny_folder):
    model = load(tiny_folder("llava"))
    model.processor.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(InputError, match=r"1 image where the prompt has 0 places \(<image>\)"):
        prepare(model, model.processor, user_message("?", [Image.new("RGB", (32, 32))]))
