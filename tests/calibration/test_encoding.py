# SPDX-License-Identifier: Apache-2.0
"""Encoding: what goes to the model is what the processor says, and the answer's mask is the answer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny_models import FAMILIES, SAMPLING_RATE, tiny_media, tiny_processor, tiny_samples

from masquant.calibration.dataset import Sample, load_samples
from masquant.calibration.encoding import EncodedBatch, SampleEncoder, estimated_tokens
from masquant.errors import DataError

# What the family's template writes after an answer, without trailing white space
ENDING = dict.fromkeys(FAMILIES, "<|im_end|>") | {"llava": "", "gemma3": "<end_of_turn>", "mistral3": "</s>"}
ENDING |= {"smolvlm": "<end_of_utterance>", "phi4_multimodal": "<|end|>", "gemma4": "<turn|>", "gemma4_moe": "<turn|>"}

PER_TOKEN = {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
# Padded to the longest of the batch, or (the last) the patches of all pictures side by side
_FEATURES = frozenset({"input_features", "input_features_mask", "feature_attention_mask"})
PADDED = dict.fromkeys(("gemma4", "gemma4_moe", "qwen3_omni_moe", "qwen3_omni_moe_full"), _FEATURES)
PADDED |= {"phi4_multimodal": frozenset({"audio_input_features", "audio_attention_mask"})}
PADDED |= {"minicpmv": frozenset({"pixel_values"})}
PER_SAMPLE = {"smolvlm": {"pixel_values", "pixel_attention_mask"}}  # padded to the sample with most pictures


@cache
def encoder_of(family: str) -> SampleEncoder:
    return SampleEncoder(tiny_processor(family))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def conversation(prompt: str = "What is it?", answer: str | None = "red", **media: Any) -> Sample:
    return Sample(media.pop("id", "1"), "t", prompt, answer, **media)


def sound(seconds: float, seed: int = 0) -> dict[str, Any]:
    wave = np.random.default_rng(seed).uniform(-0.5, 0.5, int(seconds * SAMPLING_RATE)).astype(np.float32)
    return {"array": wave, "sampling_rate": SAMPLING_RATE}


def picture(seed: int = 0, size: tuple[int, int] = (28, 42)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def media_of(family: str, seed: int = 0) -> dict[str, Any]:
    """One of each kind that a family takes from files."""
    made = {"image": lambda: picture(seed), "audio": lambda: sound(0.3 + 0.1 * seed, seed)}
    return {kind: made[kind]() for kind in tiny_media(family) if kind != "video"}


def tokens(batch: EncodedBatch, row: int = 0) -> list[int]:
    """Tokens of a row without padding."""
    return batch.inputs["input_ids"][row][batch.inputs["attention_mask"][row].bool()].tolist()


def measured(encoder: SampleEncoder, batch: EncodedBatch, row: int = 0) -> str:
    return str(encoder.tokenizer.decode(batch.inputs["input_ids"][row][batch.answer_mask[row]]))


# The mask


ANSWERS = st.one_of(
    st.text("imstar_end|<>/ ", min_size=1, max_size=12),  # what special tokens and templates are made of
    st.text(min_size=1, max_size=8),
    st.sampled_from(["e", "d", "<|im_end", "assistant", "user\n", "USER:", " x ", "\n", "é", "日本", "🙂", "{{ 1 }}"]),
)


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=40, deadline=None)
@given(answer=ANSWERS.filter(lambda a: a.strip() and all(t not in a for t in ("<s>", "</s>"))))
def test_the_answer_mask_is_the_answer(name: str, answer: str) -> None:
    encoder = encoder_of(name)
    batch = encoder.encode([conversation(answer=answer), conversation(answer="something longer", id="2")])
    assert measured(encoder, batch) == answer.strip() + ENDING[name]
    assert measured(encoder, batch, 1) == "something longer" + ENDING[name]
    assert bool(batch.answer_mask[:, -1].all())
    assert not (batch.answer_mask & ~batch.inputs["attention_mask"].bool()).any()


def test_the_answer_follows_the_prompt(family: str) -> None:
    encoder = encoder_of(family)
    sample = conversation(**media_of(family))
    whole, prompt = encoder.encode([sample]), encoder.encode([sample], with_answer=False)
    assert not prompt.answer_mask.any()
    before = [t for t, own in zip(tokens(whole), whole.answer_mask[0].tolist(), strict=True) if not own]
    blank = set(encoder.tokenizer(" \n", add_special_tokens=False)["input_ids"])
    while before[-1] in blank:  # some templates end the invitation with other white space than they put before answers
        before.pop()
    rest = tokens(prompt)[len(before) :]
    assert tokens(prompt)[: len(before)] == before and set(rest) <= blank


def test_mask_in_mixed_batches(family: str, tmp_path: Path) -> None:
    encoder = encoder_of(family)
    samples = load_samples(tiny_samples(family, tmp_path, count=8))
    (batch,) = encoder.batches(samples, 8)
    assert {s.id for s in batch.samples} == {s.id for s in samples}
    for row, sample in enumerate(batch.samples):
        if sample.text is None:
            assert measured(encoder, batch, row) == f"{sample.answer}{ENDING[family]}"
        else:
            assert encoder.tokenizer(sample.text)["input_ids"] == tokens(batch, row)
            expected = batch.inputs["attention_mask"][row].bool()
            expected[int(expected.int().argmax())] = False  # all but the first
            assert torch.equal(batch.answer_mask[row], expected)


def test_a_template_that_hides_the_answer_is_refused() -> None:
    processor: Any = tiny_processor("qwen2_5_vl")
    original = processor.chat_template
    processor.chat_template = original.replace("{{ part['text'] }}", "{{ part['text'] | upper }}")
    with pytest.raises(DataError, match="sample 1: the chat template does not show its answer 'red'"):
        SampleEncoder(processor).encode([conversation()])
    processor.chat_template = original.replace("{{ part['text'] }}", "{{ part['text'] | trim }}")
    encoder = SampleEncoder(processor)
    assert measured(encoder, encoder.encode([conversation(answer=" red ")])) == "red<|im_end|>"


def test_the_text_before_an_answer_is_not_measured_even_if_it_is_the_same() -> None:
    encoder = encoder_of("qwen2_5_vl")
    batch = encoder.encode([conversation(prompt="red red<|im_end|>", answer="red")])
    assert measured(encoder, batch) == "red<|im_end|>"


# Plain texts


@settings(max_examples=60, deadline=None)
@given(st.text(min_size=1, max_size=30), st.integers(2, 20), st.sampled_from(["qwen2_vl", "llava"]))
def test_plain_texts_are_cut_to_a_start_of_themselves(text: str, max_tokens: int, name: str) -> None:
    encoder = SampleEncoder(tiny_processor(name), max_tokens=max_tokens)
    assume(text.strip() and not any(token in text for token in encoder.tokenizer.all_special_tokens))
    whole = encoder.tokenizer(text)["input_ids"]
    extra = len(whole) - len(text.encode())  # this tokenizer has a token per byte; before them a special one, or none
    lengths = [len(text[:end].encode()) + extra for end in range(len(text) + 1)]
    kept = max((length for length in lengths if length <= max_tokens), default=0)
    sample = Sample("1", "text", text=text)
    if kept < 2:
        with pytest.raises(DataError, match="sample 1 has no token to predict"):
            encoder.encode([sample])
    else:
        batch = encoder.encode([sample])
        assert tokens(batch) == whole[:kept]
        assert int(batch.answer_mask.sum()) == kept - 1


def test_long_conversations_are_refused() -> None:
    encoder = SampleEncoder(tiny_processor("qwen2_5_omni"), max_tokens=10)
    with pytest.raises(DataError, match="sample 2 has .* tokens, more than 10; shorten it or its media"):
        encoder.encode([Sample("1", "text", text="a"), conversation(id="2", prompt="b" * 50)])
    with pytest.raises(DataError, match="max_tokens must be at least 2"):
        SampleEncoder(tiny_processor("qwen2_5_omni"), max_tokens=1)
    with pytest.raises(DataError, match="sample 1 has no token to predict"):
        encoder.encode([Sample("1", "text", text="a")])


# What the processor says


@pytest.mark.parametrize("with_answer", [True, False])
def test_every_output_of_the_processor_is_kept(family: str, with_answer: bool) -> None:
    """Against the processor's own way: conversation with media in, tensors out."""
    processor: Any = tiny_processor(family)
    media = media_of(family)
    sample = conversation(**media)
    content: list[dict[str, Any]] = []
    if "image" in media:
        content.append({"type": "image", "image": media["image"]})
    if "audio" in media:
        content.append({"type": "audio", "audio": media["audio"]["array"]})
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": sample.prompt}]}]
    if with_answer:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": "red"}]})
    options = {"padding": True, "return_tensors": "pt"}
    direct = processor.apply_chat_template(
        messages, add_generation_prompt=not with_answer, tokenize=True, return_dict=True, processor_kwargs=options
    )
    direct = {name: torch.as_tensor(np.asarray(value)) for name, value in direct.items()}  # some give lists
    found = SampleEncoder(processor).encode([sample], with_answer=with_answer).inputs
    assert set(found) == set(direct)
    length = found["input_ids"].shape[1]  # without the white space after the end of the turn
    for name, value in found.items():
        expected = direct[name]
        if name in PER_TOKEN:
            expected = expected[:, :length]
            assert direct["input_ids"].shape[1] - length <= (1 if with_answer else 0)
        assert torch.equal(value, expected), name


