"""Batches from files, with processors made offline, up to weights that are learned from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor, PreTrainedTokenizerFast, ViTImageProcessor, WhisperFeatureExtractor
from transformers import WhisperProcessor as Heard

from coremerge.errors import ConfigError, InputError, SourceError
from coremerge.learning import learn_weights
from coremerge.learning.data import make_batches
from coremerge.learning.examples import read_examples
from coremerge.learning.processor import load_processor
from coremerge.learning.rows import Example, Message
from coremerge.learning.sounds import read_sound
from families import IMAGE, make_adapter, make_model
from made import OF_PARTS, TEMPLATE, VOCABULARY, clip_pictures, jsonl, make_llava, make_tokenizer
from speakers import make_speaker, sound

PROMPTING = TEMPLATE + "{% if add_generation_prompt %} <turn> assistant {% endif %}"
CHAT = (Message("user", "w1 w2"), Message("assistant", "w3"))


def pictures(folder: Path, count: int = 3) -> list[Path]:
    """Of different sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.new("RGB", (10 + i, 12), (40 * i, 99, 7)).save(path)
    return paths


def words(batch: Any, key: str = "input_ids") -> list[str]:
    return [" ".join(VOCABULARY[i] for i in row) for row in batch[key].tolist()]


def counted(batch: Any) -> list[str]:
    """The words that the token mask leaves."""
    rows = zip(batch["input_ids"].tolist(), batch["token_mask"].tolist(), strict=True)
    return [" ".join(VOCABULARY[i] for i, kept in zip(ids, mask, strict=True) if kept) for ids, mask in rows]


class TestTexts:
    def test_they_are_padded_and_cut(self):
        examples = [Example("w1 w2 w3 w4 w5 w6"), Example("w1")]
        (batch,) = make_batches(examples, make_tokenizer("encoder"), max_length=5)
        assert words(batch) == ["[CLS] w1 [SEP] [PAD] [PAD]", "[CLS] w1 w2 w3 [SEP]"]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1] * 5]
        assert "token_mask" not in batch and "labels" not in batch

    def test_pairs_go_in_together(self):
        (batch,) = make_batches([Example("w1", "w2 w3"), Example("w4", "")], make_tokenizer("encoder"))
        assert words(batch) == ["[CLS] w4 [SEP] [SEP] [PAD] [PAD]", "[CLS] w1 [SEP] w2 w3 [SEP]"]

    @pytest.mark.parametrize(("own", "given", "length"), [(7, None, 7), (None, None, 512), (7, 9, 9), (900, None, 512)])
    def test_lengths(self, own, given, length):
        tokenizer = make_tokenizer(**({"model_max_length": own} if own else {}))
        (batch,) = make_batches([Example("w1 " * 1000)], tokenizer, max_length=given)
        assert batch["input_ids"].shape == (1, length)

    def test_similar_lengths_go_together(self):
        examples = [Example("w1 " * n) for n in (5, 1, 4, 2, 3)]
        one, two = (make_batches(examples, make_tokenizer(), size=2) for _ in range(2))
        assert [batch["input_ids"].shape for batch in one] == [(2, 2), (2, 4), (1, 5)]
        for a, b in zip(one, two, strict=True):
            assert all(torch.equal(a[key], b[key]) for key in a)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_a_tokenizer_without_a_pad_token_is_left_so(self, side):
        tokenizer = make_tokenizer(padding_side=side)
        (batch,) = make_batches([Example("w1"), Example("w1 w2")], tokenizer)
        assert words(batch) == ["w1 </s>", "w1 w2"]
        assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
        assert (tokenizer.pad_token, tokenizer.padding_side) == (None, side)

    def test_only_what_the_model_takes(self):
        class Talkative(PreTrainedTokenizerFast):
            def __call__(self, *args, **settings):
                return super().__call__(*args, return_special_tokens_mask=True, return_length=True, **settings)

        tokenizer = Talkative(tokenizer_object=make_tokenizer("encoder").backend_tokenizer, pad_token="[PAD]")
        (batch,) = make_batches([Example("w1")], tokenizer)
        assert set(batch) == {"input_ids", "attention_mask"}


