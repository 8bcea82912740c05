"""Ways to adapt a base model, by name."""

from __future__ import annotations

from trainer.config import JobSettings
from trainer.methods.base import Method
from trainer.methods.condition import Condition
from trainer.methods.full import Full
from trainer.methods.lora import Lora
from trainer.methods.perfusion import Perfusion
from trainer.methods.pivotal import Pivotal
from trainer.methods.prefix import Prefix
from trainer.methods.textual_inversion import TextualInversion

METHODS: dict[str, type[Method]] = {
    method.name: method for method in (Pivotal, Lora, TextualInversion, Full, Condition, Prefix, Perfusion)
}


def create(settings: JobSettings) -> Method:
    """The method that the settings name, not yet attached."""
    return METHODS[settings.method](settings)
