"""Where kernel-configs/, patches/, templates/ and agent/ are: beside the package, or inside it in a wheel."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from osbuild.errors import BuildError

_PACKAGE: Final = Path(__file__).resolve().parent


def resource(name: str) -> Path:
    """The path of a file or directory that travels with the program, e.g. `kernel-configs/common`."""
    for root in (_PACKAGE / "data", _PACKAGE.parent):
        path = root / name
        if path.exists():
            return path
    raise BuildError(f"this installation has no {name}", hint="install osbuilder again")


def render(template: str, **values: Any) -> str:  # Any: whatever the template needs
    """A file of templates/ filled in; a name the template uses and the caller forgot is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(resource("templates"))
    # The output is systemd units, TOML and the like; XML and HTML are escaped by their suffix.
    environment = jinja2.Environment(
        loader=loader,
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.j2", "xml.j2")),
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(**values)
