"""`document`: the OpenAPI document, as this service answers under its settings and with its models."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from app.jobs.cards import CardError, ModelCard
from app.jobs.lines import PRIORITIES
from app.web.origin import SAFE
from app.web.problems import ProblemDocument, problems_of
from app.web.service import Service
from app.web.upload import (
    ET_VALUE_FIELD,
    ET_VALUES,
    GRID_FIELD,
    MODEL_FIELD,
    PREPROCESS,
    PREPROCESS_FIELD,
    PRIORITY_FIELD,
    PROBABILITIES_FIELD,
    TRUTHS,
)

PREPROCESSING: dict[str, Any] = {
    "type": "string",
    "enum": list(PREPROCESS),
    "default": PREPROCESS[0],
    "description": "raw: the images are as they come from the scanner; they are registered to each other and the skull "
    "is stripped. none: they are taken as they are. auto: what they seem to need, and nothing for images that are "
    "registered and stripped.",
}

ENHANCING: dict[str, Any] = {
    "type": "string",
    "enum": list(ET_VALUES),
    "description": "What the mask holds for enhancing tumour: 3 as BraTS since 2023 (the default where the "
    "model's label has it), or 4 as before. Not for models without such a label.",
}

PRIORITY: dict[str, Any] = {
    "type": "string",
    "enum": list(PRIORITIES),
    "description": "interactive (the default), or batch: behind all that are interactive, for some time.",
}

ANYWHERE = ("not-http", "wrong-host", "busy", "internal")
"""What any request may be answered with, whatever its route: by what stands around the routes."""


def document(app: FastAPI, service: Service) -> dict[str, Any]:
    """What FastAPI knows of the routes, with what it cannot: the form, what stands around the routes, the keys."""
    schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = schema.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["ProblemDocument"] = ProblemDocument.model_json_schema()
    for path in schema["paths"].values():
        for method, operation in path.items():
            operation["responses"] = _responses(method.upper(), operation["responses"])
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    if not service.settings.guarded:
        _without_keys(schema)
    schema["paths"]["/segment"]["post"]["requestBody"] = _form(service)
    return schema


def _responses(method: str, responses: dict[str, Any]) -> dict[str, Any]:
    if "application/json" in responses.get("422", {}).get("content", {}):
        # FastAPI's own validation errors do not leave this application: they become problem documents.
        del responses["422"]
    for number, answer in problems_of(*ANYWHERE, *(() if method in SAFE else ("foreign-origin",))).items():
        known = responses.setdefault(str(number), answer)
        if known is not answer:
            known["description"] += f"; {answer['description']}"
    return dict(sorted(responses.items()))


def _without_keys(schema: dict[str, Any]) -> None:
    """Where no key is asked for, none is to be declared: FastAPI does so for every route that would look at one."""
    schema["components"].pop("securitySchemes", None)
    for path in schema["paths"].values():
        for operation in path.values():
            operation.pop("security", None)
            operation["responses"].pop("401", None)


def _form(service: Service) -> dict[str, Any]:
    shelf = service.models
    cards: dict[str, ModelCard] = {}
    for name in shelf.names():
        try:
            card = shelf.get(name)
        except CardError:
            continue
        if card is not None:
            cards[name] = card
    default = shelf.default()
    choice: dict[str, Any] = {"type": "string", "description": "Which model to use; it may stand anywhere in the form."}
    if cards:
        choice["enum"] = sorted(cards)
    if default:
        choice["default"] = default
    probabilities = {
        "type": "string",
        "enum": list(TRUTHS),
        "default": "false",
        "description": "Whether to keep how probable each region is, for GET /jobs/{job_id}/probabilities.",
    }
    images: dict[str, dict[str, Any]] = {}
    for name, card in cards.items():
        for modality in card.task.modalities:
            aliases = f" Also read as {', '.join(modality.aliases)}." if modality.aliases else ""
            text = f"{modality.description or modality.name} ({name}).{aliases}"
            field = images.setdefault(modality.name, {"type": "string", "format": "binary", "description": ""})
            field["description"] = f"{field['description']} {text}".strip()
    grid: dict[str, Any] = {
        "type": "string",
        "description": "The modality, of those sent, on whose grid the mask is to lie. Without it: the first file's.",
    }
    if images:
        grid["enum"] = sorted({n for c in cards.values() for m in c.task.modalities for n in (m.name, *m.aliases)})
    return {
        "required": True,
        "description": "One .nii or .nii.gz file per modality, or a .zip of one DICOM series of MR images; any "
        "non-empty subset, each one 3-D volume. The mask is on the "
        "grid of the first file, unless `grid` names another. Names of files are neither used nor kept.",
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "properties": {
                        MODEL_FIELD: choice,
                        PREPROCESS_FIELD: PREPROCESSING,
                        GRID_FIELD: grid,
                        PROBABILITIES_FIELD: probabilities,
                        ET_VALUE_FIELD: ENHANCING,
                        PRIORITY_FIELD: PRIORITY,
                        **images,
                    },
                    "anyOf": [{"required": [name]} for name in images] or [{}],
                    "additionalProperties": False,
                },
                "encoding": {
                    name: {"contentType": "application/gzip, application/zip, application/octet-stream"}
                    for name in images
                },
            }
        },
    }
