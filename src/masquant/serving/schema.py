# SPDX-License-Identifier: Apache-2.0
"""Requests and answers of OpenAI's chat completions, as far as they are served. What is not known is refused."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

from ..calibration.media import check_audio, check_image
from ..conversation import Message, Part, Sampling
from ..errors import DataError
from .errors import ApiError
from .limits import Limits

AUDIO_FORMATS = ("wav", "mp3", "flac", "ogg")
_MAX_MESSAGES = 1000


def _whole(text: str) -> str:
    """Refuse half of a surrogate pair, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair at position {error.start}") from error
    return text


Text = Annotated[str, AfterValidator(_whole)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class TextPart(_Strict):
    """Words."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Strict):
    """A picture."""

    url: str = Field(description="`data:image/...;base64,...`; other addresses are refused, nothing is fetched.")
    detail: Literal["auto"] = "auto"


class ImagePart(_Strict):
    """A picture in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(_Strict):
    """A sound."""

    data: str = Field(description="Content of the file, in base64.")
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(_Strict):
    """A sound in a message."""

    type: Literal["input_audio"]
    input_audio: InputAudio


UserPart = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]
_TextParts = Annotated[list[TextPart], Field(min_length=1)]


class SystemMessage(_Strict):
    """What the model is told beforehand."""

    role: Literal["system", "developer"]
    content: Text | _TextParts


class UserMessage(_Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: Text | Annotated[list[UserPart], Field(min_length=1)]


class AssistantMessage(_Strict):
    """What the model answered before."""

    role: Literal["assistant"]
    content: Text | _TextParts
    refusal: None = None
    tool_calls: None = None


class StreamOptions(_Strict):
    """With `stream`."""

    include_usage: bool = Field(False, description="End with numbers of tokens.")


_Stop = Annotated[Text, Field(min_length=1, max_length=256)]


class CompletionRequest(_Strict):
    """A conversation to go on with; its last message is the user's."""

    model: Text
    messages: list[Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]] = Field(
        min_length=1, max_length=_MAX_MESSAGES
    )
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="0: the likeliest tokens; left out: as the model's generation config says."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    stop: _Stop | Annotated[list[_Stop], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, description="Not used.")

    def sampling(self, limits: Limits) -> Sampling:
        """How the answer is chosen."""
        asked = self.max_completion_tokens or self.max_tokens or limits.new_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(asked, self.temperature, self.top_p, stop)


def _integral(value: Any) -> Any:
    """To JSON 3.0 is an integer too."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def request_model(limits: Limits) -> type[CompletionRequest]:
    """`CompletionRequest` with a server's bounds in its schema."""
    tokens: Any = (Annotated[int, Field(ge=1, le=limits.new_tokens), BeforeValidator(_integral)] | None, None)
    return create_model(
        "ChatCompletionRequest",
        __base__=CompletionRequest,
        __doc__=CompletionRequest.__doc__,
        max_tokens=tokens,
        max_completion_tokens=tokens,
    )


class Usage(BaseModel):
    """Numbers of tokens; those of media count as prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """How fast the answer came; not among OpenAI's own fields."""

    first_token_seconds: float
    tokens_per_second: float


class AnswerMessage(BaseModel):
    """What the model says."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """The one answer."""

    index: int = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]


class Completion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    timings: Timings


class Model(BaseModel):
    """A model that is served; `scheme`, `accepts` and `max_model_len` are not among OpenAI's own fields."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "masquant"
    scheme: str
    accepts: list[str]
    max_model_len: int


class ModelList(BaseModel):
    """All models, the one that was asked for first, then its baseline."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether answers are to be had."""

    status: Literal["ok", "stopping"]


def _decode(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"{where} is no base64: {error}", code="invalid_base64", param="messages") from error


def _image(url: str, where: str) -> bytes:
    head, _, data = url.partition(",")
    if not head.lower().startswith("data:"):
        raise ApiError(
            400,
            f"{where}: the picture is an address, and nothing is fetched here; send it as data:image/...;base64",
            code="remote_url_refused",
            param="messages",
        )
    if not head.lower().startswith("data:image/") or not head.lower().endswith(";base64"):
        raise ApiError(
            400, f"{where}: the picture must be data:image/...;base64,...", code="invalid_data_uri", param="messages"
        )
    return _decode(data, f"{where}: the picture")


def _part(part: TextPart | ImagePart | AudioPart, where: str) -> Part:
    if isinstance(part, TextPart):
        return Part("text", part.text)
    if isinstance(part, ImagePart):
        return Part("image", _image(part.image_url.url, where))
    return Part("audio", _decode(part.input_audio.data, f"{where}: the audio"))


def conversation_of(request: CompletionRequest, limits: Limits) -> list[Message]:
    """The request's messages with decoded base64, and their media within bounds by their headers.

    Raises:
        ApiError: base64 or a data URI that is none, an address, too many media, pixels or seconds.
        DataError: no picture, or no sound.
    """
    found = []
    for number, message in enumerate(request.messages, 1):
        content: Sequence[Any] = (
            [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        )
        parts = tuple(_part(part, f"message {number}") for part in content)
        found.append(Message("system" if message.role == "developer" else message.role, parts))
    _check_media(found, limits)
    return found


def _check_media(messages: Sequence[Message], limits: Limits) -> None:
    count, pixels, seconds = 0, 0, 0.0
    for number, message in enumerate(messages, 1):
        for part in message.parts:
            if part.kind == "image":
                width, height = check_image(part.content, f"message {number}")
                pixels += width * height
            elif part.kind == "audio":
                seconds += check_audio(part.content, f"message {number}")
            count += part.kind != "text"
    for value, limit, what, code in (
        (count, limits.media, "pictures and sounds", "too_many_media"),
        (pixels, limits.pixels, "pixels", "image_too_large"),
        (seconds, limits.audio_seconds, "seconds of audio", "audio_too_long"),
    ):
        if value > limit:
            message_text = f"the conversation has {value:,.10g} {what}; this server takes at most {limit:,.10g}"
            raise ApiError(400, message_text, code=code, param="messages")
    if not messages or messages[-1].role != "user":
        raise DataError("a conversation must end with a message of the user, which the model answers")
