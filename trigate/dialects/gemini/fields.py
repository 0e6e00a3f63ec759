"""What becomes of each field of a request in Gemini's format that is translated.

`decode_request` acts by these tables, and ``docs/reference/formats.md`` shows them. Google's servers take each name in
camel case and in snake case, and so does the gateway: the tables have the names in camel case.
"""

from __future__ import annotations

from collections.abc import Mapping

from trigate.dialects.request_values import Fate

FIELDS: Mapping[str, Fate] = {
    "model": "translated",
    "contents": "translated",
    "systemInstruction": "translated",
    "tools": "translated",
    "toolConfig": "translated",
    "generationConfig": "translated",
    "safetySettings": "dropped",
    "serviceTier": "dropped",
    "labels": "dropped",
    "store": "dropped",
    "cachedContent": "refused",
}
"""The fields of a request. One that is not here is dropped: a client may be newer than the gateway."""

GENERATION_CONFIG: Mapping[str, Fate] = {
    "maxOutputTokens": "translated",
    "temperature": "translated",
    "topP": "translated",
    "topK": "translated",
    "stopSequences": "translated",
    "seed": "translated",
    "presencePenalty": "translated",
    "frequencyPenalty": "translated",
    "candidateCount": "translated",
    "responseMimeType": "translated",
    "responseSchema": "translated",
    "responseJsonSchema": "translated",
    "responseModalities": "translated",
    "thinkingConfig": "translated",
    "speechConfig": "dropped",
    "imageConfig": "dropped",
    "mediaResolution": "dropped",
    "audioTimestamp": "dropped",
    "enableAffectiveDialog": "dropped",
    "enableEnhancedCivicAnswers": "dropped",
    "modelSelectionConfig": "dropped",
    "routingConfig": "dropped",
    "responseLogprobs": "refused",
    "logprobs": "refused",
}
"""The fields of ``generationConfig``. One that is not here is dropped."""

PARTS: Mapping[str, Fate] = {
    "text": "translated",
    "inlineData": "translated",
    "fileData": "translated",
    "functionCall": "translated",
    "functionResponse": "translated",
    "executableCode": "refused",
    "codeExecutionResult": "refused",
    "toolCall": "refused",
    "toolResponse": "refused",
}
"""The kinds of parts. One that is not here is refused: without it, the conversation would be another one."""

FIELD_OF: Mapping[str, str] = {
    "effort": "generationConfig.thinkingConfig",
    "top_k": "generationConfig.topK",
    "seed": "generationConfig.seed",
    "presence_penalty": "generationConfig.presencePenalty",
    "frequency_penalty": "generationConfig.frequencyPenalty",
    "stop": "generationConfig.stopSequences",
    "temperature": "generationConfig.temperature",
    "top_p": "generationConfig.topP",
    "schema": "generationConfig.responseSchema",
    "is_json": "generationConfig.responseMimeType",
}
"""The fields that an encoder of another format may drop, by their name in `vocabulary.Request`."""
