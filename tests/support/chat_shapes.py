# ruff: noqa: E501, RUF001
"""Chat templates after the formats of well-known models, short, and the text by which each ends an answer."""

from typing import NamedTuple


class Shape(NamedTuple):
    """A template and the texts that end an answer and a turn with calls; None where nothing ends it."""

    jinja: str
    stop: str | None
    call_stop: str | None = None


IM = "<|im_end|>"
_TOOLS = "{% if tools %}<|im_start|>system\nTools: {{ tools | tojson }}<|im_end|>\n{% endif %}"
_TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
_CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '\n<tool_call>\n' + (c.function | tojson) + '\n</tool_call>' }}{% endfor %}"
)
_PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_QUERY = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_SPLIT = (
    "{% set c = m.content or '' %}{% set r = m.reasoning_content or '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') %}{% set c = c.split('</think>')[-1].lstrip('\n') %}"
    "{% endif %}"
)


def _chatml(answer: str, prompt: str = _PROMPT, before: str = "") -> str:
    return (
        before + _TOOLS + "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        + answer + "{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}" + prompt
    )  # fmt: skip


_HEADER = "{{ '<|start_header_id|>' + (m.role if m.role != 'tool' else 'ipython') + '<|end_header_id|>\n\n' }}"
_LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}" + _HEADER + "{% if loop.first and tools %}{{ tools | tojson }}{% endif %}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{% else %}{{ m.content | trim }}"
    "{% endif %}<|eot_id|>{% endfor %}"
)
_LLAMA3_PROMPT = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
_MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
    "{% elif m.role == 'user' %}{% if tools and loop.last %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]"
    "{% endif %}[INST]{{ m.content }}[/INST]{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{% if m.tool_calls %}{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
    "{{ c.function.arguments | tojson }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)

