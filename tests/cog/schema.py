"""What `cog build` leaves beside the code: the schema by which the server checks inputs before they reach the code.

Cog's command line reads it from the source without running it. Here it is made from the signatures themselves, after
Cog's rules for them; tests/test_cog.py refuses any signature that Cog would read in another way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

FILE = {"type": "string", "format": "uri"}
TYPES = {
    "str": {"type": "string"},
    "int": {"type": "integer"},
    "float": {"type": "number"},
    "bool": {"type": "boolean"},
}


def openapi() -> dict[str, Any]:
    """Both doors' schema as one document, as it lies in an image."""
    import predict
    import train

    components = {
        **_inputs("Input", predict.Predictor.run),
        "Output": {"title": "Output", "type": "array", "items": FILE},
        **_inputs("TrainingInput", train.train),
        "TrainingOutput": {"title": "TrainingOutput"} | FILE,
    }
    about = {"title": "Cog", "version": "0.1.0"}
    return {"openapi": "3.0.2", "info": about, "paths": {}, "components": {"schemas": components}}


def _inputs(title: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The component of a function's inputs, and one for each list of choices, named as the input."""
    components: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    required = []
    parameters = [one for one in inspect.signature(function).parameters.values() if one.name != "self"]
    for order, parameter in enumerate(parameters):
        given, kinds = parameter.default, get_args(parameter.annotation)
        kind = TYPES.get((kinds[0] if kinds else parameter.annotation).__name__, FILE)
        told: dict[str, Any] = {"x-order": order, "description": given.description}
        if given.choices:
            components[parameter.name] = {"title": parameter.name, "enum": given.choices} | kind
            told["allOf"] = [{"$ref": f"#/components/schemas/{parameter.name}"}]
        else:
            told |= {"title": parameter.name.replace("_", " ").title()} | kind
        bounds = {"default": given.default, "minimum": given.ge, "maximum": given.le}
        told |= {name: value for name, value in bounds.items() if value is not None}
        if kinds:
            told["nullable"] = True
        elif given.default is None:
            required.append(parameter.name)
        properties[parameter.name] = told
    return components | {
        title: {"title": title, "type": "object", "properties": properties, "required": required},
    }
