"""Conversations: the inputs are those of calibration, the answers are generate's, and they can be stopped."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_models import FAMILIES, VOCAB_SIZE, talking_model, tiny_media, tiny_model, tiny_processor, tiny_samples

from masquant.calibration.dataset import load_samples
from masquant.calibration.encoding import SampleEncoder
from masquant.conversation import Answer, Message, Part, Responder, Sampling
from masquant.errors import DataError
from masquant.models import core_of
from masquant.pipeline import quantize
from masquant.recipe import Recipe
from masquant.runtime.native import instruction_sets

GREEDY = Sampling(max_new_tokens=24, temperature=0)
OMNI = "qwen2_5_omni"


@pytest.fixture(scope="module")
def responder() -> Responder:
    return Responder(talking_model(OMNI), tiny_processor(OMNI))


def user(text: str, **media: Any) -> Message:
    return Message("user", (*(Part(kind, content) for kind, content in media.items()), Part("text", text)))


@pytest.mark.parametrize("family", FAMILIES)
def test_inputs_and_answer_are_those_of_the_toolkit(family: str, tmp_path: Path) -> None:
    model, processor = talking_model(family), tiny_processor(family)
    sample = load_samples(tiny_samples(family, tmp_path, count=1))[0]
    media = {kind: getattr(sample, kind) for kind in sample.media}
    assert set(media) == set(tiny_media(family)) - {"video"}
    responder = Responder(model, processor)
    expected = SampleEncoder(processor).encode([sample], with_answer=False).inputs
    inputs = responder.encode([user(sample.prompt, **media)])
    assert set(inputs) == set(expected) and all(torch.equal(inputs[name], expected[name]) for name in expected)
    contents = {kind: path.read_bytes() for kind, path in media.items()}  # as a server gets them
    again = responder.encode([user(sample.prompt, **contents)])
    assert all(torch.equal(again[name], expected[name]) for name in expected)

    answer = responder.answer([user(sample.prompt, **media)], GREEDY)
    text = "".join(answer)
    output = core_of(model).generate(
        **expected, max_new_tokens=24, do_sample=False, pad_token_id=processor.tokenizer.pad_token_id
    )
    new = output[0, expected["input_ids"].shape[1] :]
    assert text == processor.tokenizer.decode(new, skip_special_tokens=True) and text
    assert answer.prompt_tokens == expected["input_ids"].shape[1] and answer.completion_tokens == len(new) == 24
    assert answer.finish_reason == "length"
    assert 0 < answer.first_token_seconds < 60 and answer.tokens_per_second == pytest.approx(
        23 / answer.decode_seconds
    )


@pytest.mark.parametrize("in_kernels", [True, False])
def test_a_quantized_model_answers_as_generate_does(
    in_kernels: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its linears learn every token's modality from the forward pass, here in another thread."""
    if in_kernels and not instruction_sets():
        pytest.skip("there are no kernels")
    model, processor = talking_model(OMNI), tiny_processor(OMNI)
    samples = load_samples(tiny_samples(OMNI, tmp_path, count=6))
    quantize(model, processor, samples, recipe=Recipe.preset("masquant-paper", "W4A8", 32))
    spoken = next(s for s in samples if s.image is not None and s.audio is not None)
    responder = Responder(model, processor)
    if not in_kernels:
        monkeypatch.setattr("masquant.conversation.decodes_natively", lambda _: False)
    messages = [user(spoken.prompt, image=spoken.image, audio=spoken.audio)]
    inputs = responder.encode(messages)
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=256)
    text = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if in_kernels:
        monkeypatch.setattr(model, "generate", None)
    answer = responder.answer(messages, GREEDY)
    assert "".join(answer) == text
    assert (answer.completion_tokens, answer.finish_reason) == (24, "length")
    new = output[0, inputs["input_ids"].shape[1] :].tolist()
    end = new[6]
    model.generation_config.eos_token_id = end
    short = responder.answer(messages, GREEDY)
    said = processor.tokenizer.decode(new[: new.index(end)])
    assert "".join(short) in (
        said,
        said + processor.tokenizer.decode(end),
    )  # generate shows an end that is not special
    assert (short.completion_tokens, short.finish_reason) == (new.index(end) + 1, "stop")
    model.generation_config.eos_token_id = VOCAB_SIZE
    long = responder.answer(messages, Sampling(700, temperature=0))
    next(long)
    long.close()
    assert 0 < long.completion_tokens < 700 and long.finish_reason == "cancelled"


