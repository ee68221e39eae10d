"""Jinja templates as Hugging Face publishes them, in a sandbox.

They get what a conversation holds and Jinja's own functions, and nothing else: no tools, no date,
nothing random. Two are built in.
"""

from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cascade_model.errors import InputError

PLAIN = (
    "{% for message in messages %}"
    "{{ message.role | capitalize + ': ' + message.content | trim + '\n\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Paragraphs `Role: content`; no special tokens."""
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def compiled(text: str) -> Template:
    """The template of a text; `InputError` when it is none."""
    try:
        return _ENVIRONMENT.from_string(text)
    except TemplateError as error:
        raise InputError(
            f"chat_template is no Jinja template ({error}); give `plain`, `chatml`, a template's "
            "text or its file"
        ) from None


def rendered(template: Template, **values: Any) -> str:
    """The text that a template makes of some values; `InputError` when it refuses them."""
    try:
        return template.render(**values)
    except Exception as error:  # a template may fail in any way
        raise InputError(
            f"chat_template refuses a conversation ({error}); clean the conversation or use "
            "another template"
        ) from None


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's words in some templates: has no effect, as
    they are found by their messages."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """Jinja as Hugging Face sets it up, without the names that depend on the day or on tools."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    kept = ("range", "namespace", "dict", "joiner", "cycler")  # Jinja's own; lipsum is random
    own = {name: environment.globals[name] for name in kept}
    environment.globals = {**own, "raise_exception": _refuse}
    return environment


_ENVIRONMENT = _environment()
