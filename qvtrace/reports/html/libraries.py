"""The JavaScript and the style sheets of the libraries that draw the page, as their packages have
them. None of these packages is imported."""

import re
from importlib.util import find_spec
from pathlib import Path

from qvtrace.errors import UsageError
from qvtrace.extras import install

_PACKAGES = ("jinja2", "bokeh", "itables")
_EXPORT = re.compile(r"export ?\{([^{}]*)\}")
_JQUERY = re.compile(r"([\w$]+) as jQuery\b")


def require_libraries() -> None:
    """Raise `UsageError` where one of them is not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"--format html: needs {' and '.join(missing)}, not installed here; {install('html')}"
        )


def plot_scripts() -> list[str]:
    """Bokeh, which stands in `window.Bokeh`."""
    folder = _folder("bokeh") / "server" / "static" / "js"
    return [_text(folder / name) for name in ("bokeh.min.js", "bokeh-api.min.js")]


def table_module() -> str:
    """DataTables as a module that puts jQuery, which has it, into `window`."""
    bundle = _text(_folder("itables") / "html" / "dt_bundle.js")
    exported = _EXPORT.match(bundle, max(bundle.rfind("export{"), bundle.rfind("export {")))
    jquery = _JQUERY.search(exported[1]) if exported else None
    if exported is None or jquery is None:
        raise UsageError(f"--format html: this version of itables is not known; {install('html')}")
    start, end = exported.span()
    return f"{bundle[:start]}window.jQuery={jquery[1]};{bundle[end:]}"


def table_styles() -> str:
    """The style sheet of DataTables."""
    return _text(_folder("itables") / "html" / "dt_bundle.css")


def _folder(package: str) -> Path:
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        require_libraries()
        raise UsageError(f"--format html: {package} is not as it should be; {install('html')}")
    return Path(spec.submodule_search_locations[0])


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"--format html: {file} cannot be read ({error.strerror}); {install('html')}"
        ) from error
