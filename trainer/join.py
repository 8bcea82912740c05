"""Two archives of weights as one, for the two halves of a model:

python -m trainer.join --weights decoder.tar --companion_weights prior.tar --out both.tar
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from preprocessing.errors import UserError
from trainer import commandline


class JoinSettings(BaseModel):
    """What is joined."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: Path = Field(description="A trained_model.tar or its folder, whose models are drawn with.")
    companion_weights: Path = Field(description="The same of the other half.")
    out: Path = Field(description="The archive to write.")


def join(settings: JoinSettings) -> None:
    """Write one archive with the nets of both. It draws with the first one's models and settings.

    Raises UserError where both have the same nets, or where one is whole nets and the other an adapter.
    """
    from trainer import artifact

    with (
        artifact.opened(settings.weights) as first,
        artifact.opened(settings.companion_weights) as second,
        tempfile.TemporaryDirectory(prefix="weights-") as name,
    ):
        folder, parts = Path(name), (first, second)
        if shared := artifact.nets_of(first) & artifact.nets_of(second):
            raise UserError(f"Both weights hold the {sorted(shared)[0]}: give those of two halves of a model.")
        manifests = [artifact.read_manifest(part) for part in parts]
        if (manifests[0].nets == {}) != (manifests[1].nets == {}):
            raise UserError("One of the weights is whole nets and the other an adapter: give both to predict.py apart.")
        if len({artifact.adapter_type(one.nets) for one in manifests if one.nets}) > 1:
            raise UserError("The two weights are adapters of several types: give both to predict.py apart.")
        worded = next((one for one in manifests if one.tokens), manifests[0])
        taken = {"method": worded.method, "n_tokens": worded.settings["n_tokens"]}
        taken["concepts"] = worded.settings.get("concepts", ())
        joined = manifests[0].model_copy(
            update={
                "method": worded.method,
                "trigger_word": worded.trigger_word,
                "class_word": worded.class_word,
                "tokens": worded.tokens,
                "concepts": worded.concepts,
                "settings": manifests[0].settings | taken | {"trigger_word": worded.trigger_word},
                "nets": manifests[0].nets | manifests[1].nets,
            }
        )
        artifact.write_manifest(folder, joined)
        for file in (artifact.ADAPTER, artifact.EMBEDDINGS):
            found = [artifact.load_tensors(part / file)[0] for part in parts if (part / file).is_file()]
            tensors = {key: value for state in found for key, value in state.items()}
            if tensors:
                artifact.save_tensors(folder / file, tensors, artifact.adapter_header(tensors, joined))
        artifact.write(folder, settings.out)


def main(argv: list[str]) -> None:
    """The command line; `argv` are the program's arguments. Raises UserError for a mistake of the user's."""
    parser = commandline.build_parser(JoinSettings, "trainer.join", "Two archives of weights as one.")
    settings = commandline.read(parser, JoinSettings, argv)
    join(settings)
    print(f"weights: {settings.out}")


if __name__ == "__main__":
    sys.exit(commandline.run(main))
