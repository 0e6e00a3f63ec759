"""The formats of clients: write a request, and read an answer strictly, as the vendors' SDKs do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Protocol

import attrs

from tests.matrix.scenes import Ask, Call, Finish, Image, Json, Part, Reasoning, Reply, Result, Text, Turn, Usage

FAILED = Reply(parts=(), finish=None, usage=None, fails="error")


class Client(Protocol):
    """One format."""

    name: str

    def path(self, model: str, *, stream: bool) -> str:
        """The path of a call."""

    def write(self, ask: Ask, model: str, *, stream: bool) -> Json:
        """The body of a call."""

    def read(self, answer: Json) -> Reply:
        """Reads a plain answer."""

    def read_stream(self, body: bytes) -> Reply:
        """Reads a stream to its end."""

    def read_error(self, answer: Json) -> str:
        """Reads the message of an error."""

    def can_say(self, reply: Reply) -> Reply:
        """What of an answer the format can carry."""


def events(body: bytes) -> Iterator[tuple[str, str]]:
    """The name and the data of each server-sent event; comments are left out."""
    assert body.endswith(b"\n\n"), body[-50:]
    for frame in body.decode().split("\n\n")[:-1]:
        lines = [line for line in frame.split("\n") if not line.startswith(":")]
        if not lines:
            continue
        name = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        assert (len(name) <= 1, len(data), len(name) + len(data)) == (True, 1, len(lines)), frame
        yield (name[0] if name else ""), data[0]


def merged(parts: list[Part]) -> tuple[Part, ...]:
    """Texts in a row as one, and so for reasoning; empty ones left out."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, Text | Reasoning) and not part.text:
            continue
        if isinstance(part, Text) and isinstance(last, Text):
            found[-1] = Text(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            found[-1] = Reasoning(last.text + part.text)
        else:
            found.append(part)
    return tuple(found)


# -- chat completions -------------------------------------------------------------------------------------------------


class Chat:
    name = "chat"

    def path(self, model: str, *, stream: bool) -> str:
        return "/v1/chat/completions"

    def write(self, ask: Ask, model: str, *, stream: bool) -> Json:
        body: Json = {"model": model, "messages": [each for turn in ask.turns for each in self._messages(turn)]}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        if ask.max_tokens is not None:
            body["max_completion_tokens"] = ask.max_tokens
        if ask.temperature is not None:
            body["temperature"] = ask.temperature
        if ask.stop:
            body["stop"] = list(ask.stop)
        if ask.effort is not None:
            body["reasoning_effort"] = ask.effort
        if ask.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema},
                }
                for tool in ask.tools
            ]
        if ask.schema is not None:
            form = {"name": "answer", "schema": ask.schema, "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": form}
        return body

    def _messages(self, turn: Turn) -> Iterator[Json]:
        content: list[Json] = []
        calls: list[Json] = []
        for part in turn.parts:
            match part:
                case Text(text):
                    content.append({"type": "text", "text": text})
                case Image(media_type, data):
                    url = f"data:{media_type};base64,{data}"
                    content.append({"type": "image_url", "image_url": {"url": url}})
                case Call(call, name, arguments):
                    function = {"name": name, "arguments": json.dumps(arguments)}
                    calls.append({"id": call, "type": "function", "function": function})
                case Result(call, _, text):  # the format has no mark for a result that is an error
                    yield {"role": "tool", "tool_call_id": call, "content": text}
        if calls:
            yield {"role": turn.role, "content": None, "tool_calls": calls}
        elif content:
            is_text = len(content) == 1 and content[0]["type"] == "text"
            yield {"role": turn.role, "content": content[0]["text"] if is_text else content}

    def read(self, answer: Json) -> Reply:
        assert answer["object"] == "chat.completion"
        assert isinstance(answer["id"], str)
        assert isinstance(answer["created"], int)
        [choice] = answer["choices"]
        message = choice["message"]
        assert choice["index"] == 0
        assert message["role"] == "assistant"
        parts: list[Part] = [Reasoning(message.get("reasoning_content") or "")]
        parts.append(Text(message["content"] or ""))
        refusal = message.get("refusal")
        parts.append(Text(refusal or ""))
        parts += [self._call(call) for call in message.get("tool_calls") or ()]
        finish = "refusal" if refusal else self._finish(choice["finish_reason"])
        return Reply(parts=merged(parts), finish=finish, usage=self._usage(answer["usage"]))

    def _call(self, call: Json) -> Call:
        assert call["type"] == "function"
        return Call(call["id"], call["function"]["name"], json.loads(call["function"]["arguments"]))

    def _finish(self, reason: str) -> Finish:
        known: dict[str, Finish] = {
            "stop": "stop",
            "length": "length",
            "tool_calls": "tool_calls",
            "content_filter": "refusal",
        }
        return known[reason]

    def _usage(self, usage: Json) -> Usage:
        prompt, details = usage["prompt_tokens"], usage.get("prompt_tokens_details") or {}
        read, written = details.get("cached_tokens", 0), details.get("cache_write_tokens", 0)
        reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens", 0)
        assert usage["total_tokens"] == prompt + usage["completion_tokens"]
        return Usage(
            input=prompt - read - written,
            cache_read=read,
            cache_write=written,
            output=usage["completion_tokens"],
            reasoning=reasoning,
        )

    def read_stream(self, body: bytes) -> Reply:
        frames = [data for _, data in events(body)]
        done = frames[-1] == "[DONE]"
        chunks = [json.loads(frame) for frame in (frames[:-1] if done else frames)]
        if "error" in chunks[-1]:
            assert not done, "an error, and the end of a complete stream"
            assert chunks[-1]["error"]["message"]
            return FAILED
        assert done, "a stream without its end"
        assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
        parts: list[Part] = []
        calls: dict[int, Json] = {}
        finish: Finish | None = None
        usage = None
        refused = False
        for chunk in chunks:
            assert chunk["object"] == "chat.completion.chunk"
            if chunk.get("usage"):
                usage = self._usage(chunk["usage"])
            for choice in chunk["choices"]:
                assert choice["index"] == 0
                assert finish is None, "a choice after its end"
                delta = choice["delta"]
                parts.append(Reasoning(delta.get("reasoning_content") or ""))
                parts.append(Text(delta.get("content") or ""))
                parts.append(Text(delta.get("refusal") or ""))
                refused = refused or bool(delta.get("refusal"))
                for call in delta.get("tool_calls") or ():
                    if call["index"] not in calls:
                        assert call["id"], call
                        assert call["function"]["name"], call
                        assert call["type"] == "function", call
                        assert call["index"] == len(calls)
                        calls[call["index"]] = {"id": call["id"], "name": call["function"]["name"], "arguments": ""}
                    calls[call["index"]]["arguments"] += call["function"].get("arguments") or ""
                if choice["finish_reason"]:
                    finish = "refusal" if refused else self._finish(choice["finish_reason"])
        parts += [Call(call["id"], call["name"], json.loads(call["arguments"])) for call in calls.values()]
        return Reply(parts=merged(parts), finish=finish, usage=usage)

    def read_error(self, answer: Json) -> str:
        error = answer["error"]
        assert error.keys() >= {"message", "type", "param", "code"}
        assert isinstance(error["type"], str)
        return str(error["message"])

    def can_say(self, reply: Reply) -> Reply:
        return reply


