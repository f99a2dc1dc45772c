"""Chat templates written for the tests, in the dialects that models have, with answers to them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Tells the weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                },
                "required": ["city"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": "get_weather_of_all",
            "description": "Tells the weather everywhere",
            "parameters": {"type": "object", "properties": {}},
        },
    },
]

# Qwen's way: what was thought stands in tags, and an empty thought means none.
HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\nCall one of these:\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if message.reasoning_content %}
            {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- message.content or '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and not enable_thinking %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# Every answer begins inside a thought.
THINKER = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

LLAMA_3 = """{%- for message in messages %}
    {%- if loop.first and tools %}
        {{- '<|start_header_id|>system<|end_header_id|>\\n\\nCall one of these:\\n' }}
        {%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}
        {{- '<|eot_id|>' }}
    {%- endif %}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}
    {%- elif message.role == 'tool' %}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + message.content + '<|eot_id|>' }}
    {%- else %}
        {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
        {{- message.content | trim + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""

MISTRAL = """{{- bos_token }}
{%- if tools %}
    {{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '[INST]' + message.content + '[/INST]' }}
    {%- elif message.role == 'tool' %}
        {{- '[TOOL_RESULTS]{"content": ' }}{{- message.content | tojson }}
        {{- ', "call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- elif message.tool_calls %}
        {{- message.content or '' }}{{- '[TOOL_CALLS][' }}
        {%- for call in message.tool_calls %}
            {%- if call.id | length != 9 %}
                {{- raise_exception('an id has 9 characters') }}
            {%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson }}{{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ', ' }}{%- endif %}
        {%- endfor %}
        {{- ']' + eos_token }}
    {%- else %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Tags for everything, which llama.cpp knows as Qwen3-Coder's.
TAGS = """{%- if tools %}
    {{- '<|im_start|>system\\n<tools>' }}
    {%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}{{- message.content or '' }}
    {%- for call in message.tool_calls or [] %}
        {{- '\\n<tool_call>\\n<function=' + call.function.name + '>\\n' }}
        {%- for name, value in call.function.arguments.items() %}
            {{- '<parameter=' + name + '>\\n' }}{{- value }}{{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# gpt-oss's way, which llama.cpp writes partly by itself.
CHANNELS = """{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- if message.thinking %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + message.thinking + '<|end|>' }}
        {%- endif %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + message.content + '<|return|>' }}
    {%- else %}
        {{- '<|start|>' + message.role + '<|message|>' + message.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

PLAIN = """{%- for message in messages %}
    {{- message.role + ': ' + message.content + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- 'assistant: ' }}{%- endif %}"""

ROME = {"city": "Rome"}
TWO_DAYS = {"city": 'Ro"me}\\', "days": 2}


@dataclass(frozen=True)
class Case:
    """An answer, and what it means."""

    template: str
    answer: str
    content: str = ""
    reasoning: str = ""
    calls: list[tuple[str, Any]] = field(default_factory=list)
    has_tools: bool = True


def hermes_call(name: str, arguments: Any) -> str:
    call = f'{{"name": "{name}", "arguments": {json.dumps(arguments)}}}'
    return f"<tool_call>\n{call}\n</tool_call>"


CASES = {
    "plain text": Case(
        PLAIN, "It is <b>warm</b> today 😀.", "It is <b>warm</b> today 😀.", has_tools=False
    ),
    "what looks like a tag": Case(HERMES, "1 < 2 <tool> <tool", "1 < 2 <tool> <tool"),
    "a call": Case(HERMES, hermes_call("get_weather", TWO_DAYS), calls=[("get_weather", TWO_DAYS)]),
    "words and a call": Case(
        HERMES,
        "Let me see: " + hermes_call("get_weather", ROME),
        "Let me see: ",
        calls=[("get_weather", ROME)],
    ),
    "a call without arguments": Case(
        HERMES, hermes_call("get_weather_of_all", {}), calls=[("get_weather_of_all", {})]
    ),
    "two calls": Case(
        HERMES,
        hermes_call("get_weather", ROME) + "\n" + hermes_call("get_weather_of_all", {}),
        calls=[("get_weather", ROME), ("get_weather_of_all", {})],
    ),
    "a thought": Case(
        HERMES, "<think>\nWell <b>.\n</think>\n\nIt is warm.", "It is warm.", "Well <b>."
    ),
    "a thought without tools": Case(
        HERMES, "<think>\nHm.\n</think>\n\nWarm.", "Warm.", "Hm.", has_tools=False
    ),
    "a thought and a call": Case(
        HERMES,
        "<think>\nRome?\n</think>\n\n" + hermes_call("get_weather", ROME),
        reasoning="Rome?",
        calls=[("get_weather", ROME)],
    ),
    "a thought that the prompt began": Case(
        THINKER, "Hm.\n</think>\n\nIt is warm.", "It is warm.", "Hm.", has_tools=False
    ),
    "a thought without an end": Case(THINKER, "Hm, hm, </", "", "Hm, hm, </", has_tools=False),
    "llama 3": Case(
        LLAMA_3,
        json.dumps({"name": "get_weather", "parameters": TWO_DAYS}),
        calls=[("get_weather", TWO_DAYS)],
    ),
    "llama 3 without a call": Case(LLAMA_3, "It is warm.", "It is warm."),
    "mistral": Case(
        MISTRAL,
        "[TOOL_CALLS]"
        + json.dumps([{"name": "get_weather", "arguments": TWO_DAYS, "id": "abcdefghi"}]),
        calls=[("get_weather", TWO_DAYS)],
    ),
    "mistral without a call": Case(MISTRAL, "It is [warm].", "It is [warm]."),
    "tags": Case(
        TAGS,
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        calls=[("get_weather", {"city": "Rome", "days": 2})],
    ),
    "channels": Case(
        CHANNELS,
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
        "<|channel|>final<|message|>It is warm.",
        "It is warm.",
        "Hm.",
        has_tools=False,
    ),
}
