"""What a request says of the form of its output, as a grammar: OpenAI's `response_format`, and vLLM's `structured_outputs` with
the older `guided_*` fields."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Protocol

import msgspec
from msgspec import Meta

from mooncake.engine.grammar import GRAMMAR_BYTES_MAX, choice_grammar, json_grammar, regex_grammar
from mooncake.frontend.errors import bad_field
from mooncake.frontend.tools import Name, check_schema

MAX_CHOICES = 1024
"""Texts to choose from."""
_MAX_TEXT = 16 * 1024
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

Schema = dict[str, Any] | str
"""A JSON schema, or its text."""
Text = Annotated[str, Meta(min_length=1, max_length=_MAX_TEXT)]
Choices = Annotated[
    list[Annotated[str, Meta(min_length=1, max_length=1024)]], Meta(min_length=1, max_length=MAX_CHOICES)
]
GrammarText = Annotated[str, Meta(min_length=1, max_length=GRAMMAR_BYTES_MAX)]


class JsonSchema(msgspec.Struct):
    name: Name
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    pass


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    pass


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    json_schema: JsonSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, forbid_unknown_fields=True):
    """One of these."""

    json: Schema | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = None
    json_object: bool | None = None


class Form(msgspec.Struct, frozen=True):
    """field: what asked for it, for errors. sources: of a grammar that is made of several, these with their fields."""

    field: str
    grammar: str
    sources: tuple[tuple[str, str], ...] = ()


class FormFields(Protocol):
    """Of a request. format_field, schema_field: what it calls the first of them, and the schema in it."""

    format_field: ClassVar[str]
    schema_field: ClassVar[str]
    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: Schema | None
    guided_regex: Text | None
    guided_choice: Choices | None
    guided_grammar: GrammarText | None


def form_of(request: FormFields) -> Form | None:
    """None: any text will do. Raises ApiError naming the field."""
    found = [form for form in (_response_form(request), *_other_forms(request)) if form is not None]
    if len(found) > 1:
        raise bad_field(found[1].field, f"cannot be combined with {found[0].field}")
    return found[0] if found else None


def _response_form(request: FormFields) -> Form | None:
    match request.response_format:
        case JsonObjectFormat():
            return Form(request.format_field, json_grammar(_ANY_OBJECT, strict=True))
        case JsonSchemaFormat(json_schema=spec):
            schema = spec.schema or _ANY_OBJECT
            check_schema(request.schema_field, schema)
            return Form(request.schema_field, json_grammar(schema, strict=bool(spec.strict)))
        case _:
            return None


def _other_forms(request: FormFields) -> list[Form | None]:
    outputs = request.structured_outputs or StructuredOutputs()
    any_object = _ANY_OBJECT if outputs.json_object else None
    return [
        _json("structured_outputs.json", outputs.json),
        _json("structured_outputs.json_object", any_object),
        _json("guided_json", request.guided_json),
        _regex("structured_outputs.regex", outputs.regex),
        _regex("guided_regex", request.guided_regex),
        _choice("structured_outputs.choice", outputs.choice),
        _choice("guided_choice", request.guided_choice),
        _grammar("structured_outputs.grammar", outputs.grammar),
        _grammar("guided_grammar", request.guided_grammar),
    ]


def _json(field: str, schema: Schema | None) -> Form | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = msgspec.json.decode(schema, type=dict[str, Any])
        except (ValueError, RecursionError) as error:
            raise bad_field(field, f"is not the text of a JSON object: {error}", "invalid_value") from None
    check_schema(field, schema)
    return Form(field, json_grammar(schema, strict=True))


def _regex(field: str, pattern: str | None) -> Form | None:
    return None if pattern is None else Form(field, regex_grammar(pattern))


def _choice(field: str, texts: list[str] | None) -> Form | None:
    return None if texts is None else Form(field, choice_grammar(texts))


def _grammar(field: str, grammar: str | None) -> Form | None:
    return None if grammar is None else Form(field, grammar)