class TestChats:
    def test_special_tokens_do_not_count_but_where_an_answer_comes_next(self):
        tokenizer = make_tokenizer(chat_template=TEMPLATE, extra_special_tokens=["<turn>"])
        examples = [Example(messages=CHAT), Example(messages=CHAT[:1])]
        (batch,) = make_batches(examples, tokenizer)
        assert words(batch)[1] == "<s> <turn> user w1 w2 </s> <turn> assistant w3 </s>"
        assert counted(batch) == ["user w1 w2 </s>", "user w1 w2 assistant w3"]
        assert batch["token_mask"].dtype == batch["attention_mask"].dtype

    def test_markers_may_be_special_without_a_name(self):
        tokenizer = make_tokenizer(chat_template=TEMPLATE)
        tokenizer.add_tokens(["<turn>"], special_tokens=True)
        assert counted(make_batches([Example(messages=CHAT[:1])], tokenizer)[0]) == ["user w1 w2 </s>"]

    @pytest.mark.parametrize("special", [["<turn>"], ["<turn>", "assistant"]])
    def test_a_chat_without_an_answer_ends_where_it_would_begin(self, special):
        tokenizer = make_tokenizer(chat_template=PROMPTING, extra_special_tokens=special)
        (batch,) = make_batches([Example(messages=CHAT[:1]), Example(messages=CHAT)], tokenizer)
        assert words(batch) == [
            "<s> <turn> user w1 w2 </s> <turn> assistant </s> </s>",  # padded
            "<s> <turn> user w1 w2 </s> <turn> assistant w3 </s>",
        ]
        assert counted(batch) == ["user w1 w2 assistant", "user w1 w2 assistant w3"]

    def test_every_answer_of_a_chat_is_decided_somewhere(self):
        turns = (*CHAT, Message("user", "w3"), Message("assistant", "assistant"), Message("user", "w4"))
        tokenizer = make_tokenizer(chat_template=PROMPTING, extra_special_tokens=["<turn>", "user", "assistant"])
        (batch,) = make_batches([Example(messages=turns)], tokenizer)
        assert counted(batch) == ["w1 w2 assistant w3 w3 assistant w4 assistant"]

    def test_a_chat_that_is_too_long_is_cut_at_its_beginning(self):
        tokenizer = make_tokenizer(chat_template=PROMPTING, extra_special_tokens=["<turn>", "assistant"])
        examples = [Example(messages=CHAT[:1]), Example(messages=(Message("user", "w1 " * 9), *CHAT[1:]))]
        (batch,) = make_batches(examples, tokenizer, max_length=4)
        assert words(batch) == ["w2 </s> <turn> assistant", "<turn> assistant w3 </s>"]
        assert counted(batch) == ["w2 assistant", "assistant w3"]
        assert tokenizer.truncation_side == "right"

    def test_a_tokenizer_adds_nothing_to_its_template(self):
        tokenizer = make_tokenizer("encoder", chat_template="{{ messages[0]['content'] }}")
        assert words(make_batches([Example(messages=CHAT)], tokenizer)[0]) == ["w1 w2"]

    @pytest.mark.parametrize("holder", ["tokenizer", "processor"])
    def test_a_template_that_reads_content_in_parts(self, holder):
        processor = make_llava(OF_PARTS) if holder == "processor" else make_tokenizer(chat_template=OF_PARTS)
        (batch,) = make_batches([Example(messages=CHAT[:1])], processor)
        assert counted(batch) == ["user : w1 w2 </s>"]

    def test_without_a_template(self):
        with pytest.raises(ConfigError, match=r"messages: the base model's tokenizer has no chat template. Give"):
            make_batches([Example(messages=CHAT)], make_tokenizer())

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{{ raise_exception('roles must alternate') }}", "the chat template refuses it: roles must alternate"),
            ("w1", "the chat template leaves out what the messages say"),
        ],
    )
    def test_a_template_that_does_not_take_them(self, template, message):
        example = Example(messages=(Message("user", "w5"),), place="a.jsonl, line 3")
        with pytest.raises(InputError, match=f"a.jsonl, line 3: messages: {message}"):
            make_batches([example], make_tokenizer(chat_template=template))