def test_media_of_all_turns_are_seen(responder: Responder, tmp_path: Path) -> None:
    samples = load_samples(tiny_samples(OMNI, tmp_path, count=1))
    picture, sound = samples[0].image, samples[0].audio
    first = responder.encode([user("One?", image=picture)])
    both = responder.encode(
        [
            Message.of_text("system", "Be short."),
            user("One?", image=picture),
            Message.of_text("assistant", "One."),
            user("And now?", image=picture, audio=sound),
        ]
    )
    token = responder.encoder.tokenizer.convert_tokens_to_ids(responder.encoder.placeholders["image"])
    assert (both["input_ids"] == token).sum() == 2 * (first["input_ids"] == token).sum() > 0
    text = responder.encoder.tokenizer.decode(both["input_ids"][0])
    assert text.startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n<|vision_bos|>")
    assert text.endswith("And now?<|im_end|>\n<|im_start|>assistant\n") and "assistant\nOne.<|im_end|>" in text


def test_a_stop_string_ends_the_answer_before_it(responder: Responder) -> None:
    whole = "".join(responder.answer([user("Hello")], GREEDY))
    for stop in (whole[5:8], whole[7:9]):
        answer = responder.answer([user("Hello")], replace(GREEDY, stop=("never so", stop)))
        assert "".join(answer) == whole[: whole.index(stop)]
        assert answer.finish_reason == "stop"
    tail = replace(GREEDY, stop=(whole[-3:] + "?",))  # its start is the end of the answer: held back, then given
    assert "".join(responder.answer([user("Hello")], tail)) == whole


def test_the_models_end_token_stops(responder: Responder) -> None:
    plain = core_of(responder.model).generate(
        **responder.encode([user("Hello")]), max_new_tokens=3, do_sample=False, pad_token_id=256
    )
    ending = Responder(talking_model(OMNI), responder.encoder.processor)
    ending.model.generation_config.eos_token_id = [int(plain[0, -1]), VOCAB_SIZE]
    answer = ending.answer([user("Hello")], GREEDY)
    list(answer)
    assert answer.completion_tokens <= 3 and answer.finish_reason == "stop"


def test_cancelling_frees_the_model(responder: Responder) -> None:
    long = Sampling(max_new_tokens=900, temperature=0)
    answer = responder.answer([user("Hello")], long)
    next(answer)
    answer.close()
    assert 0 < answer.completion_tokens < 900 and answer.finish_reason == "cancelled"
    assert len("".join(responder.answer([user("Hello")], GREEDY))) > 0


def test_answers_follow_each_other(responder: Responder) -> None:
    answers: list[Answer] = [responder.answer([user("Hello")], GREEDY) for _ in range(3)]
    texts = ["".join(answer) for answer in reversed(answers)]
    assert texts[0] == texts[1] == texts[2]


def test_sampling_differs_and_top_p_is_used(responder: Responder) -> None:
    hot = {"".join(responder.answer([user("Hi")], Sampling(12, temperature=2.0))) for _ in range(3)}
    assert len(hot) > 1
    greedy = "".join(responder.answer([user("Hi")], Sampling(12, temperature=0)))
    narrow = "".join(responder.answer([user("Hi")], Sampling(12, temperature=1.0, top_p=1e-6)))
    assert narrow == greedy


def test_what_the_model_raises_comes_through(responder: Responder, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(responder.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(responder.answer([user("Hello")], GREEDY))


def test_the_answer_fits_into_the_context() -> None:
    short = Responder(talking_model(OMNI), tiny_processor(OMNI), max_tokens=100)
    answer = short.answer([user("Hello")], Sampling(900, temperature=0))
    list(answer)
    assert answer.prompt_tokens + answer.completion_tokens == 100 and answer.finish_reason == "length"


def png(width: int = 28, height: int = 28) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (width, height)).save(stream, "PNG")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "must end with a message of the user"),
        ([Message.of_text("assistant", "Hi")], "must end with a message of the user"),
        ([Message("user", ())], "message 1 is empty"),
        ([user("a<|IMAGE|>")], "message 1 holds <|IMAGE|>"),
        ([user("a"), Message("assistant", (Part("image", png()),)), user("b")], "message 2 is the assistant's"),
        ([user("a", image=b"GIF89a")], "message 1: the picture is no readable image"),
        ([user("a", image=png()[:60])], "message 1: the picture is a broken image"),
        ([user("a", audio=b"RIFF")], "message 1: the audio is no readable sound file"),
        ([user("a", image=Path("gone.png"))], "gone.png does not exist"),
        ([user("a" * 1100)], "tokens; fewer than 1,024 leave room"),
        ([user("a" * 20_000)], "20,000 characters, more than 1,024 tokens hold"),
    ],
)
def test_refusals(responder: Responder, messages: list[Message], message: str) -> None:
    with pytest.raises(DataError, match=message.replace("|", r"\|")):
        responder.answer(messages, GREEDY)


def test_a_kind_that_the_model_lacks_is_refused() -> None:
    deaf = Responder(tiny_model("qwen2_vl"), tiny_processor("qwen2_vl"))
    assert deaf.accepts == ("image",)
    with pytest.raises(DataError, match="message 1 has audio, which Qwen2VLProcessor cannot take"):
        deaf.answer([user("a", audio=b"RIFF")])
