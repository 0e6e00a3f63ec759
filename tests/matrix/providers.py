"""The formats of upstreams: read a request, and write an answer, as the providers' references have them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import attrs

from tests.matrix.scenes import Ask, Call, Image, Json, Part, Reasoning, Reply, Result, Text, Tool, Turn, Usage
from tests.support.provider import Break, Head, Say, Script, Served, Step

FAILS = "the provider is overloaded"
TOO_LONG = "prompt is too long: 250000 tokens > 200000 maximum"


class Upstream(Protocol):
    """One kind of upstream.

    Attributes:
        settings: Its table in the configuration.
        model: A model of it that reasons.
        has_ids: Its tool calls have ids of its own.
    """

    name: str
    settings: Mapping[str, Any]
    model: str
    has_ids: bool

    def read(self, sent: Served) -> Ask:
        """Reads a request, strictly."""

    def write(self, reply: Reply) -> Script:
        """A plain answer."""

    def write_stream(self, reply: Reply) -> Script:
        """A streamed answer."""

    def write_error(self, status: int, message: str) -> Script:
        """A refusal."""

    def can_say(self, reply: Reply) -> Reply:
        """What of an answer the format can carry."""


def halves(text: str) -> tuple[str, str]:
    """Two pieces of a text."""
    at = max(1, len(text) // 2)
    return text[:at], text[at:]


def steps(frames: Iterable[bytes], reply: Reply, content_type: str = "text/event-stream") -> Script:
    """A script of a head, one piece for each frame, and the end of the connection where the reply is cut."""
    found: list[Step] = [Head(200, content_type), *(Say(frame) for frame in frames)]
    return (*found, Break()) if reply.fails == "cut" else tuple(found)


def plain(body: Json, status: int = 200) -> Script:
    """A JSON answer."""
    return (Head(status, "application/json"), Say(json.dumps(body).encode()))


def sse(value: Json | str, name: str = "") -> bytes:
    """One server-sent event."""
    data = value if isinstance(value, str) else json.dumps(value)
    return (f"event: {name}\n" if name else "").encode() + f"data: {data}\n\n".encode()


def data_url(url: str) -> Image:
    """The picture in a data URL."""
    head, _, data = url.partition(",")
    assert head.startswith("data:")
    assert head.endswith(";base64")
    return Image(head[len("data:") : -len(";base64")], data)


# -- chat completions -------------------------------------------------------------------------------------------------


class Chat:
    name = "openai"
    settings: Mapping[str, Any] = {
        "base_url": "https://api.openai.com/v1",
        "api_key": "k",
        "models": ["gpt-5"],
        "responses": "translate",
    }
    model = "gpt-5"
    has_ids = True
    path = "/v1/chat/completions"

    def read(self, sent: Served) -> Ask:
        assert sent.path == self.path, sent.path
        body = sent.json
        turns: list[Turn] = []
        names: dict[str, str] = {}
        for message in body["messages"]:
            content = message["content"]
            parts: list[Part] = []
            for each in content if isinstance(content, list) else [{"type": "text", "text": content}]:
                if each["type"] == "image_url":
                    parts.append(data_url(each["image_url"]["url"]))
                elif each["text"]:
                    parts.append(Text(each["text"]))
            for call in message.get("tool_calls") or ():
                function = call["function"]
                names[call["id"]] = function["name"]
                parts.append(Call(call["id"], function["name"], json.loads(function["arguments"])))
            if message["role"] == "tool":
                [part] = parts
                assert isinstance(part, Text)
                text = part.text.removeprefix("[The tool failed] ")
                call_id = message["tool_call_id"]
                result = Result(call_id, names[call_id], text, is_error=text != part.text)
                if turns[-1].role == "user":
                    turns[-1] = Turn("user", (*turns[-1].parts, result))
                else:
                    turns.append(Turn("user", (result,)))
            else:
                turns.append(Turn({"developer": "system"}.get(message["role"], message["role"]), tuple(parts)))
        form = body.get("response_format")
        return Ask(
            turns=tuple(turns),
            tools=tuple(
                Tool(tool["function"]["name"], tool["function"]["description"], tool["function"]["parameters"])
                for tool in body.get("tools", ())
            ),
            max_tokens=body.get("max_completion_tokens"),
            temperature=body.get("temperature"),
            stop=tuple(body.get("stop", ())),
            effort=body.get("reasoning_effort"),
            schema=form["json_schema"]["schema"] if form else None,
        )

    def _usage(self, usage: Usage) -> Json:
        prompt = usage.input + usage.cache_read + usage.cache_write
        return {
            "prompt_tokens": prompt,
            "completion_tokens": usage.output,
            "total_tokens": prompt + usage.output,
            "prompt_tokens_details": {"cached_tokens": usage.cache_read, "cache_write_tokens": usage.cache_write},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
        }

    def _finish(self, reply: Reply) -> str:
        return "content_filter" if reply.finish == "refusal" else str(reply.finish)

    def _tool_call(self, call: Call) -> Json:
        function = {"name": call.name, "arguments": json.dumps(call.arguments)}
        return {"id": call.id, "type": "function", "function": function}

    def write(self, reply: Reply) -> Script:
        message: Json = {"role": "assistant", "content": None, "refusal": None}
        calls = []
        for part in reply.parts:
            match part:
                case Text(text):
                    message["content"] = (message["content"] or "") + text
                case Reasoning(text):
                    message["reasoning_content"] = text
                case Call():
                    calls.append(self._tool_call(part))
        if calls:
            message["tool_calls"] = calls
        assert reply.usage is not None
        choice = {"index": 0, "message": message, "finish_reason": self._finish(reply), "logprobs": None}
        return plain({**self._head("chat.completion"), "choices": [choice], "usage": self._usage(reply.usage)})

    def _head(self, kind: str) -> Json:
        return {"id": "chatcmpl-7", "object": kind, "created": 1_764_500_000, "model": "gpt-5-2026"}

    def write_stream(self, reply: Reply) -> Script:
        return steps(self._frames(reply), reply)

    def _frames(self, reply: Reply) -> Iterator[bytes]:
        head = self._head("chat.completion.chunk")

        def chunk(delta: Json, finish: str | None = None) -> bytes:
            return sse({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})

        yield chunk({"role": "assistant", "content": ""})
        index = 0
        for part in reply.parts:
            match part:
                case Text(text):
                    yield from (chunk({"content": half}) for half in halves(text))
                case Reasoning(text):
                    yield from (chunk({"reasoning_content": half}) for half in halves(text))
                case Call():
                    call = self._tool_call(part)
                    first, second = halves(call["function"]["arguments"])
                    begins = {**call, "index": index, "function": {"name": part.name, "arguments": ""}}
                    yield chunk({"tool_calls": [begins]})
                    for half in (first, second):
                        yield chunk({"tool_calls": [{"index": index, "function": {"arguments": half}}]})
                    index += 1
        if reply.fails == "error":
            yield sse({"error": {"message": FAILS, "type": "server_error", "code": 503}})
        elif not reply.fails:
            yield chunk({}, self._finish(reply))
            assert reply.usage is not None
            yield sse({**head, "choices": [], "usage": self._usage(reply.usage)})
            yield sse("[DONE]")

    def write_error(self, status: int, message: str) -> Script:
        kind = "invalid_request_error" if status < 500 else "server_error"
        return plain({"error": {"message": message, "type": kind, "param": None, "code": None}}, status)

    def can_say(self, reply: Reply) -> Reply:
        return reply


class Azure(Chat):
    name = "azure"
    settings: Mapping[str, Any] = {
        "kind": "azure",
        "base_url": "https://example.openai.azure.com",
        "api_key": "k",
        "models": ["gpt-5"],
        "responses": "translate",
    }
    path = "/openai/v1/chat/completions"


# -- Messages ---------------------------------------------------------------------------------------------------------


class Anthropic:
    name = "anthropic"
    model = "claude-opus-4-6"
    settings: Mapping[str, Any] = {
        "kind": "anthropic",
        "base_url": "https://api.anthropic.com/v1",
        "api_key": "k",
        "models": ["claude-opus-4-6"],
    }
    has_ids = True

    def read(self, sent: Served) -> Ask:
        assert sent.path == "/v1/messages", sent.path
        body = sent.json
        turns = []
        names: dict[str, str] = {}
        if "system" in body:
            system = body["system"]
            system = system if isinstance(system, str) else "".join([block["text"] for block in system])
            turns.append(Turn("system", (Text(system),)))
        assert body["messages"][0]["role"] == "user"
        for before, message in zip([{}, *body["messages"]], body["messages"], strict=False):
            assert message["role"] != before.get("role"), "two turns of one role"
            content = message["content"]
            blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
            assert blocks
            parts = [self._part(block, names) for block in blocks]
            kinds = [block["type"] == "tool_result" for block in blocks]
            assert kinds == sorted(kinds, reverse=True), "results come first"
            turns.append(Turn(message["role"], tuple(parts)))
        config = body.get("output_config", {})
        thinking = body.get("thinking", {"type": "disabled"})
        effort = config.get("effort")
        if effort is None and thinking["type"] != "disabled":
            effort = "high"
        form = config.get("format")
        return Ask(
            turns=tuple(turns),
            tools=tuple(
                Tool(tool["name"], tool["description"], tool["input_schema"]) for tool in body.get("tools", ())
            ),
            max_tokens=body["max_tokens"],
            temperature=body.get("temperature"),
            stop=tuple(body.get("stop_sequences", ())),
            effort=effort,
            schema=form["schema"] if form else None,
        )

    def _part(self, block: Json, names: dict[str, str]) -> Part:
        match block["type"]:
            case "text":
                assert block["text"]
                return Text(block["text"])
            case "image":
                assert block["source"]["type"] == "base64"
                return Image(block["source"]["media_type"], block["source"]["data"])
            case "tool_use":
                assert isinstance(block["input"], dict)
                names[block["id"]] = block["name"]
                return Call(block["id"], block["name"], block["input"])
            case "tool_result":
                content = block["content"]
                text = content if isinstance(content, str) else "".join([each["text"] for each in content])
                call = block["tool_use_id"]
                return Result(call, names[call], text, is_error=block.get("is_error", False))
        raise AssertionError(block)

    def _stop(self, reply: Reply) -> str:
        reasons = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "refusal": "refusal"}
        return reasons[str(reply.finish)]

    def _block(self, part: Part) -> Json:
        match part:
            case Text(text):
                return {"type": "text", "text": text}
            case Reasoning(text):
                return {"type": "thinking", "thinking": text, "signature": "EqQBCgIYAhIM"}
            case Call(call, name, arguments):
                return {"type": "tool_use", "id": call, "name": name, "input": arguments}
        raise AssertionError(part)

    def _usage(self, usage: Usage) -> Json:
        return {
            "input_tokens": usage.input,
            "cache_read_input_tokens": usage.cache_read,
            "cache_creation_input_tokens": usage.cache_write,
            "output_tokens": usage.output,
            "output_tokens_details": {"thinking_tokens": usage.reasoning},
        }

    def _message(self, **fields: Any) -> Json:  # Any: JSON of any shape
        return {"id": "msg_7", "type": "message", "role": "assistant", "model": "claude-opus-4-6-2026", **fields}

    def write(self, reply: Reply) -> Script:
        assert reply.usage is not None
        return plain(
            self._message(
                content=[self._block(part) for part in reply.parts],
                stop_reason=self._stop(reply),
                stop_sequence=None,
                usage=self._usage(reply.usage),
            )
        )

    def write_stream(self, reply: Reply) -> Script:
        return steps(self._frames(reply), reply)

    def _frames(self, reply: Reply) -> Iterator[bytes]:
        def event(kind: str, **fields: Any) -> bytes:  # Any: JSON of any shape
            return sse({"type": kind, **fields}, kind)

        usage = self._usage(reply.usage or Usage())
        message = self._message(content=[], stop_reason=None, stop_sequence=None, usage={**usage, "output_tokens": 1})
        yield event("message_start", message=message)
        yield event("ping")
        for index, part in enumerate(reply.parts):
            block = self._block(part)
            match part:
                case Text(text):
                    empty = {**block, "text": ""}
                    deltas: list[Json] = [{"type": "text_delta", "text": half} for half in halves(text)]
                case Reasoning(text):
                    empty = {**block, "thinking": "", "signature": ""}
                    deltas = [{"type": "thinking_delta", "thinking": half} for half in halves(text)]
                    deltas.append({"type": "signature_delta", "signature": block["signature"]})
                case Call(_, _, arguments):
                    empty = {**block, "input": {}}
                    pieces = ("", *halves(json.dumps(arguments)))
                    deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in pieces]
                case _:
                    raise AssertionError(part)
            yield event("content_block_start", index=index, content_block=empty)
            for delta in deltas:
                yield event("content_block_delta", index=index, delta=delta)
            if reply.fails:
                break
            yield event("content_block_stop", index=index)
        if reply.fails == "error":
            yield event("error", error={"type": "overloaded_error", "message": FAILS})
        elif not reply.fails:
            delta = {"stop_reason": self._stop(reply), "stop_sequence": None}
            yield event("message_delta", delta=delta, usage=usage)
            yield event("message_stop")

    def write_error(self, status: int, message: str) -> Script:
        kind = "invalid_request_error" if status < 500 else "api_error"
        return plain({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_7"}, status)

    def can_say(self, reply: Reply) -> Reply:
        return reply


# -- Gemini -----------------------------------------------------------------------------------------------------------


class Gemini:
    name = "gemini"
    model = "gemini-3-pro"
    settings: Mapping[str, Any] = {"kind": "gemini", "api_key": "k", "models": ["gemini-3-pro"]}
    has_ids = False

    def read(self, sent: Served) -> Ask:
        method = sent.path.removeprefix("/v1beta/models/gemini-3-pro:")
        assert method in ("generateContent", "streamGenerateContent"), sent.path
        body = sent.json
        turns = []
        calls: list[tuple[str, str]] = []  # id and name of the calls of the last turn of the model
        if "systemInstruction" in body:
            turns.append(
                Turn("system", (Text("".join([part["text"] for part in body["systemInstruction"]["parts"]])),))
            )
        for content in body["contents"]:
            assert content["role"] in ("user", "model")
            parts: list[Part] = []
            if content["role"] == "model":
                calls = []
            for part in content["parts"]:
                if "functionCall" in part:
                    call = part["functionCall"]
                    assert isinstance(call["args"], dict)
                    calls.append((call.get("id") or f"#{len(calls)}", call["name"]))
                    parts.append(Call(calls[-1][0], call["name"], call["args"]))
                elif "functionResponse" in part:
                    result = part["functionResponse"]
                    call_id, name = calls.pop(0)
                    assert name == result["name"], "the responses have the order and the names of the calls"
                    is_error = "error" in result["response"]
                    [text] = result["response"].values()
                    parts.append(Result(call_id, name, text, is_error=is_error))
                elif "inlineData" in part:
                    parts.append(Image(part["inlineData"]["mimeType"], part["inlineData"]["data"]))
                else:
                    parts.append(Text(part["text"]))
            turns.append(Turn("user" if content["role"] == "user" else "assistant", tuple(parts)))
        assert not calls, "a call without its response"
        config = body.get("generationConfig", {})
        functions = [function for tool in body.get("tools", ()) for function in tool["functionDeclarations"]]
        return Ask(
            turns=tuple(turns),
            tools=tuple(
                Tool(function["name"], function["description"], function["parametersJsonSchema"])
                for function in functions
            ),
            max_tokens=config.get("maxOutputTokens"),
            temperature=config.get("temperature"),
            stop=tuple(config.get("stopSequences", ())),
            effort=config.get("thinkingConfig", {}).get("thinkingLevel"),
            schema=config.get("responseJsonSchema"),
        )

    def _part(self, part: Part) -> Json:
        match part:
            case Text(text):
                return {"text": text}
            case Reasoning(text):
                return {"text": text, "thought": True}
            case Call(_, name, arguments):
                return {"functionCall": {"name": name, "args": arguments}, "thoughtSignature": "c2lnbmF0dXJl"}
        raise AssertionError(part)

    def _chunk(self, parts: list[Json], reply: Reply, *, ends: bool) -> Json:
        usage = reply.usage or Usage()
        candidate: Json = {"index": 0, "content": {"role": "model", "parts": parts}}
        if ends:
            reasons = {"stop": "STOP", "tool_calls": "STOP", "length": "MAX_TOKENS", "refusal": "SAFETY"}
            candidate["finishReason"] = reasons[str(reply.finish)]
        prompt = usage.input + usage.cache_read + usage.cache_write
        counts = {
            "promptTokenCount": prompt,
            "cachedContentTokenCount": usage.cache_read,
            "candidatesTokenCount": usage.output - usage.reasoning,
            "thoughtsTokenCount": usage.reasoning,
            "totalTokenCount": prompt + usage.output,
        }
        return {"candidates": [candidate], "usageMetadata": counts, "modelVersion": "gemini-3-pro", "responseId": "r7"}

    def write(self, reply: Reply) -> Script:
        return plain(self._chunk([self._part(part) for part in reply.parts], reply, ends=True))

    def write_stream(self, reply: Reply) -> Script:
        return steps(self._frames(reply), reply)

    def _frames(self, reply: Reply) -> Iterator[bytes]:
        for part in reply.parts:
            made = self._part(part)
            if "text" in made:
                for half in halves(made["text"]):
                    yield sse(self._chunk([{**made, "text": half}], reply, ends=False))
            else:
                yield sse(self._chunk([made], reply, ends=False))
        if reply.fails == "error":
            yield sse({"error": {"code": 503, "message": FAILS, "status": "UNAVAILABLE"}})
        elif not reply.fails:
            yield sse(self._chunk([{"text": ""}], reply, ends=True))

    def write_error(self, status: int, message: str) -> Script:
        name = "INVALID_ARGUMENT" if status < 500 else "UNAVAILABLE"
        return plain({"error": {"code": status, "message": message, "status": name}}, status)

    def can_say(self, reply: Reply) -> Reply:
        usage = reply.usage
        if usage is None:
            return reply
        return attrs.evolve(reply, usage=attrs.evolve(usage, input=usage.input + usage.cache_write, cache_write=0))


# -- Ollama -----------------------------------------------------------------------------------------------------------


class Ollama:
    name = "ollama"
    model = "qwen3"
    settings: Mapping[str, Any] = {"kind": "ollama", "base_url": "http://ollama.invalid", "models": ["qwen3"]}
    has_ids = False

    def read(self, sent: Served) -> Ask:
        assert sent.path == "/api/chat", sent.path
        body = sent.json
        turns: list[Turn] = []
        calls: list[tuple[str, str]] = []
        for message in body["messages"]:
            parts: list[Part] = [Text(message["content"])] if message.get("content") else []
            parts += [Image("image/png", data) for data in message.get("images", ())]
            for call in message.get("tool_calls", ()):
                function = call["function"]
                assert isinstance(function["arguments"], dict)
                calls.append((f"#{len(calls)}", function["name"]))
                parts.append(Call(calls[-1][0], function["name"], function["arguments"]))
            if message["role"] == "tool":
                call_id, name = calls.pop(0)
                assert name == message["tool_name"]
                text = message["content"].removeprefix("[The tool failed] ")
                result = Result(call_id, name, text, is_error=text != message["content"])
                if turns[-1].role == "user":
                    turns[-1] = Turn("user", (*turns[-1].parts, result))
                else:
                    turns.append(Turn("user", (result,)))
            else:
                turns.append(Turn(message["role"], tuple(parts)))
        options = body.get("options", {})
        think = body.get("think")
        return Ask(
            turns=tuple(turns),
            tools=tuple(
                Tool(tool["function"]["name"], tool["function"]["description"], tool["function"]["parameters"])
                for tool in body.get("tools", ())
            ),
            max_tokens=options.get("num_predict"),
            temperature=options.get("temperature"),
            stop=tuple(options.get("stop", ())),
            effort="high" if think is True else think or None,
            schema=body.get("format"),
        )

    def _line(self, reply: Reply, message: Json, *, done: bool) -> Json:
        line: Json = {
            "model": "qwen3",
            "created_at": "2026-11-30T12:00:00.123456Z",
            "message": {"role": "assistant", "content": "", **message},
            "done": done,
        }
        if done:
            usage = reply.usage or Usage()
            line |= {
                "done_reason": "length" if reply.finish == "length" else "stop",
                "total_duration": 5_000_000,
                "load_duration": 1_000_000,
                "prompt_eval_count": usage.input + usage.cache_read + usage.cache_write,
                "prompt_eval_duration": 1_000_000,
                "eval_count": usage.output,
                "eval_duration": 3_000_000,
            }
        return line

    def _message(self, part: Part) -> Json:
        match part:
            case Text(text):
                return {"content": text}
            case Reasoning(text):
                return {"thinking": text}
            case Call(_, name, arguments):
                return {"tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        raise AssertionError(part)

    def write(self, reply: Reply) -> Script:
        message: Json = {}
        for part in reply.parts:
            for name, value in self._message(part).items():
                message[name] = message[name] + value if name in message else value
        return plain(self._line(reply, message, done=True))

    def write_stream(self, reply: Reply) -> Script:
        return steps(self._frames(reply), reply, "application/x-ndjson")

    def _frames(self, reply: Reply) -> Iterator[bytes]:
        def line(value: Json) -> bytes:
            return json.dumps(value).encode() + b"\n"

        for part in reply.parts:
            [(name, value)] = self._message(part).items()
            for half in halves(value) if isinstance(value, str) else (value,):
                yield line(self._line(reply, {name: half}, done=False))
        if reply.fails == "error":
            yield line({"error": FAILS})
        elif not reply.fails:
            yield line(self._line(reply, {}, done=True))

    def write_error(self, status: int, message: str) -> Script:
        return plain({"error": message}, status)

    def can_say(self, reply: Reply) -> Reply:
        """It knows two reasons for the end of an answer without calls, and two counts."""
        usage = reply.usage
        if usage is not None:
            usage = Usage(input=usage.input + usage.cache_read + usage.cache_write, output=usage.output)
        return attrs.evolve(reply, usage=usage, finish="stop" if reply.finish == "refusal" else reply.finish)


# -- Converse ---------------------------------------------------------------------------------------------------------


class Bedrock:
    name = "bedrock"
    model = "us.amazon.nova-2-lite-v1:0"
    settings: Mapping[str, Any] = {
        "kind": "bedrock",
        "region": "us-east-1",
        "api_key": "k",
        "models": ["us.amazon.nova-2-lite-v1:0"],
    }
    has_ids = True

    def read(self, sent: Served) -> Ask:
        assert sent.path.startswith("/model/us.amazon.nova-2-lite-v1:0/converse"), sent.path
        body = sent.json
        turns = []
        names: dict[str, str] = {}
        if "system" in body:
            turns.append(Turn("system", (Text("".join([block["text"] for block in body["system"]])),)))
        for message in body["messages"]:
            parts = [self._part(block, names) for block in message["content"]]
            turns.append(Turn(message["role"], tuple(parts)))
        config = body.get("inferenceConfig", {})
        extra = body.get("additionalModelRequestFields", {})
        tools = body.get("toolConfig", {}).get("tools", ())
        form = body.get("outputConfig", {}).get("textFormat")
        return Ask(
            turns=tuple(turns),
            tools=tuple(
                Tool(tool["toolSpec"]["name"], tool["toolSpec"]["description"], tool["toolSpec"]["inputSchema"]["json"])
                for tool in tools
            ),
            max_tokens=config.get("maxTokens"),
            temperature=config.get("temperature"),
            stop=tuple(config.get("stopSequences", ())),
            effort="high" if extra else None,
            schema=json.loads(form["structure"]["jsonSchema"]["schema"]) if form else None,
        )

    def _part(self, block: Json, names: dict[str, str]) -> Part:
        [(kind, value)] = block.items()
        match kind:
            case "text":
                return Text(value)
            case "image":
                return Image(f"image/{value['format']}", value["source"]["bytes"])
            case "toolUse":
                names[value["toolUseId"]] = value["name"]
                return Call(value["toolUseId"], value["name"], value["input"])
            case "toolResult":
                text = "".join([each["text"] for each in value["content"]])
                call = value["toolUseId"]
                return Result(call, names[call], text, is_error=value.get("status") == "error")
        raise AssertionError(block)

    def _block(self, part: Part) -> Json:
        match part:
            case Text(text):
                return {"text": text}
            case Reasoning(text):
                return {"reasoningContent": {"reasoningText": {"text": text, "signature": "c2ln"}}}
            case Call(call, name, arguments):
                return {"toolUse": {"toolUseId": call, "name": name, "input": arguments}}
        raise AssertionError(part)

    def _stop(self, reply: Reply) -> str:
        reasons = {
            "stop": "end_turn",
            "length": "max_tokens",
            "tool_calls": "tool_use",
            "refusal": "content_filtered",
        }
        return reasons[str(reply.finish)]

    def _usage(self, reply: Reply) -> Json:
        usage = reply.usage or Usage()
        prompt = usage.input + usage.cache_read + usage.cache_write
        return {
            "inputTokens": usage.input,
            "outputTokens": usage.output,
            "totalTokens": prompt + usage.output,
            "cacheReadInputTokens": usage.cache_read,
            "cacheWriteInputTokens": usage.cache_write,
        }

    def write(self, reply: Reply) -> Script:
        message = {"role": "assistant", "content": [self._block(part) for part in reply.parts]}
        return plain(
            {
                "output": {"message": message},
                "stopReason": self._stop(reply),
                "usage": self._usage(reply),
                "metrics": {"latencyMs": 5},
            }
        )

    def write_stream(self, reply: Reply) -> Script:
        return steps(self._frames(reply), reply, "application/vnd.amazon.eventstream")

    def _frames(self, reply: Reply) -> Iterator[bytes]:
        yield aws_frame("messageStart", {"role": "assistant"})
        for index, part in enumerate(reply.parts):
            deltas: list[Json]
            match part:
                case Text(text):
                    deltas = [{"text": half} for half in halves(text)]
                case Reasoning(text):
                    deltas = [{"reasoningContent": {"text": half}} for half in halves(text)]
                    deltas.append({"reasoningContent": {"signature": "c2ln"}})
                case Call(call, name, arguments):
                    start = {"toolUse": {"toolUseId": call, "name": name}}
                    yield aws_frame("contentBlockStart", {"contentBlockIndex": index, "start": start})
                    deltas = [{"toolUse": {"input": half}} for half in halves(json.dumps(arguments))]
                case _:
                    raise AssertionError(part)
            for delta in deltas:
                yield aws_frame("contentBlockDelta", {"contentBlockIndex": index, "delta": delta})
            if reply.fails:
                break
            yield aws_frame("contentBlockStop", {"contentBlockIndex": index})
        if reply.fails == "error":
            yield aws_frame("serviceUnavailableException", {"message": FAILS}, kind="exception")
        elif not reply.fails:
            yield aws_frame("messageStop", {"stopReason": self._stop(reply)})
            yield aws_frame("metadata", {"usage": self._usage(reply), "metrics": {"latencyMs": 5}})

    def write_error(self, status: int, message: str) -> Script:
        kind = "ValidationException" if status < 500 else "ServiceUnavailableException"
        head = Head(status, "application/json", {"x-amzn-errortype": kind})
        return (head, Say(json.dumps({"message": message}).encode()))

    def can_say(self, reply: Reply) -> Reply:
        """It does not count reasoning apart."""
        usage = reply.usage
        return reply if usage is None else attrs.evolve(reply, usage=attrs.evolve(usage, reasoning=0))


def aws_frame(event: str, payload: Json, kind: str = "event") -> bytes:
    """A message in AWS's event-stream framing."""
    named = {":message-type": kind, f":{kind}-type": event, ":content-type": "application/json"}
    headers = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack(">H", len(value)) + value.encode()
        for name, value in named.items()
    )
    data = json.dumps(payload).encode()
    prelude = struct.pack(">II", 16 + len(headers) + len(data), len(headers))
    message = prelude + struct.pack(">I", zlib.crc32(prelude)) + headers + data
    return message + struct.pack(">I", zlib.crc32(message))


UPSTREAMS: tuple[Upstream, ...] = (Chat(), Azure(), Anthropic(), Gemini(), Ollama(), Bedrock())
