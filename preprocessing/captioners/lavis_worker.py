"""The process in which salesforce-lavis runs, in its own environment: `python -P lavis_worker.py --model large_coco`.

Imports nothing of this project. See `worker.py` for how it is spoken to: a question is {"pictures": [PNG in base64]},
its answer {"captions": [{"caption": ...} or {"error": ...}]}, in order.
"""

import argparse
import base64
import importlib
import importlib.machinery
import io
import json
import os
import sys
import types
from pathlib import Path

# LAVIS imports these wherever it goes, and its BLIP calls nothing of them.
UNUSED = ("pandas", "cv2", "iopath", "iopath.common", "iopath.common.download", "iopath.common.file_io", "fairscale")
UNUSED += ("fairscale.nn", "fairscale.nn.checkpoint", "fairscale.nn.checkpoint.checkpoint_activations", "decord")
LONGEST_CAPTION = 40  # tokens after the prompt, as for captioner blip
PACKAGES = ("lavis", "lavis.models", "lavis.processors")  # whose __init__ imports all of LAVIS


class _Anything(types.ModuleType):
    """Stands for a package that is not installed: whatever is asked of it is there and does nothing."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


def own_output():
    """A stream to the real stdout, which from now on nobody else can write to."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return stream


def prepare_imports():
    for name in UNUSED:
        module = _Anything(name)
        module.__path__ = []
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        sys.modules[name] = module
    sys.modules["iopath.common.file_io"].g_pathmgr = types.SimpleNamespace(open=open, exists=os.path.exists)
    sys.modules["fairscale.nn.checkpoint.checkpoint_activations"].checkpoint_wrapper = lambda module, *a, **k: module
    folder = Path(importlib.machinery.PathFinder.find_spec("lavis").submodule_search_locations[0])
    for name in PACKAGES:
        package = types.ModuleType(name)
        package.__path__ = [str(folder.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    # What LAVIS expects to find in the packages that were not run.
    sys.modules["lavis.models"].BaseModel = importlib.import_module("lavis.models.base_model").BaseModel
    base = importlib.import_module("lavis.processors.base_processor")
    sys.modules["lavis.processors"].BaseProcessor = base.BaseProcessor
    importlib.import_module("lavis.common.registry").registry.register_path("library_root", str(folder))


def load(model_type):
    """The model, the picture processor and the device."""
    import torch

    prepare_imports()
    from omegaconf import OmegaConf

    module = importlib.import_module("lavis.models.blip_models.blip_caption")
    processors = importlib.import_module("lavis.processors.blip_processors")
    if model_type.endswith(".yaml"):
        module.BlipCaption.PRETRAINED_MODEL_CONFIG_DICT["local"] = str(Path(model_type).resolve())
        model_type = "local"
    config = OmegaConf.load(module.BlipCaption.default_config_path(model_type))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = module.BlipCaption.from_pretrained(model_type).to(device).eval()
    size = OmegaConf.select(config, "preprocess.vis_processor.eval.image_size", default=384)
    return model, processors.BlipImageEvalProcessor(image_size=size), device


def answer(question, model, processor, device):
    import torch
    from PIL import Image

    captions, pictures, places = [], [], []
    for packed in question["pictures"]:
        try:
            with Image.open(io.BytesIO(base64.b64decode(packed))) as picture:
                pictures.append(processor(picture.convert("RGB")))
        except (OSError, ValueError) as error:
            captions.append({"error": str(error)})
            continue
        places.append(len(captions))
        captions.append({})
    if pictures:
        with torch.inference_mode():
            said = model.generate(
                {"image": torch.stack(pictures).to(device)},
                use_nucleus_sampling=False,
                num_beams=1,
                min_length=0,
                max_length=model.prompt_length + LONGEST_CAPTION,
            )
        for place, line in zip(places, said, strict=True):
            captions[place] = {"caption": line}
    return {"captions": captions}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="LAVIS's name of a model type, or a .yaml")
    options = parser.parse_args()
    output = own_output()

    def tell(line):
        output.write(json.dumps(line) + "\n")
        output.flush()

    loaded = load(options.model)
    tell({"ready": True})
    for line in sys.stdin:  # ends with the process that asks
        tell(answer(json.loads(line), *loaded))


if __name__ == "__main__":
    main()
