"""Requests to the server that it cannot answer: status 400, with a sentence that says why."""

import contextlib
import functools
import importlib
import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from transformers import GenerationConfig


ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Fields that the server does not know what to do with, and the values at which nothing needs to be done.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
}


def _is_number(value: Any, low: float = -math.inf, high: float = math.inf) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_stop(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, list) and bool(value) and all(map(_is_text, value)))


def _is_bias(value: Any) -> bool:
    return isinstance(value, dict) and all(name.isdigit() and _is_number(bias) for name, bias in value.items())


def _is_tools(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(tool, dict) for tool in value)


# Which values a field may have, and how to say that. `null` is as if it was not there.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "model": (_is_text, "the name of a mixture"),
    "prompt": (_is_text, "a text"),
    "suffix": (lambda value: isinstance(value, str), "a text"),
    "max_tokens": (_is_count, "a whole number of at least 1"),
    "max_completion_tokens": (_is_count, "a whole number of at least 1"),
    "max_output_tokens": (_is_count, "a whole number of at least 1"),
    "temperature": (lambda value: _is_number(value, 0, 1e6), "a number of at least 0"),
    "top_p": (lambda value: _is_number(value, 1e-12, 1), "a number above 0 and at most 1"),
    "frequency_penalty": (lambda value: _is_number(value, -0.999, 1e6), "a number above -1"),
    "seed": (lambda value: isinstance(value, int) and -(2**63) <= value < 2**63, "a whole number of 64 bits"),
    "stop": (_is_stop, "a text, or a list of texts, none of them empty"),
    "logit_bias": (_is_bias, "a mapping of token ids to numbers"),
    "stream": (lambda value: isinstance(value, bool), "true or false"),
    "tools": (_is_tools, "a list of objects"),
    "chat_template_kwargs": (lambda value: isinstance(value, dict), "an object"),
}


class RequestError(ValueError):
    """A request that the client has to change."""


def check_request(body: dict[str, Any], needed: str | None = None) -> None:
    """
    Checks the fields of a request.

    Args:
        body (`dict`): the request. A `stop` without texts, and fields that are `null`, are taken out.
        needed (`str`, *optional*): the field with the prompt.

    Raises:
        `RequestError`: for the first field that makes no sense.
    """
    for name in [name for name, value in body.items() if value is None or (name == "stop" and value == [])]:
        del body[name]
    if needed is not None and needed not in body:
        raise RequestError(f"`{needed}` is needed.")
    for name, (holds, words) in FIELDS.items():
        if name in body and not holds(body[name]):
            raise RequestError(f"`{name}` must be {words}, got {body[name]!r}.")
    for name, values in NEUTRAL.items():
        if name in body and body[name] not in values:
            raise RequestError(f"`{name}={body[name]!r}` is not supported: leave it out.")
    if "messages" in body:
        _check_messages(body["messages"])
    if "generation_config" in body:
        _check_generation_config(body["generation_config"])


def _check_messages(messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise RequestError(f"`messages` must be a list of one or more messages, got {messages!r}.")
    for k, message in enumerate(messages):
        where = f"messages[{k}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise RequestError(f"`{where}` must have a `role`, one of {', '.join(ROLES)}; got {message!r}.")
        calls = message.get("tool_calls") or []
        if not _is_tools(calls) or any("arguments" not in (call.get("function") or call) for call in calls):
            raise RequestError(f"`{where}.tool_calls` must be a list of functions with arguments, got {calls!r}.")
        content = message.get("content")
        if isinstance(content, str) or (content is None and calls):
            continue
        if not isinstance(content, list) or not content:
            raise RequestError(f"`{where}.content` must be a text, or a list of parts, got {content!r}.")
        for part in content:
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    f'`{where}.content` has a part that a mixture cannot read: only {{"type": "text", "text": ...}} can be, got '
                    f"{part!r}."
                )


def _check_generation_config(text: Any) -> None:
    try:
        config = json.loads(text) if isinstance(text, str) else None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise RequestError(
            f"`generation_config` must be an object in JSON, as a text, such as '{{\"mixture_weights\": [0.5, 0.5]}}', got "
            f"{text!r}."
        )
    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")} | {
        "mixture_weights",
        "prune_below",
    }
    if unknown := sorted(set(config) - known):
        raise RequestError(f"`generation_config` has names that are no options of generate(): {', '.join(unknown)}.")
    for name in ("num_beams", "num_return_sequences", "max_new_tokens", "max_length"):
        if not (config.get(name) is None or _is_count(config[name])):
            raise RequestError(
                f"`{name}` of `generation_config` must be a whole number of at least 1, got {config[name]!r}."
            )
    try:
        GenerationConfig(**config).validate()
    except Exception as err:  # ValueError, TypeError, or an error of a strict dataclass
        raise RequestError(f"`generation_config` cannot be used: {err}") from err


