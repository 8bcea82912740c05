"""Two concepts, and a small data set of them."""

from __future__ import annotations

from preprocessing.concepts import Concept
from preprocessing.prepared import PreparedDataset

ROB = {"folder": "robots", "trigger_word": "ROB", "class_word": "dog", "n_tokens": 3}
TEA = {"folder": "pots", "trigger_word": "TEA", "class_word": "cat", "weight": 3.0}
TWO = (ROB, TEA)


def of_two(dataset: PreparedDataset) -> PreparedDataset:
    """The small data set of four as three pictures of the one concept and one of the other."""
    concepts = tuple(Concept(**one) for one in TWO)
    items = [
        item.model_copy(
            update={"concept": int(i == 3), "caption": item.caption.replace("TOK", concepts[i == 3].trigger_word)}
        )
        for i, item in enumerate(dataset.items)
    ]
    return dataset.model_copy(update={"items": tuple(items), "concepts": concepts, "trigger_word": "ROB"})
