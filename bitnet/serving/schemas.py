"""What requests may hold, field by field. Whatever is not here is refused by its name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, model_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


def wrong(field: str, why: str) -> PydanticCustomError:
    """What is wrong with a field because of another one."""
    return PydanticCustomError("value_error", "{why}", {"field": field, "why": why})


class Strict(BaseModel):
    """Unknown fields are errors, and so are numbers in quotes."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    include_usage: StrictBool = False


class JsonSchema(Strict):
    name: StrictStr = "answer"
    description: StrictStr | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise wrong("json_schema", "json_schema belongs to type json_schema, and to no other")
        return self


class Function(Strict):
    name: Annotated[StrictStr, Field(min_length=1, max_length=64)]
    description: StrictStr | None = None
    parameters: dict[str, Any] = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: StrictBool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ToolName(Strict):
    name: StrictStr


class ToolChoice(Strict):
    type: Literal["function"]
    function: ToolName


class Common(Strict):
    """What all requests that generate share."""

    model: StrictStr | None = None
    stream: StrictBool = False
    temperature: Annotated[float, Field(ge=0, le=100)] | None = (
        None  # None, here and below: as generation_config.json says
    )
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: StrictStr | None = None


class Sampled(Common):
    """What chat and plain completions share."""

    stream_options: StreamOptions | None = None
    n: Annotated[StrictInt, Field(ge=1, le=16)] = 1
    stop: StrictStr | Annotated[list[StrictStr], Field(max_length=8)] | None = None
    seed: StrictInt | None = None
    top_k: Annotated[StrictInt, Field(ge=0)] | None = None
    min_p: Probability | None = None
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    response_format: ResponseFormat | None = None
    ignore_eos: StrictBool = False

    @model_validator(mode="after")
    def _streams(self) -> "Sampled":
        if self.stream_options is not None and not self.stream:
            raise wrong("stream_options", "stream_options need stream: true")
        return self


class Message(BaseModel):
    """A turn, handed to the chat template as it is; its text may come in parts."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: StrictStr | list[dict[str, Any]] | None = None


class ChatRequest(Sampled):
    """/v1/chat/completions"""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: StrictBool = True
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ChatRequest":
        if self.top_logprobs is not None and not self.logprobs:
            raise wrong("top_logprobs", "top_logprobs need logprobs: true")
        if self.tool_choice not in (None, "none") and not self.tools:
            raise wrong("tool_choice", "tool_choice needs tools")
        if self.tools and self.response_format and self.response_format.type != "text":
            raise wrong("response_format", "response_format and tools exclude each other")
        return self


class CompletionRequest(Sampled):
    """/v1/completions"""

    prompt: StrictStr | list[StrictStr] | list[StrictInt] | list[list[StrictInt]]
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    echo: StrictBool = False


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: StrictStr | None = None
    description: StrictStr | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: StrictBool | None = None


class TextOptions(Strict):
    format: TextFormat | None = None


class ResponsesRequest(Common):
    """/v1/responses: text in, text out; nothing is stored."""

    input: StrictStr | Annotated[list[dict[str, Any]], Field(min_length=1)]
    instructions: StrictStr | None = None
    max_output_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    store: Literal[False] | None = None
    text: TextOptions | None = None
    metadata: dict[str, StrictStr] | None = None


class EmbeddingsRequest(Strict):
    """/v1/embeddings"""

    input: StrictStr | Annotated[list[StrictStr], Field(min_length=1, max_length=2048)]
    model: StrictStr | None = None
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[StrictInt, Field(ge=1)] | None = None
    user: StrictStr | None = None


class TokenizeRequest(Strict):
    """/tokenize: a text, or the turns of a chat."""

    model: StrictStr | None = None
    prompt: StrictStr | None = None
    messages: list[Message] | None = None
    add_special_tokens: StrictBool = True

    @model_validator(mode="after")
    def _one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise wrong("prompt", "give either prompt or messages")
        return self


class DetokenizeRequest(Strict):
    """/detokenize"""

    model: StrictStr | None = None
    tokens: list[StrictInt]
