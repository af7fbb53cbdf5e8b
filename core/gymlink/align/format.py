"""Choosing the chat format of a tokenizer."""

from __future__ import annotations

from gymlink.align.base import ChatFormat, FormatReport, Parsed, Tokenizer, ToolCall
from gymlink.align.known import KnownTemplate, recognise
from gymlink.align.parsing import Parser, TagParser, TemplateParser
from gymlink.align.suffix import TemplateFormat
from gymlink.align.template import ChatTemplate

__all__ = ["ChatFormat", "FormatReport", "Parsed", "Tokenizer", "ToolCall", "load_format"]


def load_format(tokenizer: Tokenizer, *, name: str | None = None) -> ChatFormat:
    """The format of this tokenizer's conversations.

    Args:
        tokenizer: a Hugging Face tokenizer, or any object with the members of `Tokenizer`.
        name: a format of `renderers` by its name there, taken at your word; "template" for the tokenizer's own
            template without looking for a hand-made format. By default the template renders and continues, and
            completions are read by the hand-made format that is proven to write the same ids, if there is one.

    Raises:
        ConfigError: the tokenizer has no chat template and no name is given, or the name is unknown or does not fit.
    """
    if name not in (None, "auto", "template"):
        known = KnownTemplate(tokenizer, name)
        return TemplateFormat(known, known.parser)
    template = ChatTemplate(tokenizer)
    parser: Parser | None = None if name == "template" else recognise(template)
    if parser is None:
        carries = getattr(tokenizer, "response_template", None) and hasattr(tokenizer, "parse_response")
        parser = TemplateParser(template) if carries else TagParser(template)
    return TemplateFormat(template, parser)