# ---- the server ----

# The field with the prompt, by handler: by name, as their modules need a web server.
PROMPTS = {"ChatCompletionHandler": "messages", "CompletionHandler": "prompt", "ResponseHandler": "input"}
# What the server writes before the first token, and an error of its stream, in whose message it escapes no quotation marks.
OPENINGS = ('"role":"assistant"', '"type":"response.created"')
UNESCAPED = 'data: {"error": "'


def answer_client_errors(build_server: Callable[..., Any]) -> Callable[..., Any]:
    """
    A `build_server` of Transformers whose handlers check requests, and answer errors with a sentence.

    Args:
        build_server (`Callable`): the function, which takes the handlers of routes.
    """

    @functools.wraps(build_server)
    def build(*args: Any, **kwargs: Any) -> Any:
        for handler in (*args, *kwargs.values()):
            if needed := PROMPTS.get(type(handler).__name__):
                handler.handle_request = _guarded(handler.handle_request, needed)
                handler.generation_state.get_manager = _with_room(handler.generation_state.get_manager)
        return build_server(*args, **kwargs)

    return build


def _guarded(handle: Callable[..., Awaitable[Any]], needed: str) -> Callable[..., Awaitable[Any]]:
    """A handler of requests that answers those that make no sense with status 400, and models that are not there with 404."""
    from jinja2 import TemplateError

    responses = importlib.import_module("fastapi.responses")  # by name: it is there only where a server can run
    http_error = importlib.import_module("fastapi").HTTPException

    def answer(status: int, message: Any) -> Any:
        """An error in the form that clients of OpenAI look for."""
        error = {
            "message": " ".join(str(message).split()),
            "type": "invalid_request_error",
            "param": None,
            "code": None,
        }
        return responses.JSONResponse({"error": error}, status)

    async def guarded(body: dict[str, Any], request_id: str) -> Any:
        try:
            check_request(body, needed)
            response = await handle(body, request_id)
            if isinstance(response, responses.StreamingResponse):
                response.body_iterator = await _begun(response.body_iterator)
        except http_error as err:
            return answer(err.status_code, err.detail)
        except (ValueError, TemplateError) as err:
            return answer(400, err)
        except OSError as err:
            if err.errno is not None:  # of the machine, and not of a loader that found no such model
                raise
            return answer(404, err)
        return response

    return guarded


def _with_room(get_manager: Callable[..., Any]) -> Callable[..., Any]:
    """A `get_manager` whose managers refuse what does not fit into the context of a mixture."""

    def checked(generate: Callable[..., Any]) -> Callable[..., Any]:
        def check_and_generate(
            model: Any, processor: Any, inputs: Any, config: GenerationConfig, *args, **kwargs
        ) -> Any:
            context, length = model.config.max_position_embeddings, inputs["input_ids"].shape[-1]
            if context is not None and length + (config.max_new_tokens or 1) > context:
                raise RequestError(
                    f"A prompt of {length} tokens and a completion of {config.max_new_tokens} do not fit into the context of "
                    f"{context} tokens: shorten the prompt, or lower `max_tokens`."
                )
            return generate(model, processor, inputs, config, *args, **kwargs)

        return check_and_generate

    def get(*args: Any, **kwargs: Any) -> Any:
        manager = get_manager(*args, **kwargs)
        for name in ("generate_streaming", "generate_non_streaming"):
            if name not in vars(manager):  # of its class still
                setattr(manager, name, checked(getattr(manager, name)))
        return manager

    return get


async def _begun(chunks: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """
    Chunks of a stream of which the first tokens are there.

    Raises:
        `RequestError`: when there is an error in their place, which a response with status 200 would carry otherwise.
    """
    first: list[str] = []
    async for chunk in chunks:
        if (message := _error_in(chunk)) is not None:
            raise RequestError(message)
        first.append(chunk)
        if not any(opening in chunk for opening in OPENINGS):
            break

    async def rest() -> AsyncGenerator[str, None]:
        async with contextlib.aclosing(chunks):  # which stops the generation when the client has gone
            for chunk in first:
                yield chunk
            async for chunk in chunks:
                before, error, _ = chunk.partition(UNESCAPED)
                yield f"{before}data: {json.dumps({'error': _error_in(chunk)})}\n\n" if error else chunk

    return rest()


def _error_in(chunk: str) -> str | None:
    """The message of an error that the server writes into a stream. In texts of a model, quotation marks are escaped."""
    _, unescaped, message = chunk.partition(UNESCAPED)
    if unescaped:
        return message.rstrip().removesuffix('"}')
    event = next((event for event in chunk.split("\n\n") if '"type":"error"' in event), None)
    return json.loads(event.removeprefix("data: "))["message"] if event is not None else None
