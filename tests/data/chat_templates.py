"""Ten hand-written chat templates that cover the kinds in common use."""

_END = "<|im_end|>"
_CHATML_TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}" + _END + "\n"
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = "{% for m in messages %}" + _CHATML_TURN + "{% endfor %}" + _ASK

TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}" + _END + "\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments | tojson }}]{% endfor %}"
    + _END
    + "\n{% endfor %}"
    + _ASK
)
_THINKING = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}<think>{{ m.reasoning_content or '' }}</think>{% endif %}"
    "{{ m.content }}" + _END + "\n{% endfor %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "without a newline": "{% for m in messages %}<|im_start|>{{ m.role }} {{ m.content }}" + _END + "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}",
    "BOS first": "{{ bos_token }}" + CHATML,
    "EOS ends the assistant": "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}"
    "{% else %}[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}",
    "a second end": CHATML.replace(
        "{% if add", "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}{% if add"
    ),
    "plain text": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "tools": TOOLS,
    "reasoning of the last turn alone": _THINKING + _ASK,
    "generation markers": "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}"
    + _END
    + "{% endgeneration %}\n{% else %}"
    + _CHATML_TURN
    + "{% endif %}{% endfor %}"
    + _ASK,
    "the day": "{{ strftime_now('%d %b %Y') }}\n" + CHATML,
}