# -- Messages ---------------------------------------------------------------------------------------------------------


class Messages:
    name = "messages"

    def path(self, model: str, *, stream: bool) -> str:
        return "/v1/messages"

    def write(self, ask: Ask, model: str, *, stream: bool) -> Json:
        body: Json = {"model": model, "max_tokens": ask.max_tokens, "messages": []}
        for turn in ask.turns:
            if turn.role == "system":
                body["system"] = [self._block(part) for part in turn.parts]
            else:
                body["messages"].append({"role": turn.role, "content": [self._block(part) for part in turn.parts]})
        if stream:
            body["stream"] = True
        if ask.temperature is not None:
            body["temperature"] = ask.temperature
        if ask.stop:
            body["stop_sequences"] = list(ask.stop)
        if ask.effort is not None:
            body |= {"thinking": {"type": "adaptive"}, "output_config": {"effort": ask.effort}}
        if ask.tools:
            body["tools"] = [
                {"name": tool.name, "description": tool.description, "input_schema": tool.schema} for tool in ask.tools
            ]
        if ask.schema is not None:
            body.setdefault("output_config", {})["format"] = {"type": "json_schema", "schema": ask.schema}
        return body

    def _block(self, part: Part) -> Json:
        match part:
            case Text(text):
                return {"type": "text", "text": text}
            case Image(media_type, data):
                return {"type": "image", "source": {"type": "base64", "media_type": media_type, "data": data}}
            case Call(call, name, arguments):
                return {"type": "tool_use", "id": call, "name": name, "input": arguments}
            case Result(call, _, text, is_error):
                return {"type": "tool_result", "tool_use_id": call, "content": text, "is_error": is_error}
        raise AssertionError(part)

    def _part(self, block: Json) -> Part:
        match block["type"]:
            case "text":
                return Text(block["text"])
            case "thinking":
                assert block["signature"], "thinking without a signature"
                return Reasoning(block["thinking"])
            case "tool_use":
                assert isinstance(block["input"], dict)
                return Call(block["id"], block["name"], block["input"])
        raise AssertionError(block)

    def read(self, answer: Json) -> Reply:
        assert (answer["type"], answer["role"]) == ("message", "assistant")
        parts = [self._part(block) for block in answer["content"]]
        return Reply(
            parts=merged(parts), finish=self._finish(answer["stop_reason"]), usage=self._usage(answer["usage"])
        )

    def _finish(self, reason: str) -> Finish:
        known: dict[str, Finish] = {
            "end_turn": "stop",
            "stop_sequence": "stop",
            "max_tokens": "length",
            "tool_use": "tool_calls",
            "refusal": "refusal",
        }
        return known[reason]

    def _usage(self, usage: Json) -> Usage:
        return Usage(
            input=usage["input_tokens"],
            cache_read=usage["cache_read_input_tokens"] or 0,
            cache_write=usage["cache_creation_input_tokens"] or 0,
            output=usage["output_tokens"],
            reasoning=(usage.get("output_tokens_details") or {}).get("thinking_tokens") or 0,
        )

    def read_stream(self, body: bytes) -> Reply:
        blocks: list[Json] = []
        is_open = False
        arguments = ""
        end: Json | None = None
        kinds = []
        for name, data in events(body):
            event = json.loads(data)
            assert event["type"] == name
            kinds.append(name)
            match name:
                case "message_start":
                    assert kinds == ["message_start"], kinds
                    assert event["message"]["content"] == []
                case "content_block_start":
                    assert not is_open
                    assert event["index"] == len(blocks)
                    assert end is None
                    blocks.append(dict(event["content_block"]))
                    is_open, arguments = True, ""
                case "content_block_delta":
                    assert is_open
                    assert event["index"] == len(blocks) - 1
                    delta, block = event["delta"], blocks[-1]
                    match delta["type"]:
                        case "text_delta":
                            block["text"] += delta["text"]
                        case "thinking_delta":
                            block["thinking"] += delta["thinking"]
                        case "signature_delta":
                            block["signature"] = delta["signature"]
                        case "input_json_delta":
                            arguments += delta["partial_json"]
                        case other:
                            raise AssertionError(other)
                case "content_block_stop":
                    assert is_open
                    assert event["index"] == len(blocks) - 1
                    is_open = False
                    if blocks[-1]["type"] == "tool_use":
                        blocks[-1]["input"] = json.loads(arguments) if arguments else blocks[-1]["input"]
                case "message_delta":
                    assert not is_open
                    assert end is None
                    end = event
                case "ping":
                    pass
                case "error":
                    assert event["error"]["message"]
                    assert event["error"]["type"]
                    assert "message_stop" not in kinds
                    return FAILED
                case "message_stop":
                    pass
                case other:
                    raise AssertionError(other)
        assert kinds[-1] == "message_stop", kinds
        assert end is not None
        parts = [self._part(block) for block in blocks]
        finish = self._finish(end["delta"]["stop_reason"])
        return Reply(parts=merged(parts), finish=finish, usage=self._usage(end["usage"]))

    def read_error(self, answer: Json) -> str:
        assert answer["type"] == "error"
        assert isinstance(answer["error"]["type"], str)
        return str(answer["error"]["message"])

    def can_say(self, reply: Reply) -> Reply:
        return reply


