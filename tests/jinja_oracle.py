"""What jinja2 and transformers make of templates; run by jinja_oracle_test.cc.

  jinja_oracle.py make DIR    DIR/real.json, random.json, expressions.json: lists of [template, variables, text], with null
                              for a text where rendering fails; DIR/chat: model directories with cases.json;
                              DIR/case.json: characters and their cases
With JINJA_ORACLE_SCALE=K in the environment there are K times as many random cases, others for every K.
The clock of strftime_now stands at 2024-07-26 13:05:09, a Friday.
"""

import copy
import datetime
import json
import os
import pathlib
import random
import sys
import unicodedata
import warnings

from jinja2 import sandbox
from transformers.utils import chat_template_utils

CLOCK = datetime.datetime(2024, 7, 26, 13, 5, 9)


def render(template, variables):
    """The text, or None where jinja2 or the template fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            compiled = chat_template_utils._cached_compile_jinja_template(template)
            # A copy: the filter indent adds to a list in place before it fails.
            return compiled.render(**copy.deepcopy(variables))
        except Exception:
            return None


def bounded(environment, context, operator, left, right):
    """The operator, failing where this project's interpreter must: integers have 64 bits, memory has a limit, and there
    are no complex numbers and no printf formats."""
    if operator == "%" and isinstance(left, str):
        raise TypeError
    big = isinstance(left, (int, float)) and isinstance(right, (int, float)) and abs(right) > 1000 and abs(left) > 1
    if operator == "**" and big:
        raise OverflowError
    if operator == "*" and any(isinstance(x, int) and isinstance(y, (str, list, tuple)) and x > 100_000
                               for x, y in ((left, right), (right, left))):
        raise MemoryError
    result = environment.binop_table[operator](left, right)
    if type(result) is int and not -2**63 <= result < 2**63:
        raise OverflowError
    if isinstance(result, complex):
        raise TypeError
    return result


sandbox.SandboxedEnvironment.intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])
sandbox.SandboxedEnvironment.call_binop = bounded


def dump(path, value):
    path.write_text(json.dumps(value, ensure_ascii=True))


# --- templates as models have them, written for this test -------------------------------------------------------------

CHATML = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}\
{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}

{#- The system message comes first, so that the rest can be walked over. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {{- "You have access to these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content']|trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("No user message to put the tools into.") }}
{%- endif %}
    {{- '<|start_header_id|>user<|end_header_id|>\\n\\n' -}}
    {{- 'Respond as {"name": function, "parameters": dictionary}.\\n\\n' }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>"}}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One tool call at a time.") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}
                        {{- '"' + key + '": "' + val + '"' }}
                    {%- else %}
                        {{- '"' + key + '": ' + val|tojson }}
                    {%- endif %}
                    {%- if not loop.last %}
                        {{- ", " }}
                    {%- endif %}
                {%- endfor %}
                {{- "}}" }}
                {%- if not loop.last %}
                    {{- ", " }}
                {%- else %}
                    {{- "]" }}
                {%- endif %}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
            {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for tool_call in message.tool_calls %}
            {%- set out = tool_call.function|tojson %}
            {{- out[:-1] }}
            {%- if not tool_call.id is defined or tool_call.id|length != 9 %}
                {{- raise_exception("Tool call IDs have nine characters!") }}
            {%- endif %}
            {{- ', "id": "' + tool_call.id + '"}' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- else %}
                {{- "]" + eos_token }}
            {%- endif %}
        {%- endfor %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- elif message["role"] == "tool_results" or message["role"] == "tool" %}
        {%- if message.content is defined and message.content.content is defined %}
            {%- set content = message.content.content %}
        {%- else %}
            {%- set content = message.content %}
        {%- endif %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ", " }}
        {{- '"call_id": "' + message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles, and a system message at first!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\\n'}}
{%- endif -%}
"""

