"""Everything that is drawn from ``results.json``: page, figures, Markdown."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samestep.errors import ConfigError
from samestep.study import markdown
from samestep.study.comparison import compare_arms, summarise
from samestep.study.recommendation import recommend
from samestep.study.results import Results
from samestep.study.statistics import batch_size_advice
from samestep.utils.extras import install_command
from samestep.utils.files import write_atomically

if TYPE_CHECKING:
    from samestep.study.charts import Figure

_TEMPLATE = Path(__file__).with_name("page.html")


def write_report(results: Results, out: Path) -> list[Path]:
    """Draw a study.

    Args:
        results: The results.
        out: Where ``report.html``, ``report.md`` and the PNGs go.

    Returns:
        The files written.

    Raises:
        ConfigError: The packages of ``samestep[report]`` are not installed.
        OSError: A file cannot be written.
    """
    try:
        import vl_convert

        from samestep.study.charts import draw_figures

        figures = draw_figures(results)
        page = render_page(results, figures)
    except ImportError as error:
        raise ConfigError(f"report: {error}: {install_command('report')}") from error
    written = []
    for name, figure in figures.items():
        path = out / f"{name}.png"
        path.write_bytes(vl_convert.vegalite_to_png(_image_spec(figure), scale=1.5))
        written.append(path)
    images = {f"{name}.png": figure.caption for name, figure in figures.items()}
    for path, text in (
        (out / "report.md", markdown.render_markdown(results, images)),
        (out / "report.html", page),
    ):
        write_atomically(path, text)
        written.append(path)
    return written


def render_page(results: Results, figures: Mapping[str, "Figure"]) -> str:
    """A self-contained page; it needs no network.

    Args:
        results: The results.
        figures: What `samestep.study.charts.draw_figures` drew.

    Returns:
        HTML; every text of the user's is escaped.

    Raises:
        ImportError: The packages of ``samestep[report]`` are not installed.
    """
    import vl_convert
    from jinja2 import Environment
    from markupsafe import Markup

    from samestep.study.charts import arm_colours

    chart_specs = {name: _page_spec(figure) for name, figure in figures.items()}
    vega_embed = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        settings=markdown.describe_settings(results),
        machine=markdown.describe_machine(results),
        normalisations=markdown.explain_normalisations(results),
        recommendation=recommend(results),
        summary=summarise(results),
        comparisons=compare_arms(results),
        advice=batch_size_advice(results),
        arm_headers=markdown.ARM_HEADERS,
        arm_tables={group: markdown.arm_table(results, group) for group in results.groups()},
        length_headers=markdown.LENGTH_HEADERS,
        length_table=markdown.length_table(results),
        figures=figures,
        colours=arm_colours(results),
        # "<" would let a name end the script element.
        chart_specs=Markup(json.dumps(chart_specs, separators=(",", ":")).replace("<", "\\u003c")),
        vega_embed=Markup(vega_embed.replace("</script", "<\\/script")),
    )


def _image_spec(figure: "Figure") -> str:
    """The Vega-Lite specification of a figure that stands alone, as JSON."""
    chart = figure.chart.properties(width=560, height=280, title=figure.caption)
    chart = chart.configure(background="#ffffff").configure_axis(titleFontWeight="normal")
    return str(chart.to_json())


def _page_spec(figure: "Figure") -> dict[str, Any]:
    """As wide as the page, which has its own title, legend and colours of text."""
    spec: dict[str, Any] = figure.chart.properties(width="container", height=280).to_dict()
    for layer in spec["layer"]:
        encoding = layer["encoding"]
        if "color" in encoding:
            encoding["color"]["legend"] = None
        if figure.group is not None and "axis" in encoding["y"]:
            encoding["y"]["title"] = None
    return spec