# -- Responses --------------------------------------------------------------------------------------------------------


class Responses:
    name = "responses"

    def path(self, model: str, *, stream: bool) -> str:
        return "/v1/responses"

    def write(self, ask: Ask, model: str, *, stream: bool) -> Json:
        body: Json = {"model": model, "store": False, "input": []}
        for turn in ask.turns:
            if turn.role == "system":
                body["instructions"] = "".join([part.text for part in turn.parts if isinstance(part, Text)])
            else:
                body["input"] += self._items(turn)
        if stream:
            body["stream"] = True
        if ask.max_tokens is not None:
            body["max_output_tokens"] = ask.max_tokens
        if ask.temperature is not None:
            body["temperature"] = ask.temperature
        if ask.effort is not None:
            body |= {"reasoning": {"effort": ask.effort, "summary": "auto"}}
        if ask.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "name": tool.name,
                    "description": tool.description,
                    "parameters": tool.schema,
                    "strict": False,
                }
                for tool in ask.tools
            ]
        if ask.schema is not None:
            body["text"] = {"format": {"type": "json_schema", "name": "answer", "schema": ask.schema, "strict": True}}
        return body

    def _items(self, turn: Turn) -> Iterator[Json]:
        content: list[Json] = []
        for part in turn.parts:
            match part:
                case Text(text):
                    content.append({"type": "input_text" if turn.role == "user" else "output_text", "text": text})
                case Image(media_type, data):
                    content.append({"type": "input_image", "image_url": f"data:{media_type};base64,{data}"})
                case Call(call, name, arguments):
                    made = {"call_id": call, "name": name, "arguments": json.dumps(arguments)}
                    yield {"type": "function_call", **made}
                case Result(call, _, text):  # the format has no mark for a result that is an error
                    yield {"type": "function_call_output", "call_id": call, "output": text}
        if content:
            yield {"type": "message", "role": turn.role, "content": content}

    _REQUIRED = frozenset(
        {
            *("id", "object", "created_at", "status", "model", "output", "error", "incomplete_details"),
            *("instructions", "metadata", "parallel_tool_calls", "temperature", "tool_choice", "tools", "top_p"),
        }
    )

    def read(self, answer: Json) -> Reply:
        assert answer.keys() >= self._REQUIRED, self._REQUIRED - answer.keys()
        assert answer["object"] == "response"
        assert answer["status"] in ("completed", "incomplete")
        parts: list[Part] = []
        refused = False
        for item in answer["output"]:
            assert item["id"]
            match item["type"]:
                case "message":
                    assert item["content"], "a message without content"
                    for each in item["content"]:
                        refused = refused or each["type"] == "refusal"
                        parts.append(Text(each["refusal"] if each["type"] == "refusal" else each["text"]))
                case "function_call":
                    parts.append(Call(item["call_id"], item["name"], json.loads(item["arguments"])))
                case "reasoning":
                    texts = [*(item.get("summary") or ()), *(item.get("content") or ())]
                    parts.append(Reasoning("".join(dict.fromkeys(each["text"] for each in texts))))
                case other:
                    raise AssertionError(other)
        has_calls = any(isinstance(part, Call) for part in parts)
        finish: Finish = "refusal" if refused else "tool_calls" if has_calls else "stop"
        if answer["status"] == "incomplete":
            reasons: dict[str, Finish] = {"max_output_tokens": "length", "content_filter": "refusal"}
            finish = reasons[answer["incomplete_details"]["reason"]]
        return Reply(parts=merged(parts), finish=finish, usage=self._usage(answer["usage"]))

    def _usage(self, usage: Json) -> Usage:
        details = usage["input_tokens_details"]
        read, written = details["cached_tokens"], details.get("cache_write_tokens", 0)
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        return Usage(
            input=usage["input_tokens"] - read - written,
            cache_read=read,
            cache_write=written,
            output=usage["output_tokens"],
            reasoning=usage["output_tokens_details"]["reasoning_tokens"],
        )

    def read_stream(self, body: bytes) -> Reply:
        items: dict[int, Json] = {}
        deltas: dict[int, str] = {}
        last: Json = {}
        for at, (name, data) in enumerate(events(body)):
            assert data != "[DONE]"
            event = last = json.loads(data)
            assert event["type"] == name
            assert event["sequence_number"] == at
            index = event.get("output_index")
            if name == "response.output_item.added":
                assert index == len(items)
                items[index] = event["item"]
            elif name == "response.output_item.done":
                assert event["item"]["id"] == items[index]["id"]
                items[index] = event["item"]
            elif index is not None:
                assert event["item_id"] == items[index]["id"]
                if name.endswith(".delta"):
                    deltas[index] = deltas.get(index, "") + event["delta"]
        if last["type"] in ("response.failed", "error"):
            assert last["type"] == "error" or last["response"]["error"]["message"]
            return FAILED
        assert last["type"] in ("response.completed", "response.incomplete"), last["type"]
        assert last["response"]["output"] == list(items.values())
        for index, item in items.items():
            if item["type"] == "function_call" and index in deltas:
                assert deltas[index] == item["arguments"]
            if item["type"] == "message":
                assert deltas[index] == "".join([each.get("text") or each["refusal"] for each in item["content"]])
        return self.read(last["response"])

    def read_error(self, answer: Json) -> str:
        return Chat().read_error(answer)

    def can_say(self, reply: Reply) -> Reply:
        return reply