class TestImages:
    def test_they_become_pixels(self, tmp_path):
        examples = read_examples(pictures(tmp_path)[0].parent)
        first, last = make_batches(examples, ViTImageProcessor(size={"height": 8, "width": 8}), size=2)
        assert set(first) == {"pixel_values"}
        assert first["pixel_values"].shape == (2, 3, 8, 8) and last["pixel_values"].shape == (1, 3, 8, 8)
        inner = [Example(image=path.read_bytes()) for path in sorted(tmp_path.iterdir())]
        assert torch.equal(make_batches(inner, clip_pictures())[0]["pixel_values"][0], self.pixels(examples[0]))

    @staticmethod
    def pixels(example):
        return make_batches([example], clip_pictures())[0]["pixel_values"][0]

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1"])
    def test_of_any_mode(self, tmp_path, mode):
        Image.new(mode, (9, 9)).save(tmp_path / "a.png")
        (batch,) = make_batches([Example(image=tmp_path / "a.png")], ViTImageProcessor(size={"height": 8, "width": 8}))
        assert batch["pixel_values"].shape == (1, 3, 8, 8)

    def test_they_are_the_right_way_up(self, tmp_path):
        upright = Image.linear_gradient("L").resize((8, 8)).convert("RGB")
        upside_down = Image.Exif()
        upside_down[0x0112] = 3
        upright.save(tmp_path / "a.png")
        upright.rotate(180).save(tmp_path / "b.png", exif=upside_down)
        a, b = (self.pixels(Example(image=tmp_path / name)) for name in ("a.png", "b.png"))
        assert torch.equal(a, b) and a.std() > 0.1

    def test_that_cannot_be_read(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"no image")
        example = Example(image=tmp_path / "a.png", place="a.jsonl, line 3")
        with pytest.raises(SourceError, match=r'a.jsonl, line 3: image = ".*a.png": this image cannot be read'):
            make_batches([example], clip_pictures())
        with pytest.raises(SourceError, match='image = "bytes": this image cannot be read'):
            make_batches([Example(image=b"no image")], clip_pictures())


