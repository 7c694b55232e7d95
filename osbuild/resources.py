"""Where kernel-configs/, patches/, templates/ and agent/ are, in a checkout and in a wheel; templates filled in."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Final

from osbuild.errors import BuildError

if TYPE_CHECKING:
    import jinja2

_PACKAGE: Final = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a file or directory that travels with the program, e.g. `kernel-configs/common`."""
    for root in (_PACKAGE / "data", _PACKAGE.parent):
        path = root / name
        if path.exists():
            return path
    raise BuildError(f"this installation has no {name}", hint="install osbuilder again")


def render(name: str, **values: object) -> str:
    """A template of templates/ filled in; a value that the template names and nobody gave is an error of ours."""
    return _template(name).render(values)


@functools.cache
def _template(name: str) -> jinja2.Template:
    import jinja2  # slow to import, and few commands need it

    text = resource(f"templates/{name}").read_text(encoding="utf-8")
    # What comes from an image is a value, never a template.
    environment = jinja2.Environment(
        autoescape=name.endswith(".html.j2"),
        loader=jinja2.FileSystemLoader(resource("templates")),  # for what one template includes of another
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.from_string(text)