# -- Gemini -----------------------------------------------------------------------------------------------------------


class Gemini:
    name = "gemini"

    def path(self, model: str, *, stream: bool) -> str:
        return f"/v1beta/models/{model}:" + ("streamGenerateContent?alt=sse" if stream else "generateContent")

    def write(self, ask: Ask, model: str, *, stream: bool) -> Json:
        body: Json = {"contents": []}
        config: Json = {}
        for turn in ask.turns:
            parts = [self._encoded(part) for part in turn.parts]
            if turn.role == "system":
                body["systemInstruction"] = {"parts": parts}
            else:
                body["contents"].append({"role": "user" if turn.role == "user" else "model", "parts": parts})
        if ask.max_tokens is not None:
            config["maxOutputTokens"] = ask.max_tokens
        if ask.temperature is not None:
            config["temperature"] = ask.temperature
        if ask.stop:
            config["stopSequences"] = list(ask.stop)
        if ask.effort is not None:
            config["thinkingConfig"] = {"includeThoughts": True, "thinkingLevel": ask.effort}
        if ask.schema is not None:
            config |= {"responseMimeType": "application/json", "responseJsonSchema": ask.schema}
        if ask.tools:
            functions = [
                {"name": tool.name, "description": tool.description, "parametersJsonSchema": tool.schema}
                for tool in ask.tools
            ]
            body["tools"] = [{"functionDeclarations": functions}]
        return {**body, "generationConfig": config}

    def _encoded(self, part: Part) -> Json:
        match part:
            case Text(text):
                return {"text": text}
            case Image(media_type, data):
                return {"inlineData": {"mimeType": media_type, "data": data}}
            case Call(call, name, arguments):
                return {"functionCall": {"id": call, "name": name, "args": arguments}}
            case Result(call, name, text, is_error):
                response = {"error" if is_error else "output": text}
                return {"functionResponse": {"id": call, "name": name, "response": response}}
        raise AssertionError(part)

    def read(self, answer: Json) -> Reply:
        return self._joined([answer])

    def read_stream(self, body: bytes) -> Reply:
        *_, last = body.rstrip(b"\n").rpartition(b"\n\n")
        if last.startswith(b"{"):  # Google's SDKs know an error in a stream by the missing ``data:``
            self.read_error(json.loads(last))
            return FAILED
        return self._joined([json.loads(data) for _, data in events(body)])

    def _joined(self, chunks: list[Json]) -> Reply:
        parts: list[Part] = []
        finish: Finish | None = None
        for chunk in chunks:
            for candidate in chunk.get("candidates", ()):
                assert finish is None, "a part after the end"
                for part in candidate.get("content", {}).get("parts", ()):
                    if "functionCall" in part:
                        call = part["functionCall"]
                        parts.append(Call(call.get("id", ""), call["name"], call.get("args", {})))
                    else:
                        parts.append(Reasoning(part["text"]) if part.get("thought") else Text(part["text"]))
                if candidate.get("finishReason"):
                    known: dict[str, Finish] = {"STOP": "stop", "MAX_TOKENS": "length", "SAFETY": "refusal"}
                    finish = known[candidate["finishReason"]]
        assert finish is not None, "a stream without its end"
        if finish == "stop" and any(isinstance(part, Call) for part in parts):
            finish = "tool_calls"
        usage = chunks[-1]["usageMetadata"]
        read = usage.get("cachedContentTokenCount", 0)
        thoughts = usage.get("thoughtsTokenCount", 0)
        candidates = usage.get("candidatesTokenCount", 0)
        assert usage["totalTokenCount"] == usage["promptTokenCount"] + candidates + thoughts
        return Reply(
            parts=merged(parts),
            finish=finish,
            usage=Usage(
                input=usage["promptTokenCount"] - read,
                cache_read=read,
                output=candidates + thoughts,
                reasoning=thoughts,
            ),
        )

    def read_error(self, answer: Json) -> str:
        error = answer["error"]
        assert isinstance(error["code"], int)
        assert error["status"].isupper()
        return str(error["message"])

    def can_say(self, reply: Reply) -> Reply:
        """A cache that is written to is not told apart from other input."""
        return _without_cache_write(reply)