class TestTextsWithImages:
    @pytest.fixture
    def image(self, tmp_path):
        return pictures(tmp_path, 1)[0]

    def test_an_image_is_put_in_front(self, image):
        examples = [Example("w1 w2", image=image), Example("w3 <image> w4 w5", image=image)]
        (batch,) = make_batches(examples, make_llava())
        assert words(batch) == [
            "<image> <image> <image> <image> w1 w2 </s>",
            "w3 <image> <image> <image> <image> w4 w5",
        ]
        assert counted(batch) == ["w1 w2", "w3 w4 w5"]
        assert batch["pixel_values"].shape == (2, 3, 8, 8)

    def test_by_the_chat_template(self, image):
        processor = make_llava(OF_PARTS)
        (batch,) = make_batches([Example("w1", image=image)], processor)
        assert words(batch) == ["user : <image> <image> <image> <image> w1 </s>"]
        assert counted(batch) == ["user : w1 </s>"]
        assert processor.tokenizer.pad_token is None

    def test_a_chat_with_an_image_before_its_first_question(self, image):
        turns = (Message("system", "w9"), *CHAT, Message("user", "w4"))
        (batch,) = make_batches([Example(messages=turns, image=image)], make_llava(OF_PARTS))
        shown = "[UNK] : w9 </s> user : <image> <image> <image> <image> w1 w2 </s> assistant : w3 </s> user : w4 </s>"
        assert words(batch) == [shown]
        with pytest.raises(ConfigError, match="no chat template"):
            make_batches([Example(messages=turns, image=image)], make_llava())

    @pytest.mark.parametrize("template", [TEMPLATE, "<image>"])
    def test_a_template_that_leaves_out_image_or_text(self, image, template):
        (batch,) = make_batches([Example("w1", image=image)], make_llava(template))
        assert words(batch) == ["<image> <image> <image> <image> w1"]

    def test_the_images_token_need_not_be_special(self, image):
        processor = make_llava()
        processor.tokenizer = make_tokenizer()
        processor.tokenizer.add_tokens(["<image>"])
        assert counted(make_batches([Example("w1", image=image)], processor)[0]) == ["w1"]
        del processor.image_token_id
        assert counted(make_batches([Example("w1", image=image)], processor)[0]) == ["w1"]

    def test_the_images_tokens_are_not_cut(self, image):
        examples = [Example("w1 w2 w3 w4", image=image), Example("w1 w2 w3 <image>", image=image)]
        (batch,) = make_batches(examples, make_llava(), max_length=3)
        assert words(batch) == ["<image> <image> <image> <image> w1 w2 w3"] * 2

    def test_two_tokens_for_one_image(self, image):
        example = Example("<image> <image>", image=image, place="a.jsonl, line 3")
        with pytest.raises(
            InputError, match=r"a.jsonl, line 3: the processor refuses a text with its image: The total"
        ):
            make_batches([example], make_llava())

    def test_side_by_side(self, image):
        processor = CLIPProcessor(clip_pictures(), make_tokenizer("encoder"))
        (batch,) = make_batches([Example("w1 w2 w3", image=image)], processor, max_length=4)
        assert words(batch) == ["[CLS] w1 w2 [SEP]"]
        assert "token_mask" not in batch and batch["pixel_values"].shape == (1, 3, 8, 8)
        (batch,) = make_batches([Example(image=image)], processor)
        assert set(batch) == {"pixel_values"}


class TestSounds:
    def test_they_become_features(self, tmp_path):
        paths = [sound(tmp_path / f"{tone}.wav", tone) for tone in (300, 900)]
        extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=16_000, chunk_length=1)
        (batch,) = make_batches([Example(audio=path) for path in paths], Heard(extractor, make_tokenizer()))
        assert batch["input_features"].shape == (2, 8, 100) and set(batch) == {"input_features"}
        inner = [Example(audio=path.read_bytes()) for path in paths]
        again = make_batches(inner, Heard(extractor, make_tokenizer()))[0]
        assert torch.equal(batch["input_features"], again["input_features"])

    def test_what_a_decoder_begins_with_comes_along(self, tmp_path):
        make_speaker("whisper", tmp_path / "base")
        example = Example(audio=sound(tmp_path / "a.wav", 440))
        (batch,) = make_batches([example] * 2, load_processor(tmp_path / "base"))
        assert words(batch, "decoder_input_ids") == ["<s> <turn>"] * 2

    @pytest.mark.parametrize(("size", "channels"), [(1, 1), (2, 2), (4, 1)])
    def test_of_any_width(self, tmp_path, size, channels):
        path = sound(tmp_path / "a.wav", 440, channels=channels, size=size)
        samples = read_sound(Example(audio=path), 16_000)
        wanted = read_sound(Example(audio=sound(tmp_path / "b.wav", 440)), 16_000)
        assert samples.dtype == wanted.dtype == "float32" and samples.shape == (8000,)
        assert abs(samples - wanted).max() < 1 / 128 and 0.49 < samples.max() < 0.51

    def test_that_cannot_be_read(self, tmp_path):
        (tmp_path / "a.wav").write_bytes(b"no sound")
        example = Example(audio=tmp_path / "a.wav", place="a.jsonl, line 3")
        with pytest.raises(SourceError, match=r'a.jsonl, line 3: audio = ".*a.wav": this sound cannot be read'):
            read_sound(example, 16_000)
        with pytest.raises(SourceError, match=r"8,000 samples a second, and the base model takes 16,000. Resample it"):
            read_sound(Example(audio=sound(tmp_path / "b.wav", 440, rate=8_000)), 16_000)
        with pytest.raises(ConfigError, match="takes no sounds"):
            make_batches([example], make_tokenizer())


