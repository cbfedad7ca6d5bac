"""Everything that is drawn from ``results.json``: page, figures, Markdown."""

import json
from pathlib import Path
from typing import Any

from samestep.errors import ConfigError
from samestep.study import words
from samestep.study.advice import advise
from samestep.study.charts import Figure, colours, figures
from samestep.study.compare import compare, in_short
from samestep.study.results import Results
from samestep.utils.files import write_atomically

TEMPLATE = Path(__file__).with_name("page.html")


def write_report(results: Results, out: Path) -> list[Path]:
    """Draw a study.

    Args:
        results: The results.
        out: Where ``report.html``, ``report.md`` and the PNGs go.

    Returns:
        The files written.

    Raises:
        ConfigError: The packages of ``samestep[report]`` are not installed.
    """
    try:
        import vl_convert

        drawn = figures(results)
    except ImportError as error:
        raise ConfigError(f"report: {error}: pip install 'samestep[report]'") from error
    written = []
    for name, figure in drawn.items():
        path = out / f"{name}.png"
        path.write_bytes(vl_convert.vegalite_to_png(_still(figure).to_json(), scale=1.5))
        written.append(path)
    pictures = {f"{name}.png": caption(figure) for name, figure in drawn.items()}
    for path, text in (
        (out / "report.md", words.markdown(results, pictures)),
        (out / "report.html", page(results, drawn)),
    ):
        write_atomically(path, text)
        written.append(path)
    return written


def page(results: Results, drawn: dict[str, Figure]) -> str:
    """A self-contained page; it needs no network.

    Args:
        results: The results.
        drawn: What `samestep.study.charts.figures` gave.

    Returns:
        HTML; every text of the user's is escaped.
    """
    import vl_convert
    from jinja2 import Environment
    from markupsafe import Markup

    specs = {name: _live(figure) for name, figure in drawn.items()}
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        words=words,
        comparisons=compare(results),
        in_short=in_short(results),
        advice=advise(results),
        drawn=drawn,
        colours=colours(results),
        # "<" would let a name end the script element.
        specs=Markup(json.dumps(specs, separators=(",", ":")).replace("<", "\\u003c")),
        library=Markup(
            vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace(
                "</script", "<\\/script"
            )
        ),
    )


def caption(figure: Figure) -> str:
    """A figure's title, with its group if it is of one."""
    return f"{figure.title}: {figure.group}" if figure.group else figure.title


def _still(figure: Figure) -> Any:
    chart = figure.chart.properties(width=560, height=280, title=caption(figure))
    return chart.configure(background="#ffffff").configure_axis(titleFontWeight="normal")


def _live(figure: Figure) -> dict[str, Any]:
    """As wide as the page, which has its own title, legend and colours of text."""
    spec: dict[str, Any] = figure.chart.properties(width="container", height=280).to_dict()
    for layer in spec["layer"]:
        encoding = layer["encoding"]
        if "color" in encoding:
            encoding["color"]["legend"] = None
        if figure.group is not None and "axis" in encoding["y"]:
            encoding["y"]["title"] = None
    return spec