QWEN25 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are a helpful assistant.' }}
    {%- endif %}
    {{- "\\n\\n# Tools\\n\\nYou may call functions.\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools>\\n\\n<tool_call>\\n{\\"name\\": <function-name>, \\"arguments\\": <args-json>}\\n</tool_call><|im_end|>\\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' }}
        {{- message.content }}
        {{- '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

QWEN3 = """{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system") %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning_content = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning_content = message.reasoning_content %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last_query_index %}
            {%- if loop.last or (not loop.last and reasoning_content) %}
                {{- '<|im_start|>' + message.role + '\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
            {%- else %}
                {{- '<|im_start|>' + message.role + '\\n' + content }}
            {%- endif %}
        {%- else %}
            {{- '<|im_start|>' + message.role + '\\n' + content }}
        {%- endif %}
        {%- if message.tool_calls %}
            {%- for tool_call in message.tool_calls %}
                {%- if (loop.first and content) or (not loop.first) %}
                    {{- '\\n' }}
                {%- endif %}
                {%- if tool_call.function %}
                    {%- set tool_call = tool_call.function %}
                {%- endif %}
                {{- '<tool_call>\\n{"name": "' ~ tool_call.name ~ '", "arguments": ' }}
                {%- if tool_call.arguments is string %}
                    {{- tool_call.arguments }}
                {%- else %}
                    {{- tool_call.arguments | tojson }}
                {%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

SCHEMA = """{%- macro kind(spec) -%}
{%- if spec.type == "array" -%}
    {%- if spec['items'] -%}{{ kind(spec['items']) + "[]" }}{%- else -%}any[]{%- endif -%}
    {%- if spec.nullable -%} | null{%- endif -%}
{%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type[0] is defined -%}
    {{- spec.type | join(" | ") -}}
{%- elif spec.oneOf -%}
    {%- for variant in spec.oneOf -%}{{ kind(variant) }}{%- if not loop.last %} | {% endif -%}{%- endfor -%}
{%- elif spec.type == "string" -%}
    {%- if spec.enum -%}{{ '"' + spec.enum|join('" | "') + '"' }}{%- else -%}string{%- endif -%}
{%- elif spec.type == "object" and spec.properties -%}
{
    {%- for name, inner in spec.properties.items() -%}
        {{ name }}{% if name not in (spec.required or []) %}?{% endif %}: {{ kind(inner) }}{{ ", " if not loop.last }}
    {%- endfor -%}
}
{%- else -%}{{ spec.type | default("any", true) }}{%- endif -%}
{%- endmacro -%}
{%- macro system(text, effort="medium") -%}
# {{ text | upper }} ({{ effort }}{% for k, v in kwargs|dictsort %}; {{ k }}={{ v }}{% endfor %})
{% endmacro -%}
{%- set note %}Date: {{ strftime_now("%Y-%m-%d, %A %H:%M") }}{% endset -%}
{{ system("rules", size=3, kind="b") }}{{ note }}
{% for tool in tools or [] %}
// {{ tool.function.description | default("-") | replace("\\n", " ") | indent(3) }}
type {{ tool.function.name | capitalize }} = {{ kind(tool.function.parameters) }};
{% else %}
(no tools)
{% endfor %}
{% filter trim | indent(2, true) %}
{% for message in messages if message.role != "system" %}
    {% generation %}{{ loop.index }}/{{ loop.length }} {{ message.role | title }}: {{ message.content }}{% endgeneration %}

    {% if loop.index > 3 %}{% break %}{% endif %}
{% endfor %}
{% endfilter %}
"""

STATEMENTS = """  {% raw %} {{ raw }} {% endraw %}
{#- gone -#}
{% with a = 1, b = "x" %}{{ a }}{{ b }}{% endwith %}
{% macro wrap(title) %}[{{ title }}: {{ caller("in " ~ title) }}]{% endmacro %}
{% call(text) wrap(bos_token) %}<{{ text }}>{% endcall %}
{% set ns = namespace(found=false, list=[]) %}
{% for role, group in messages | groupby("role") %}
  {%- set ns.found = true %}
  {{ role }}={{ group | map(attribute="content") | map("string") | map("length") | join(",") }};
{% endfor %}
{{ ns.found }} {{ messages | map(attribute="role") | unique | list }} {{ messages | rejectattr("role", "in", ["user"]) | list | length }}
{% for m in messages -%}
    {% if loop.first %}{% continue %}{% endif %}
    {{ loop.previtem.role }} > {{ m.role }} > {{ loop.nextitem.role if loop.nextitem is defined else "end" }} {{ loop.changed(m.role) }} {{ loop.cycle("a", "b") }}
{%+ endfor %}
    {%- set x, y = 1, (2, 3) %}{{ x }}{{ y[1] }}
   {%+ if true %}kept{% endif +%}
{{ dict(a=1, **{"b": 2}) | tojson }} {{ {"a": [1, 2.5, none, true, "\\u00e9\\"\\n"]} | tojson(indent=2) }}
"""

TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "qwen25": QWEN25, "qwen3": QWEN3,
             "schema": SCHEMA, "statements": STATEMENTS}

TOOLS = [
    {"type": "function", "function": {
        "name": "get_weather", "description": "The weather\nnow & \"here\" <b>",
        "parameters": {"type": "object", "required": ["city"], "properties": {
            "city": {"type": "string", "description": "Where"}, "unit": {"type": "string", "enum": ["C", "F"]},
            "days": {"type": "array", "items": {"type": "integer"}, "nullable": True},
            "more": {"oneOf": [{"type": ["a", "b"]}, {"type": "object"}]}}}}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}},
                                      "return": {"type": "string"}}},
]


def conversations(rng):
    texts = ["Hi", "  What is 1+1?\n", "", "état 世界 👩‍👩‍👧 \u00a0", "<think>\nhm\n</think>\n\n2", "<|im_end|>{{ x }}", "a\r\nb\n\n c",
             "'quoted' \"text\" \\ / </tool_response>", "<tool_response>x</tool_response>", "İstanbul ΣΊΣΥΦΟΣ straße"]
    call = {"id": "abcdefghi", "type": "function",
            "function": {"name": "get_weather", "arguments": {"city": "Zürich", "n": [1, 2.0, None, True]}}}
    out = [[], [{"role": "user", "content": "Hi"}], [{"role": "assistant", "content": "Hi"}], [{"role": "user"}],
           [{"role": "user", "content": None}]]
    for _ in range(60):
        messages = []
        if rng.random() < 0.5:
            messages.append({"role": "system", "content": rng.choice(texts)})
        for i in range(rng.randrange(0, 6)):
            role = ("user", "assistant")[i % 2] if rng.random() < 0.9 else rng.choice(["user", "tool", "assistant"])
            message = {"role": role, "content": rng.choice(texts)}
            if role == "assistant" and rng.random() < 0.3:
                message = {"role": role, "content": rng.choice(texts + [None]), "tool_calls": [call]}
                if rng.random() < 0.3:
                    message["reasoning_content"] = "why\n"
                messages += [message, {"role": "tool", "content": rng.choice(texts), "tool_call_id": "abcdefghi"}]
                continue
            if rng.random() < 0.1:
                message["content"] = [{"type": "text", "text": rng.choice(texts)}, {"type": "image"}]
            messages.append(message)
        out.append(messages)
    return out


def real_cases(rng):
    cases = []
    for template in TEMPLATES.values():
        for messages in conversations(rng):
            variables = {"messages": messages, "tools": rng.choice([None, TOOLS]), "documents": None,
                         "add_generation_prompt": rng.random() < 0.5, "bos_token": "<s>", "eos_token": "</s>"}
            if rng.random() < 0.3:
                variables["enable_thinking"] = rng.random() < 0.5
                variables["tools_in_user_message"] = rng.random() < 0.5
            cases.append([template, variables, render(template, variables)])
        assert any(text for _, _, text in cases[-60:]), template
    return cases


# --- random expressions and templates ---------------------------------------------------------------------------------

VARIABLES = {
    "s": "Hello World", "t": "  état 世\n naïve ß ", "e": "", "n": 3, "z": 0, "f": 2.5, "neg": -7, "big": 2**52, "b": True,
    "no": None, "l": [3, 1, 2], "w": ["b", "A", "a", "é"], "m": [1, "x", None, [2], {"k": 1.5}], "d": {"k": 1, "A": "x", "a": [1]},
    "u": [{"role": "user", "n": 2}, {"role": "Tool", "n": 1, "x": {"y": "z"}}, {"role": "user", "n": 3}],
    "keys": {"items": 5, "get": "g", "1": 1},
}
LITERALS = ["0", "1", "2", "-1", "3.0", "0.1", "1e3", "1_000", "0x1F", "''", "'a'", "\"b c\"", "'\\n\\x41\\u00e9'", "'a' 'b'", "true",
            "false", "none", "[]", "{}", "()", "(1,)", "[1, 2]", "['x', 'y']", "{'k': 2}", "{1: 'one', none: 2}", "(1, 'a')", "undef",
            "range(3)", "range(5, 0, -2)", "namespace(k=1)", "dict(a=1)", "'ΑΣ'", "'12'", "' 7 '", "'3.9'", "'nan'", "'_'"]
FILTERS = ["upper", "lower", "title", "capitalize", "trim", "trim('ab ')", "length", "count", "list", "first", "last", "join",
           "join(', ')", "join('-', attribute='role')", "tojson", "tojson(indent=2)", "tojson(sort_keys=true)",
           "tojson(ensure_ascii=true, separators=(',', ':'))", "string", "safe", "int", "int(5)", "int(default=1, base=16)", "float",
           "float(1.5)", "abs", "round", "round(1)", "round(2, 'floor')", "round(method='ceil')", "sort", "sort(reverse=true)",
           "sort(attribute='n')", "sort(attribute='role,n')", "sort(case_sensitive=true)", "unique|list", "unique(true)|list",
           "unique(attribute='role')|list", "reverse|list", "reverse", "replace('a', 'XY')", "replace('', '.')", "replace('l', '', 1)",
           "default('D')", "default('D', true)", "d", "indent", "indent(2, true)", "indent('> ', blank=true)", "map('upper')|list",
           "map(attribute='role')|list", "map(attribute='x.y', default='-')|list", "map('int')|list", "map('default', 0)|list",
           "select|list", "select('odd')|list", "reject('none')|list", "selectattr('n')|list", "selectattr('n', 'gt', 1)|list",
           "rejectattr('x', 'defined')|list", "selectattr('role', 'in', ['user'])|map(attribute='n')|sum", "dictsort", "dictsort(true)",
           "dictsort(by='value')", "items|list", "groupby('role')", "groupby('n', default=0)|length", "min", "max", "sum", "sum(start=10)",
           "max(attribute='n')", "attr('upper')"]
TESTS = ["defined", "undefined", "none", "iterable", "string", "mapping", "sequence", "number", "integer", "float", "boolean", "true",
         "false", "odd", "even", "divisibleby 2", "divisibleby(3)", "equalto 1", "eq('a')", "ne 2", "in [1, 2, 'a']", "in 'abc'", "gt 1",
         "lt(2)", "ge 2", "le 'b'", "upper", "lower", "callable", "not defined", "not none", "not string", "sameas none"]
METHODS = ["upper()", "lower()", "title()", "capitalize()", "strip()", "lstrip()", "rstrip('d ')", "split()", "split(' ')", "split('l', 1)",
           "rsplit('l', 1)", "rsplit(none, 1)", "split(sep='a', maxsplit=2)", "splitlines()", "splitlines(true)", "startswith('H')",
           "endswith(('d', 'x'))", "startswith('e', 1)", "replace('l', 'L')", "replace('', '-', 2)", "join(['a', 'b'])", "join([1])",
           "find('o')", "find('o', 5)", "rfind('o')", "index('l')", "count('l')", "count('')", "isdigit()", "isalpha()", "isalnum()", "isspace()",
           "isupper()", "islower()", "removeprefix('He')", "removesuffix('ld')", "partition(' ')", "rpartition('o')", "center(15, '*')",
           "ljust(3)", "rjust(14)", "get('k')", "get('q', 7)", "get('k').x", "items()", "keys()", "values()|list", "items()|list", "copy()", "append(1)",
           "pop()", "update({})", "count(1)", "index(2)", "nosuch()", "__class__", "__class__.__mro__", "items", "k", "a", "role", "k.x"]
BINARY = ["+", "-", "*", "/", "//", "%", "**", "~", "==", "!=", "<", "<=", ">", ">=", "in", "not in", "and", "or"]


def expression(rng, depth):
    if depth == 0 or rng.random() < 0.12:
        return rng.choice(LITERALS) if rng.random() < 0.5 else rng.choice(list(VARIABLES))
    sub = lambda: expression(rng, depth - 1)
    kind = rng.randrange(17)
    if kind <= 2:
        return f"({sub()} {rng.choice(BINARY)} {sub()})"
    if kind == 3:
        return f"{sub()} {rng.choice(BINARY)} {sub()} {rng.choice(BINARY)} {sub()}"
    if kind <= 6:
        return f"({sub()})|{rng.choice(FILTERS)}"
    if kind == 7:
        return f"({sub()}) is {rng.choice(TESTS)}"
    if kind <= 10:
        return f"({sub()}).{rng.choice(METHODS)}"
    if kind == 11:
        return f"({sub()})[{sub()}]"
    if kind == 12:
        part = lambda: rng.choice(["", "", "0", "1", "-1", "2", "-2", "9", "n", "none"])
        # jinja2 makes undefined values of slices of constant numbers, and errors of others: no constants here.
        return f"({sub()} if b else b)[{part()}:{part()}{':' + part() if rng.random() < 0.4 else ''}]"
    if kind == 13:
        return f"({sub()} if {sub()}{' else ' + sub() if rng.random() < 0.8 else ''})"
    if kind == 14:
        return f"{rng.choice(['not ', '-', '+', 'not not '])}{sub()}"
    if kind == 15:
        return rng.choice([f"[{sub()}, {sub()}]", f"{{'k': {sub()}, 'a': {sub()}}}", f"({sub()}, {sub()})", f"{{{sub()}: {sub()}}}"])
    return f"{sub()}{rng.choice(['|', ' | '])}{rng.choice(FILTERS)}"


def statements(rng, depth, in_loop=False):
    """A random template."""
    tag = lambda text: "{%" + rng.choice(["", "", "", "-", "+"]) + " " + text + " " + rng.choice(["", "", "", "-", "+"]) + "%}"
    space = lambda: rng.choice(["", " ", "\n", "  \n  ", "\n\n", "x", " y ", "\t"])
    simple = lambda: expression(rng, rng.randrange(3))
    out = []
    for _ in range(rng.randrange(1, 4)):
        out.append(space())
        body = lambda loop=in_loop: statements(rng, depth - 1, loop) if depth > 0 else "{{ n }}"
        kind = rng.randrange(16 if depth > 0 else 6)
        if kind <= 2:
            out.append(f"{{{{{rng.choice(['', '-'])} {simple()} {rng.choice(['', '-'])}}}}}")
        elif kind == 3:
            out.append(tag(f"set {rng.choice(['n', 'q', 's', 'q, n', 'ns.k', 'ns.q'])} = {simple()}"))
        elif kind == 4:
            out.append(rng.choice(["{# c #}", "{#- c -#}", "{# c\n #}\n", "{% raw %} {{ {% {# {% endraw %}", "{%- raw -%} x {%+ endraw %}\n"]))
        elif kind == 5:
            out.append(tag(rng.choice(["break", "continue"])) if in_loop else tag("set ns = namespace(k=0)"))
        elif kind <= 8:
            middle = tag("elif " + simple()) + body() if rng.random() < 0.4 else ""
            last = tag("else") + body() if rng.random() < 0.5 else ""
            out.append(tag("if " + simple()) + body() + middle + last + tag("endif"))
        elif kind <= 11:
            target, items = rng.choice([("x", simple()), ("x", "l"), ("x", "u"), ("k, v", "d.items()"), ("k, v", "d|items"), ("x", "range(4)"),
                                        ("x", "w|map('upper')"), ("n", "l"), ("(a, b), c", "[((1, 2), 3)]"), ("x", "s")])
            condition = " if " + rng.choice([simple(), "x != 1", "n"]) if rng.random() < 0.3 else ""
            loop = rng.choice(["", "{{ loop.index }}", "{{ loop.last }}{{ loop.length }}", "{{ loop.previtem }}{{ loop.nextitem is defined }}",
                               "{{ loop.revindex0 }}{{ loop.first }}", "{{ loop.changed(n) }}{{ loop.cycle(1, 2) }}", "{{ loop.depth }}{{ x }}"])
            last = tag("else") + body() if rng.random() < 0.3 else ""
            out.append(tag(f"for {target} in {items}{condition}") + loop + body(True) + last + tag("endfor"))
        elif kind == 12:
            out.append(tag("set " + rng.choice(["q", "s"]) + rng.choice(["", " | upper", " | trim | length"])) + body() + tag("endset"))
        elif kind == 13:
            name, given = rng.choice([("f(a)", "f(1)"), ("f(a, b=n)", "f(2)"), ("f(a, b='x')", "f(b=1, a=2)"), ("f()", "f(1, 2)"), ("f()", "f(k=1)"),
                                      ("f(a, n)", "f(1)")])
            uses = rng.choice(["{{ a }}{{ b }}", "{{ varargs }}", "{{ kwargs }}", "{{ n }}{{ q }}", "{{ caller() if caller }}"])
            call = tag(f"call {given}") + body(False) + tag("endcall") if rng.random() < 0.3 else "{{ " + given + " }}"
            out.append(tag("macro " + name) + uses + body(False) + tag("endmacro") + call)
        elif kind == 14:
            out.append(tag("filter " + rng.choice(["upper", "trim", "indent(2)", "replace('x', 'yy')|title"])) + body() + tag("endfilter"))
        else:
            out.append(rng.choice([tag(f"with n = {simple()}, q = n") + body() + tag("endwith"),
                                   tag("generation") + body(False) + tag("endgeneration"), tag(f"print {simple()}, n")]))
    return "".join(out) + space()


def hides_address(text):
    return text is not None and (" at 0x" in text or " object at " in text or "Markup(" in text or "<function" in text
                                 or "<class" in text or "built-in method" in text or "<loop" in text)


def random_cases(rng, count, make):
    cases = []
    while len(cases) < count:
        template = make()
        text = render(template, VARIABLES)
        if text is None and rng.random() < 0.8:  # most random templates fail
            continue
        if not hides_address(text) and (text is None or len(text) < 20_000):
            cases.append([template, text])
    return cases


def case_tables():
    """Every character that changes with its case, and texts with sigmas."""
    chars = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    changed = [c for c in chars if c != c.upper() or c != c.lower() or c != c.title()]
    rng = random.Random(7)
    sigmas = ["".join(rng.choices("ΣσaΑ'.\u00ad\u0345 1\u0301ǅʰ", k=rng.randrange(1, 9))) for _ in range(3000)]
    texts = ["".join(changed[i:i + 50]) for i in range(0, len(changed), 50)] + changed + sigmas
    assigned = "".join(c for c in chars if unicodedata.category(c) not in ("Cn", "Co") or ord(c) % 97 == 0)
    return {"cases": [[t, t.upper(), t.lower(), t.title(), t.capitalize(), repr(t), t.islower(), t.isupper(), t.isalpha(), t.isalnum(),
                       t.isdecimal()] for t in texts],
            "repr": [[assigned[i:i + 997], repr(assigned[i:i + 997])] for i in range(0, len(assigned), 997)]}


def model_directories(folder, rng):
    """Directories as transformers reads them, and what its apply_chat_template gives."""
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer
    tokenizer_json = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2}, [])).to_str()
    for name, template in TEMPLATES.items():
        out = folder / name
        out.mkdir(parents=True)
        (out / "tokenizer.json").write_text(tokenizer_json)
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
                  "eos_token": {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False,
                                "normalized": False, "single_word": False}}
        if name in ("chatml", "gemma"):
            config["chat_template"] = template
        elif name in ("qwen25", "mistral"):
            config["chat_template"] = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": template}]
        else:
            (out / "chat_template.jinja").write_text(template)
        (out / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = AutoTokenizer.from_pretrained(str(out))
        cases = []
        for messages in conversations(rng):
            if not messages:
                continue
            options = {"tools": rng.choice([None, TOOLS]), "add_generation_prompt": rng.random() < 0.5,
                       "enable_thinking": False}
            if messages[0]["role"] == "user" and rng.random() < 0.3:
                messages = messages + [{"role": "assistant", "content": "x", "thinking": "hm"}]
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
            except Exception:
                text = None
            cases.append([messages, options, text])
        assert any(text for _, _, text in cases), name
        dump(out / "cases.json", cases)


class FixedTime(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return CLOCK


def make(folder):
    chat_template_utils.datetime = FixedTime
    scale = int(os.environ.get("JINJA_ORACLE_SCALE", "1"))
    rng = random.Random(20261122 + scale)
    dump(folder / "real.json", real_cases(rng))
    dump(folder / "variables.json", VARIABLES)
    dump(folder / "expressions.json", random_cases(rng, 4000 * scale, lambda: "{{ " + expression(rng, rng.randrange(1, 4)) + " }}"))
    dump(folder / "random.json", random_cases(rng, 1500 * scale, lambda: statements(rng, rng.randrange(1, 4))))
    dump(folder / "case.json", case_tables())
    model_directories(folder / "chat", rng)


if __name__ == "__main__":
    {"make": make}[sys.argv[1]](pathlib.Path(sys.argv[2]))
