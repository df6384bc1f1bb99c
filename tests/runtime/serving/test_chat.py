"""Chat templates give what transformers gives, stay in their sandbox, and calls of tools are found in answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import EXAMPLE
from transformers import PreTrainedTokenizerFast

from optc.compiler.diagnostics import InputError
from optc.runtime.generation.chat_template import ChatTemplate, load_chat_template
from optc.runtime.serving.tool_calls import ToolCall, ToolText, calls_are_read

TEMPLATES = {
    "chatml": "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' + message['content'] | trim "
    "+ '<|im_end|>' + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}",
    "blocks": "{{ bos_token }}\n{% set ns = namespace(last=0) %}\n{% for m in messages %}\n  {% if m.role == 'system' %}"
    "\n{% continue %}\n  {% endif %}\n[{{ m.role | upper }}] {% generation %}{{ m.content }}{% endgeneration %}\n"
    "{% set ns.last = loop.index %}{% endfor %}{{ ns.last }}{{ eos_token }}",
    "tools": "{% if tools %}{{ tools | tojson(indent=2) }}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{% endfor %}",
    "options": "{% if enable_thinking is defined and not enable_thinking %}no{% else %}yes{% endif %}",
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be <brief> & kind."},
    {"role": "user", "content": " Hé, what's 1 < 2? "},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "less", "arguments": {"a": 1, "b": "ü"}}}],
    },
    {"role": "tool", "content": '{"result": true}'},
]
TOOLS = [{"type": "function", "function": {"name": "less", "parameters": {"type": "object", "properties": {}}}}]


@pytest.mark.parametrize("name", TEMPLATES)
def test_it_is_what_transformers_renders(name: str) -> None:
    reference = PreTrainedTokenizerFast.from_pretrained(EXAMPLE)
    reference.chat_template = TEMPLATES[name]
    tokens = {"bos_token": reference.bos_token, "eos_token": reference.eos_token}
    template = ChatTemplate(TEMPLATES[name], tokens, "here")
    for tools, extra in ((None, {}), (TOOLS, {}), (None, {"enable_thinking": False})):
        expected = reference.apply_chat_template(
            MESSAGES, tools=tools, add_generation_prompt=True, tokenize=False, **extra
        )
        assert template.render(MESSAGES, tools=tools, **extra) == expected
    assert template.takes_tools == (name == "tools")
    assert calls_are_read(template) == (name == "tools")


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[99].role.x }}",
        "{{ 1 / 0 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    ],
)
def test_templates_that_go_astray(source: str) -> None:
    with pytest.raises(InputError, match="the chat template") as caught:
        ChatTemplate(source, {}, "here").render(MESSAGES)
    assert "alternate" not in source or "roles must alternate" in str(caught.value)


def test_where_templates_are_found(tmp_path: Path) -> None:
    assert load_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "A{{ bos_token }}"}, {"name": "rag", "template": "B"}]
    config.write_text(json.dumps({"chat_template": named, "bos_token": {"content": "<s>"}}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render([]) == "A<s>"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "C{{ bos_token }}"}))
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render([]) == "C<s>"
    (tmp_path / "chat_template.jinja").write_text("D{{ bos_token }}")
    found = load_chat_template(tmp_path)
    assert found is not None
    assert found.render([]) == "D<s>"
    for data, what in (
        (b"{% if %}", "does not parse"),
        (b"\xff", "is not UTF-8"),
        (b"a" * (1 << 21), "more than 262144"),
    ):
        (tmp_path / "chat_template.jinja").write_bytes(data)
        with pytest.raises(InputError, match=what):
            load_chat_template(tmp_path)


ANSWER = 'I look.<tool_call>\n{"name": "less", "arguments": {"a": 1}}\n</tool_call> and <tool_call>{"name": 3}</tool_call><to'


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_are_found_however_the_text_comes(size: int) -> None:
    stream, said, calls = ToolText(), "", []
    for start in range(0, len(ANSWER), size):
        text, found = stream.push(ANSWER[start : start + size], last=start + size >= len(ANSWER))
        said, calls = said + text, calls + found
    assert said == 'I look. and <tool_call>{"name": 3}</tool_call><to'  # what is not a call stays text
    assert calls == [ToolCall("less", '{"a": 1}')]