def test_a_batch_holds_what_its_samples_hold_alone(family: str) -> None:
    encoder = encoder_of(family)
    samples = [conversation(**media_of(family, 1)), Sample("2", "text", text="words"), conversation(id="3")]
    samples += [conversation(id="4", prompt="And now?", **media_of(family, 2))]
    alone = [encoder.encode([sample]) for sample in samples]
    batch = encoder.encode(samples)
    for row, one in enumerate(alone):
        assert tokens(batch, row) == tokens(one)
        length = len(tokens(one))
        assert torch.equal(batch.answer_mask[row, -length:], one.answer_mask[0])
        for name in PER_TOKEN & set(one.inputs):
            assert torch.equal(batch.inputs[name][row, -length:], one.inputs[name][0])
        for name in PER_SAMPLE.get(family, set()) & set(one.inputs):
            assert torch.equal(batch.inputs[name][row, : one.inputs[name].shape[1]], one.inputs[name][0])
    for name in set(batch.inputs) - PER_TOKEN - PADDED.get(family, frozenset()) - PER_SAMPLE.get(family, set()):
        parts = [one.inputs[name] for one in alone if name in one.inputs]
        if parts and name != "batch_num_images":
            assert torch.equal(batch.inputs[name], torch.cat(parts)), name


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_token_types_are_asked_for_where_positions_need_them(name: str) -> None:
    processor: Any = tiny_processor(name)
    processor.return_mm_token_type_ids = False  # as in versions where it is off by default
    inputs = SampleEncoder(processor).encode([conversation(image=picture())]).inputs
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # numpy about a processor
@pytest.mark.parametrize("name", [f for f in FAMILIES if "video" in tiny_media(f)])
def test_videos(name: str, tmp_path: Path) -> None:
    encoder = encoder_of(name)
    frames = [picture(i, (28, 28)) for i in range(4)]
    frames[0].save(tmp_path / "v.webp", save_all=True, append_images=frames[1:], lossless=True)
    listed, animated = (encoder.encode([conversation(video=v)]) for v in (frames, tmp_path / "v.webp"))
    shown = getattr(encoder.processor, "video_token_id", encoder.processor.image_token_id)
    assert (listed.inputs["input_ids"] == shown).any()
    assert all(torch.equal(listed.inputs[k], animated.inputs[k]) for k in listed.inputs)
    assert measured(encoder, listed) == f"red{ENDING[name]}"


