"""Messages and token ids kept in step: every prompt continues exactly what was sampled, or says why it does not."""

from gymlink.align.base import ChatFormat, FormatReport, Parsed, Tokenizer, ToolCall
from gymlink.align.canonical import ID_FIELDS, Canonical, canonical, digest, split_reasoning
from gymlink.align.format import load_format
from gymlink.align.history import Check
from gymlink.align.record import PendingPlan, PromptPlan, RolloutRecord
from gymlink.align.segments import build_segments, segment_of
from gymlink.align.suffix import TemplateFormat

__all__ = [
    "ID_FIELDS",
    "Canonical",
    "ChatFormat",
    "Check",
    "FormatReport",
    "Parsed",
    "PendingPlan",
    "PromptPlan",
    "RolloutRecord",
    "TemplateFormat",
    "Tokenizer",
    "ToolCall",
    "build_segments",
    "canonical",
    "digest",
    "load_format",
    "segment_of",
    "split_reasoning",
]