def _without_cache_write(reply: Reply) -> Reply:
    usage = reply.usage
    if usage is None:
        return reply
    return attrs.evolve(reply, usage=attrs.evolve(usage, input=usage.input + usage.cache_write, cache_write=0))


# -- Ollama -----------------------------------------------------------------------------------------------------------


class Ollama:
    name = "ollama"

    def path(self, model: str, *, stream: bool) -> str:
        return "/api/chat"

    def write(self, ask: Ask, model: str, *, stream: bool) -> Json:
        body: Json = {"model": model, "messages": [each for turn in ask.turns for each in self._messages(turn)]}
        options: Json = {}
        if not stream:
            body["stream"] = False
        if ask.max_tokens is not None:
            options["num_predict"] = ask.max_tokens
        if ask.temperature is not None:
            options["temperature"] = ask.temperature
        if ask.stop:
            options["stop"] = list(ask.stop)
        if ask.effort is not None:
            body["think"] = ask.effort
        if ask.schema is not None:
            body["format"] = ask.schema
        if ask.tools:
            body["tools"] = [
                {
                    "type": "function",
                    "function": {"name": tool.name, "description": tool.description, "parameters": tool.schema},
                }
                for tool in ask.tools
            ]
        return {**body, "options": options}

    def _messages(self, turn: Turn) -> Iterator[Json]:
        message: Json = {"role": turn.role, "content": ""}
        for part in turn.parts:
            match part:
                case Text(text):
                    message["content"] += text
                case Image(_, data):
                    message.setdefault("images", []).append(data)
                case Call(_, name, arguments):
                    message.setdefault("tool_calls", []).append({"function": {"name": name, "arguments": arguments}})
                case Result(_, name, text):
                    yield {"role": "tool", "tool_name": name, "content": text}
        if message.keys() > {"role", "content"} or message["content"]:
            yield message

    def read(self, answer: Json) -> Reply:
        return self._joined([answer])

    def read_stream(self, body: bytes) -> Reply:
        assert body.endswith(b"\n")
        lines = [json.loads(line) for line in body.decode().splitlines()]
        if "error" in lines[-1]:
            self.read_error(lines[-1])
            return FAILED
        return self._joined(lines)

    def _joined(self, lines: list[Json]) -> Reply:
        parts: list[Part] = []
        for at, line in enumerate(lines):
            assert line["done"] is (at == len(lines) - 1), "a line after the end, or no end"
            message = line["message"]
            assert message["role"] == "assistant"
            assert "T" in line["created_at"]
            parts.append(Reasoning(message.get("thinking") or ""))
            parts.append(Text(message["content"]))
            for call in message.get("tool_calls") or ():
                assert isinstance(call["function"]["arguments"], dict)
                parts.append(Call("", call["function"]["name"], call["function"]["arguments"]))
        last = lines[-1]
        assert all(isinstance(last[name], int) for name in ("total_duration", "eval_duration", "load_duration"))
        finish: Finish = "length" if last["done_reason"] == "length" else "stop"
        usage = Usage(input=last["prompt_eval_count"], output=last["eval_count"])
        return Reply(parts=merged(parts), finish=finish, usage=usage)

    def read_error(self, answer: Json) -> str:
        assert answer.keys() == {"error"}
        return str(answer["error"])

    def can_say(self, reply: Reply) -> Reply:
        """It knows no ids of calls, two reasons for the end, and two counts."""
        parts = tuple(attrs.evolve(part, id="") if isinstance(part, Call) else part for part in reply.parts)
        finish: Finish | None = "stop" if reply.finish in ("tool_calls", "refusal") else reply.finish
        usage = reply.usage
        if usage is not None:
            usage = Usage(input=usage.input + usage.cache_read + usage.cache_write, output=usage.output)
        return attrs.evolve(reply, parts=parts, finish=finish, usage=usage)


CLIENTS: tuple[Client, ...] = (Chat(), Messages(), Responses(), Gemini(), Ollama())