def test_a_beginning_of_sequence_token_comes_once() -> None:
    processor: Any = tiny_processor("llava")
    once = tokens(SampleEncoder(processor).encode([conversation()]))
    assert once[0] == processor.tokenizer.bos_token_id
    processor.chat_template = "{{ bos_token }}" + processor.chat_template
    assert tokens(SampleEncoder(processor).encode([conversation()])) == once


def test_padding_side_is_restored(family: str) -> None:
    encoder = SampleEncoder(tiny_processor(family))
    unused = encoder.tokenizer.backend_tokenizer.to_str()
    encoder.tokenizer.padding_side = "right"
    batch = encoder.encode([conversation(), conversation(id="2", prompt="What is it then?")], with_answer=False)
    assert batch.inputs["attention_mask"][:, -1].all() and not batch.inputs["attention_mask"][:, 0].all()
    assert encoder.tokenizer.backend_tokenizer.to_str() == unused
    with pytest.raises(DataError):
        encoder.encode([conversation(image=Path("gone.png"), audio=Path("gone.wav"))])
    assert encoder.tokenizer.padding_side == "right"


def test_encoding_is_reproducible() -> None:
    processor: Any = tiny_processor("qwen2_5_omni")
    processor.feature_extractor.dither = 0.1
    encoder, sample = SampleEncoder(processor), conversation(audio=sound(0.5), image=picture())
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = encoder.encode([sample]).inputs
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    torch.manual_seed(5)
    again = encoder.encode([sample]).inputs
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_sounds_are_resampled_to_the_processors_rate() -> None:
    encoder = encoder_of("qwen2_audio")
    time = np.arange(8_000 // 2) / 8_000
    low = {"array": np.sin(2 * np.pi * 440 * time), "sampling_rate": 8_000}
    time = np.arange(16_000 // 2) / 16_000
    high = {"array": np.sin(2 * np.pi * 440 * time), "sampling_rate": 16_000}
    one, two = (encoder.encode([conversation(audio=a)]).inputs for a in (low, high))
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert float((one["input_features"] - two["input_features"])[..., 5:40, :].abs().max()) < 1.0


# Batches


def test_batches_are_complete_and_depend_on_the_samples_alone(tmp_path: Path) -> None:
    encoder = encoder_of("qwen2_5_omni")
    samples = load_samples(tiny_samples("qwen2_5_omni", tmp_path, count=10))
    batches = list(encoder.batches(samples, 3))
    assert [len(b.samples) for b in batches] == [3, 3, 3, 1]
    order = [s.id for batch in batches for s in batch.samples]
    assert sorted(order) == sorted(s.id for s in samples)
    assert order == [s.id for batch in encoder.batches(list(reversed(samples)), 3) for s in batch.samples]
    assert list(encoder.batches([], 3)) == []
    with pytest.raises(DataError, match="batch size must be at least 1"):
        next(encoder.batches(samples, 0))


@pytest.mark.parametrize("kind", ["audio", "image", "text"])
def test_batches_hold_samples_of_like_length(kind: str) -> None:
    sizes = np.random.default_rng(0).permutation(12) + 2
    made = {
        "audio": lambda n: {"audio": sound(n * 0.06)},
        "image": lambda n: {"image": picture(size=(28, 28 * int(n)))},
        "text": lambda n: {"prompt": "word " * int(n)},
    }
    samples = [conversation(id=str(i), **made[kind](n)) for i, n in enumerate(sizes)]
    ordered = [s.id for batch in encoder_of("qwen2_5_omni").batches(samples, 4) for s in batch.samples]
    assert ordered == [str(i) for i in np.argsort(sizes)]
    assert len({estimated_tokens(s) for s in samples}) > 6


# Mistakes


@pytest.mark.parametrize(
    ("name", "sample", "message"),
    [
        ("llava", {"audio": sound(0.3)}, r"sample 1 has audio, which LlavaProcessor cannot take \(it takes image\)"),
        ("qwen2_audio", {"image": picture()}, "sample 1 has image, which Qwen2AudioProcessor cannot take"),
        ("llava", {"video": [picture()]}, "sample 1 has video, which LlavaProcessor cannot take"),
        ("qwen2_5_omni", {"audio": sound(1.1)}, "sample 1 has 1.1 s of audio; this model hears at most 1 s"),
        ("qwen2_5_omni", {"image": Path("gone.png")}, "sample 1: image file gone.png does not exist"),
        ("qwen2_5_omni", {"audio": Path("gone.wav")}, "sample 1: audio file gone.wav does not exist"),
        ("qwen2_vl", {"image": Image.new("RGB", (2, 500))}, "sample 1: Qwen2VLProcessor refuses it: .*aspect ratio"),
        ("qwen2_vl", {"prompt": "<|image_pad|> what?"}, r"sample 1: its prompt holds <\|image_pad\|>"),
        ("llava", {"answer": "an <image>"}, "sample 1: its answer holds <image>, which stands for media"),
        ("llava", {"answer": None}, "sample 1 has no answer"),
    ],
)
def test_a_sample_that_a_model_cannot_take_is_named(name: str, sample: dict[str, Any], message: str) -> None:
    good = conversation(id="good", **media_of(name))
    with pytest.raises(DataError, match=message):
        encoder_of(name).encode([good, conversation(**sample), good])


def test_processors_that_cannot_be_used() -> None:
    with pytest.raises(DataError, match="object has no tokenizer"):
        SampleEncoder(object())
    processor: Any = tiny_processor("qwen2_5_omni")
    with pytest.raises(DataError, match="no samples"):
        SampleEncoder(processor).encode([])
    processor.chat_template = processor.chat_template.replace("'video'", "'film'")
    with pytest.raises(DataError, match=r"sample 1: .*video"):  # in the template's silence the video would be lost
        SampleEncoder(processor).encode([conversation(video=[picture(size=(28, 28))] * 2)])
    processor.chat_template = "{{ raise_exception('only cats') }}"
    with pytest.raises(DataError, match="sample 1: the model's chat template refuses it: only cats"):
        SampleEncoder(processor).encode([conversation()])
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template.* put the model's chat_template.jinja"):
        SampleEncoder(processor).encode([conversation()])
    assert SampleEncoder(processor).encode([Sample("1", "text", text="needs none")]).answer_mask.any()
    processor.tokenizer.pad_token = None
    with pytest.raises(DataError, match=r"has no padding token; set one"):
        SampleEncoder(processor)


def test_a_processor_with_damaged_settings_is_named(tmp_path: Path) -> None:
    """Whatever it raises: here a TypeError of torch."""
    processor = tiny_processor("qwen2_5_vl")
    processor.image_processor.image_mean = ["x", "y", "z"]
    sample = next(s for s in load_samples(tiny_samples("qwen2_5_vl", tmp_path)) if s.image is not None)
    with pytest.raises(DataError, match=rf"sample {sample.id}: .* refuses it: .* its configuration is damaged"):
        SampleEncoder(processor).encode([sample])
