"""Bounds of chat templates: what would take hours or gigabytes is refused, and what models have gives what Jinja gives."""

from __future__ import annotations

import resource
import threading
import time

import jinja2.sandbox
import pytest

from optc.compiler.diagnostics import InputError
from optc.runtime.generation import template_sandbox
from optc.runtime.generation.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": " a\nb <c> "}, {"role": "assistant", "content": "x" * 50}]
LARGE = [
    "{{ 'a' * 10 ** 10 }}",
    "{{ 10 ** 10 * ['a'] }}",
    "{{ ['a' * 1000000] * 1000000 }}",
    "{{ 'a'.ljust(10 ** 10) }}",
    "{{ 'a'.zfill(10 ** 10) }}",
    "{{ 'a\\t'.expandtabs(10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 10, 1) }}",
    "{{ '%s' % [['a' * 1000000] * 1000000] }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 10) }}",
    "{{ '{a}'.format_map({'a': ['a' * 1000000] * 1000000}) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a' | indent(10 ** 10, first=True) }}",
    "{{ ('a\n' * 100000) | indent(100000) }}",
    "{{ messages | tojson(indent=10 ** 10) }}",
    "{{ {'a': range(99999) | list} | tojson(indent=99999) }}",
    "{{ range(9) | batch(10 ** 10, 'a') | list }}",
    "{{ range(9999) | map('string') | join('b' * 1000000) }}",
    "{{ ('b' * 1000000).join(range(9999) | map('string')) }}",
    "{{ range(9999) | map('center', 99999) | list }}",
    "{% set ns = namespace(t='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
    "{% set ns = namespace(t='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "{% set ns = namespace(t='a') %}{% for i in range(60) %}{% set x %}{{ ns.t }}{{ ns.t }}{% endset %}{% set ns.t = x %}{% endfor %}",
    "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}{% set ns = namespace(t='a') %}"
    "{% for i in range(60) %}{% set ns.t = f(ns.t) %}{% endfor %}",
]
NUMBERS = [
    "{{ 7 ** 10000 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
]
LONG = [
    "{% for a in range(99999) %}{% for b in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) if b < 0 %}{% set c = b %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{{ f(n - 1) if n }}{{ f(n - 1) if n }}{% endmacro %}{{ f(90) }}",
    "{% for a in [9] recursive %}{{ loop([a] * 9) }}{{ loop([a] * 9) }}{% endfor %}",
]


def refused(template: str) -> str:
    with pytest.raises(InputError) as caught:
        ChatTemplate(template, {}, "here").render(MESSAGES)
    assert caught.value.where == "here"
    return str(caught.value.why or caught.value.what)


@pytest.mark.parametrize("template", LARGE)
def test_texts_and_lists(template: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "it makes texts of more than" in refused(template) or "is given a number" in refused(template)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10


@pytest.mark.parametrize("template", NUMBERS)
def test_numbers(template: str) -> None:
    assert "numbers of more than 4096 bits" in refused(template)


@pytest.mark.parametrize("template", LONG)
def test_time(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "SECONDS", 0.2)
    begin = time.process_time()
    assert "it takes more than 0.2 s" in refused(template) or "does not end" in refused(template)
    assert time.process_time() - begin < 2


NOT_PARSED = {
    "parentheses": "{{ " + "(" * 100_000 + "1" + ")" * 100_000 + " }}",
    "loops": "{% for a in [1] %}" * 40 + "{% endfor %}" * 40,
    "conditions": "{% if a %}" * 150 + "{% endif %}" * 150,
    "attributes": "{{ a" + ".b" * 20_000 + " }}",
    "filters": "{{ a" + "|trim" * 5_000 + " }}",
    "sums": "{{ 1" + "+1" * 900 + " }}",
    "digits": "{{ " + "9" * 10_000 + " }}",
    "blocks": "{% block a %}{% endblock %}" * 2,
}


@pytest.mark.parametrize("case", NOT_PARSED)
def test_what_python_does_not_compile(case: str) -> None:
    with pytest.raises(InputError, match="the chat template does not parse") as caught:
        ChatTemplate(NOT_PARSED[case], {}, "here")
    assert caught.value.where == "here"


def test_the_budget_is_of_one_rendering_and_its_thread() -> None:
    template = ChatTemplate("{% for i in range(10) %}{{ 'a' * 4000000 }}{% endfor %}", {}, "here")
    for _ in range(3):  # each takes most of it
        assert len(template.render(MESSAGES)) == 40_000_000
    with template_sandbox._budget.given():
        thread = threading.Thread(target=lambda: template.render(MESSAGES))
        thread.start()
        thread.join()
        assert template_sandbox._budget.left == template_sandbox.MOST_CHARACTERS


PIECES = """
{%- macro shown(x) -%}[{{ x | trim | upper }}]{%- endmacro -%}
{%- set ns = namespace(found=false, n=0) -%}
{%- for m in messages -%}
{%- set ns.n = ns.n + loop.index0 * 2 + loop.revindex -%}
{{ '<|' ~ m.role ~ '|>' + m['content'].strip() | replace('<', '(') }}{{ '' if loop.last else ',' }}
{{ "%s-%03d" % (m.role, loop.index) }} {{ '{0:>5}'.format(loop.length) }} {{ m.content.split('\n')[0] | default('') }}
{%- if m.role == 'user' and not ns.found %}{% set ns.found = true %}{{ loop.previtem is defined }}{% endif %}
{%- for k, v in m.items() if v is string %}{{ k }}={{ v | length }}{% if loop.nextitem is defined %};{% endif %}{% else %}none{% endfor %}
{%- endfor -%}
{{ messages | map(attribute='role') | join('+') }} {{ ', '.join(messages | map(attribute='role')) }} {{ messages[0] | dictsort }}
{{ shown(messages[0].content) }} {{ messages | selectattr('role', 'equalto', 'user') | list | length }} {{ ns.n ** 2 }}
{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else '(' + loop(x) + ')' }}{% endfor %}
{% filter upper %}a{{ 1 }}{% endfilter %}{% set t %}b{{ 2 }}{% endset %}{{ t * 3 }} {{ 'x' | center(9) }} {{ (7, 8) | string }}
{% for i in range(5) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}
"""


def test_what_jinja_gives() -> None:
    """Each construct that chat templates use, beside the sandbox without bounds."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    expected = environment.from_string(PIECES).render(messages=MESSAGES, tools=None, add_generation_prompt=True)
    assert ChatTemplate(PIECES, {}, "here").render(MESSAGES) == expected
    assert len(expected) > 300


def test_long_conversations_are_far_from_the_bounds() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": "word <b> " * 500} for i in range(1000)]
    template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + (m.content | trim).replace('<b>', '**') + '\\n' }}"
        "{% if 'x' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\\n') }}{% endif %}{% endfor %}"
    )
    begin = time.process_time()
    text = ChatTemplate(template, {}, "here").render(messages)
    assert len(text) > 4_000_000
    assert time.process_time() - begin < template_sandbox.SECONDS / 4
