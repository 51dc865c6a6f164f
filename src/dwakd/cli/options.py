"""Command-line options that several commands share, and options that are made from the fields of an options model."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from pydantic.fields import FieldInfo

from dwakd.validation import Options

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Options to change, as section.option=value: loss.temperature=4")
]
ModelName = Annotated[str, typer.Argument(help="Folder, hub id, gguf:PATH or package:NAME/FILE.")]


def with_options(*, omit: Sequence[str] = (), **defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a decorator that turns each parameter annotated with an options model into options, one for each field.

    Args:
        omit: fields that the command does not offer; they keep their defaults.
        defaults: defaults that differ from those of the fields.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        given = signature.parameters.items()
        models = {
            n: p.annotation for n, p in given if inspect.isclass(p.annotation) and issubclass(p.annotation, Options)
        }
        plain = {name: item for name, item in given if name not in models}
        fields = {name: [field for field in model.model_fields if field not in omit] for name, model in models.items()}

        @functools.wraps(function)
        def command(**values: Any) -> None:
            built = {name: model(**{f: values.pop(f) for f in fields[name]}) for name, model in models.items()}
            function(**values, **built)

        made = [
            _parameter(field, model.model_fields[field], defaults)
            for name, model in models.items()
            for field in fields[name]
        ]
        command.__signature__ = signature.replace(parameters=[*plain.values(), *made])  # type: ignore[attr-defined]
        command.__annotations__ = {item.name: item.annotation for item in (*plain.values(), *made)}
        return command

    return decorate


def _parameter(name: str, field: FieldInfo, defaults: dict[str, Any]) -> inspect.Parameter:
    """Make the command-line option of a field, with the field's type, description, range and default."""
    limits = {"min": "ge", "max": "le"}
    found = {
        key: getattr(item, limit) for item in field.metadata for key, limit in limits.items() if hasattr(item, limit)
    }
    option = typer.Option(help=field.description, **found)
    default = defaults.get(name, field.default)
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[field.annotation, option])