SHAPES: dict[str, Shape] = {
    "chatml": Shape(_chatml("{{ m.content }}" + _CALLS), IM),
    "chatml with eos behind": Shape(
        _chatml("{{ m.content }}" + _CALLS, "{% if not add_generation_prompt %}{{ eos_token }}{% else %}"
        "{{ '<|im_start|>assistant\n' }}{% endif %}"), IM,
    ),
    "chatml without a prompt of its own": Shape(
        _chatml("{{ m.content }}" + _CALLS, "{{ '<|im_start|>assistant\n' }}"), IM
    ),
    "llama2": Shape(
        "{% for m in messages %}{% if m.role == 'system' %}{{ '<<SYS>>' + m.content + '<</SYS>>' }}{% elif m.role == 'user' %}"
        "{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% elif m.role == 'assistant' %}"
        "{{ ' ' + m.content + ' ' + eos_token }}{% else %}{{ raise_exception('no tools') }}{% endif %}{% endfor %}",
        "</s>",
    ),
    "llama3 short": Shape(_LLAMA3 + "{% if add_generation_prompt %}" + _LLAMA3_PROMPT + "{% endif %}", "<|eot_id|>"),
    "llama3 with the next header always": Shape(_LLAMA3 + _LLAMA3_PROMPT, "<|eot_id|>"),
    "mistral v3": Shape(_MISTRAL.replace("and loop.last ", ""), "</s>"),
    "mistral v7 with tools before the last question": Shape(_MISTRAL, "</s>"),
    "gemma2": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
        "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "gemma3 with the system turn before the question": Shape(
        "{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}{% if m.role == 'system' %}"
        "{% set ns.s = m.content + '\n\n' %}{% else %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else 'user') }}"
        "{{ '\n' + ns.s + m.content | trim + '<end_of_turn>\n' }}{% set ns.s = '' %}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        "<end_of_turn>",
    ),
    "phi3 with the next header always": Shape(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{{ '<|assistant|>\n' }}",
        "<|end|>",
    ),
    "phi4": Shape(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}", IM,
    ),
    "qwen3 short": Shape(
        _chatml(_SPLIT + "{% if loop.index0 > ns.last and (loop.last or r) %}{{ '<think>\n' + r + '\n</think>\n\n' }}"
        "{% endif %}{{ c }}" + _CALLS, before=_QUERY), IM,
    ),
    "qwen3.5 thinking": Shape(
        _chatml(_SPLIT + "{% if loop.index0 > ns.last %}{{ '<think>\n' + r + '\n</think>\n\n' }}{% endif %}{{ c }}" + _CALLS,
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}", before=_QUERY), IM,
    ),
    "thoughts that are not looked for in the content": Shape(
        _chatml("{{ '<think>\n' + (m.reasoning_content or '') + '\n</think>\n\n' + (m.content or '') }}" + _CALLS,
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"), IM,
    ),
    "nemotron": Shape(
        _chatml("{{ '<think>\n' + m.reasoning_content + '\n</think>\n' if m.reasoning_content else '<think></think>' }}"
        "{{ m.content or '' }}" + _CALLS,
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"), IM,
    ),
    "deepseek r1": Shape(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% elif m.role == 'tool' %}{{ '<｜tool▁output▁begin｜>' + m.content }}"
        "{{ '<｜tool▁output▁end｜>' }}{% elif m.content is none %}<｜Assistant｜>{% for c in m.tool_calls %}"
        "{{ '<｜tool▁call▁begin｜>' + c.function.name + '\n' + (c.function.arguments | tojson) + '<｜tool▁call▁end｜>' }}{% endfor %}"
        "<｜end▁of▁sentence｜>{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        "<｜end▁of▁sentence｜>",
    ),
    "granite": Shape(
        "{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}<|end_of_text|>\n{% endif %}"
        "{% for m in messages %}{{ '<|start_of_role|>' + m.role + '<|end_of_role|>' + (m.content or '') }}"
        "{% for c in m.tool_calls or [] %}{{ '<|tool_call|>' + (c.function | tojson) }}{% endfor %}{{ '<|end_of_text|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        "<|end_of_text|>",
    ),
    "command r7b": Shape(
        "{{ bos_token }}{% if tools %}<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{{ tools | tojson }}<|END_OF_TURN_TOKEN|>{% endif %}"
        "{% for m in messages %}<|START_OF_TURN_TOKEN|>{% if m.role == 'assistant' %}<|CHATBOT_TOKEN|>{% if m.reasoning_content %}"
        "{{ '<|START_THINKING|>' + m.reasoning_content + '<|END_THINKING|>' }}{% endif %}{% if m.tool_calls %}"
        "{{ m.content or '' }}<|START_ACTION|>{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}<|END_ACTION|>"
        "{% else %}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{% endif %}{% else %}"
        "{{ ('<|USER_TOKEN|>' if m.role == 'user' else '<|SYSTEM_TOKEN|>') + m.content }}{% endif %}<|END_OF_TURN_TOKEN|>"
        "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        "<|END_OF_TURN_TOKEN|>",
    ),
    "glm4": Shape(
        "[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}", None,
    ),
    "gpt-oss": Shape(
        "{% if tools %}{{ '<|start|>developer<|message|>' + (tools | tojson) + '<|end|>' }}{% endif %}{% for m in messages %}"
        "{% if m.role == 'assistant' and m.tool_calls %}{{ '<|start|>assistant to=functions.' + m.tool_calls[0].function.name }}"
        "{{ '<|channel|>commentary json<|message|>' + (m.tool_calls[0].function.arguments | tojson) + '<|call|>' }}"
        "{% elif m.role == 'assistant' %}{% if loop.last and m.thinking %}"
        "{{ '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>", "<|call|>",
    ),
    "falcon-h1": Shape(
        "{{ bos_token }}" + _chatml("{{ m.content }}" + _CALLS.replace("'\n<tool_call>", "'<tool_call>")), IM
    ),
    "olmo2": Shape(
        "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% if m.role == 'assistant' %}"
        "{{ eos_token }}{% endif %}{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '\n<|assistant|>\n' }}{% endif %}", "</s>",
    ),
    "smollm3": Shape(
        _chatml("{{ m.content.lstrip('\n') }}" + _CALLS, "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% endif %}", before="{{ '<|im_start|>system\nReasoning: /think<|im_end|>\n' }}"), IM,
    ),
}  # fmt: skip