class TestRefusals:
    @pytest.mark.parametrize(
        ("example", "processor", "message"),
        [
            (Example("w1"), clip_pictures, "takes images, not texts"),
            (Example(messages=CHAT), clip_pictures, "no chat template"),
            (Example(image=b""), make_tokenizer, "takes no images"),
            (Example(image=b""), make_llava, "an image as a part of a text.*text and image"),
            (Example("w1", image=b""), make_tokenizer, "texts and images together"),
        ],
    )
    def test_what_the_base_model_does_not_take(self, example, processor, message):
        with pytest.raises(ConfigError, match=message):
            make_batches([example], processor())

    @pytest.mark.parametrize("settings", [{"size": 0}, {"max_length": 0}])
    def test_sizes(self, settings):
        with pytest.raises(ConfigError, match=f"{next(iter(settings))} = 0: at least 1"):
            make_batches([Example("w1")], make_tokenizer(), **settings)

    def test_several_kinds(self):
        with pytest.raises(ConfigError, match="this input is messages, but the one at the beginning is text"):
            make_batches([Example("w1"), Example(messages=CHAT)], make_tokenizer())

    def test_nothing(self):
        with pytest.raises(InputError, match="no inputs"):
            make_batches([], make_tokenizer())


class TestFromFilesToWeights:
    """The whole way, with the processor saved beside the model."""

    @pytest.fixture
    def learned(self, tmp_path):
        def learn(family, processor, source):
            adapters = {name: make_adapter(family, tmp_path / name, seed) for seed, name in enumerate("ab")}
            processor.save_pretrained(tmp_path / "base")
            examples = read_examples(source)
            batches = make_batches(examples, load_processor(tmp_path / "base"), size=2)
            return learn_weights(make_model(family), adapters, dict.fromkeys(adapters, batches), steps=2)

        return learn

    @staticmethod
    def moved(weights):
        assert bool(weights.flat().isfinite().all()) and not torch.equal(weights.path[0], weights.path[-1])

    def test_texts(self, learned, tmp_path):
        path = jsonl(tmp_path / "a.jsonl", *({"text": "w1 " * n, "pair": "w2", "label": n} for n in (1, 2, 3)))
        self.moved(learned("bert", make_tokenizer("encoder"), path))

    def test_images(self, learned, tmp_path):
        pictures(tmp_path / "in")
        self.moved(learned("vit", ViTImageProcessor(size={"height": 8, "width": 8}), tmp_path / "in"))

    def test_chats(self, learned, tmp_path):
        rows = [{"messages": [turn._asdict() for turn in CHAT[:n]]} for n in (1, 2, 1)]
        self.moved(learned("llama", make_tokenizer(chat_template=TEMPLATE), jsonl(tmp_path / "a.jsonl", *rows)))

    @pytest.mark.parametrize("template", [None, OF_PARTS])
    def test_texts_with_images(self, learned, tmp_path, template):
        assert VOCABULARY.index("<image>") == IMAGE
        paths = pictures(tmp_path / "in")
        rows = ({"text": "w1 " * n, "image": f"in/{path.name}"} for n, path in enumerate(paths, 1))
        self.moved(learned("llava", make_llava(template), jsonl(tmp_path / "a.jsonl", *rows)))
