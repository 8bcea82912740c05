"""What is taught - a subject, a face, a style, or all that captions say - and what follows for captions and masks."""

from __future__ import annotations

from dataclasses import dataclass

from preprocessing.settings import Mode


@dataclass(frozen=True)
class Wording:
    """How a caption that lacks the trigger comes to it; {trigger} and {caption} are filled in."""

    with_caption: str
    alone: str


WORDINGS: dict[Mode, Wording] = {
    "subject": Wording("{trigger}, {caption}", "{trigger}"),
    "face": Wording("a photo of {trigger}, {caption}", "a photo of {trigger}"),
    # The words of a style follow those of what it shows, as they will in prompts.
    "style": Wording("{caption}, in the style of {trigger}", "in the style of {trigger}"),
    # Pictures and words as they are: there is nothing to call.
    "captions": Wording("{caption}", ""),
}
