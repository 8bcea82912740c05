"""The trigger word in captions: put there by code, because a captioner that is asked for it often leaves it out."""

from __future__ import annotations

from preprocessing.concepts import trigger_pattern
from preprocessing.modes import WORDINGS
from preprocessing.settings import Mode, PrepareSettings


def with_trigger(caption: str, trigger: str, mode: Mode = "subject") -> str:
    """The caption, stripped, with the trigger where the mode puts it unless it holds it already.

    >>> with_trigger("stoking the fire", "TOK")
    'TOK, stoking the fire'
    >>> with_trigger("a lake.", "TOK", "style")
    'a lake, in the style of TOK'
    """
    caption = caption.strip()
    if trigger_pattern(trigger).search(caption):
        return caption
    wording = WORDINGS[mode]
    if not caption:
        return wording.alone.format(trigger=trigger)
    # A full stop in the middle would end the sentence that goes on.
    goes_on = wording.with_caption.startswith("{caption}")
    caption = caption.rstrip(".,;: ") or caption if goes_on else caption
    return wording.with_caption.format(trigger=trigger, caption=caption)


def dressed(caption: str, settings: PrepareSettings) -> str:
    """The caption with prefix, suffix and trigger, each unless it is there; so doing it twice changes nothing."""
    caption, prefix, suffix = caption.strip(), settings.caption_prefix, settings.caption_suffix
    has = trigger_pattern(settings.trigger_word).search
    if caption.startswith(prefix) and caption.endswith(suffix) and has(caption):
        return caption
    core = caption.removeprefix(prefix).removesuffix(suffix).strip()
    if not has(f"{prefix} {core} {suffix}"):
        core = with_trigger(core, settings.trigger_word, settings.mode)
    joint = "" if suffix[:1] in tuple(",.;:!?") else " "
    return f"{f'{prefix} {core}'.strip()}{joint}{suffix}".strip()
