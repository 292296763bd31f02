"""The page of one run: curves, final figures, configuration and environment in one HTML file.

It needs no network: diagrams are inline SVG, there are no scripts, and it is light or dark as its reader is.
It reads only the small files of a workdir, no checkpoint and no data, so it also works while a run goes on.
"""

import dataclasses
import datetime
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adderflax.analysis.run_curves import draw_panel, legend, panels_for
from adderflax.training import workdir as workdir_lib
from adderflax.training.config import RunConfig, default_config
from adderflax.training.environment import read_starts
from adderflax.training.metrics import read_metrics
from adderflax.training.workdir import WorkdirError, flatten

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1b1e24; --muted: #5c6370; --line: #d9dce1;
  --card: #f1f2f4; --train: #0068b5; --held: #c2410c; --third: #047857; }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --ink: #e8eaed; --muted: #9aa3af;
  --line: #333943; --card: #1d2127; --train: #5aa9e6; --held: #f59e5b; --third: #4cc38a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; line-height: 1.2; }
h2 { margin: 2.2rem 0 .7rem; font-size: 1.1rem; }
p { margin: .3rem 0; color: var(--muted); }
dl.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); gap: .7rem;
  margin: 1.3rem 0 0; }
dl.tiles div { padding: .7rem .9rem; border-radius: .5rem; background: var(--card); }
dl.tiles dt { color: var(--muted); font-size: .85rem; }
dl.tiles dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr));
  gap: 1.2rem 1.6rem; margin-top: .9rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 0 2rem; }
figure, section { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .9rem; }
figcaption span { color: var(--muted); }
figcaption i { display: inline-block; width: .9rem; height: .2rem; margin: 0 .35rem .2rem 0;
  background: var(--color); }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
th { color: var(--muted); font-weight: 500; }
td { overflow-wrap: anywhere; }
td:first-child { white-space: nowrap; }
details { margin-top: .8rem; }
summary { cursor: pointer; color: var(--muted); }
"""


@dataclasses.dataclass(frozen=True)
class Run:
    """What a workdir says about its run.

    Attributes:
      path: the workdir.
      config: ``config.json``.
      info: ``dataset.json``, or None before the data was opened.
      log: ``metrics.jsonl``.
      summary: ``summary.json``, or None while the run is not finished.
      starts: ``environment.json``.
      written: the date of the log's file, or None.
    """

    path: Path
    config: dict[str, Any]
    info: Any
    log: list[dict[str, float]]
    summary: dict[str, Any] | None
    starts: list[dict[str, Any]]
    written: datetime.datetime | None

    @classmethod
    def read(cls, workdir: str | Path) -> "Run":
        """Reads a workdir.

        Raises:
          WorkdirError: it holds no run, or a file of it cannot be read.
        """
        path = Path(workdir).absolute()
        config = workdir_lib.read_config(path)
        info = workdir_lib.read_info(path) if (path / "dataset.json").exists() else None
        steps = RunConfig.parse(config).num_steps(info) if info else None
        summary = workdir_lib.read_summary(path, steps=steps) if steps else None
        file = path / "metrics.jsonl"
        written = (
            datetime.datetime.fromtimestamp(file.stat().st_mtime, datetime.UTC) if file.exists() else None
        )
        return cls(path, config, info, read_metrics(path), summary, read_starts(path), written)

    @property
    def state(self) -> str:
        """How far the run is, in one sentence."""
        if self.summary:
            return f"Finished at step {self.summary['steps']:,}."
        if not self.log:
            return "Not a single figure is logged yet."
        total = f" of {RunConfig.parse(self.config).num_steps(self.info):,}" if self.info else ""
        written = self.written.strftime("%Y-%m-%d %H:%M UTC")
        return f"At step {self.log[-1]['step']:,}{total}; its log is a file of {written}."


def write_run_page(workdir: str | Path, output: str | Path | None = None) -> Path:
    """Writes the page of a run.

    Args:
      workdir: the run's directory; the run may be finished, stopped or going on.
      output: the HTML file; default ``report.html`` in the workdir.

    Returns:
      The file's path.

    Raises:
      WorkdirError: the directory holds no run, or a file of it cannot be read.
      adderflax.training.config.ConfigError: its configuration is not one of this version.
      ImportError: matplotlib is not installed.
      OSError: the page cannot be written.
    """
    run = Run.read(workdir)
    target = Path(output) if output else run.path / "report.html"
    if target.is_dir():
        raise WorkdirError(f"--output {target} is a directory; give the name of an HTML file to write.")
    target.write_text(render(run), encoding="utf-8")
    return target


def render(run: Run) -> str:
    """The page as HTML."""
    model = run.config["model"]
    title = f"{run.config['data']['name']}: variant {model['variant']}, {model['arithmetic']} arithmetic"
    body = [
        f"<h1>{_text(title)}</h1>",
        f"<p>{_text(run.state)} Workdir <code>{_text(run.path)}</code></p>",
        _tiles(_final_figures(run)),
        *_curves(run),
        '<div class="columns">',
        _section("Configuration", *_configuration(run)),
        _section("Environment", *_environment(run)),
        "</div>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def _final_figures(run: Run) -> dict[str, str]:
    figures = {}
    for line in run.log:
        figures |= line
    if run.summary:
        figures |= run.summary
    shown = {}
    for part in ("test", "validation"):
        for name, label in (("accuracy", "accuracy"), ("accuracy_top5", "top-5 accuracy")):
            if f"{part}_{name}" in figures:
                shown[f"{part} {label}"] = f"{100 * figures[f'{part}_{name}']:.2f} %"
        if f"{part}_loss" in figures:
            shown[f"{part} loss"] = f"{figures[f'{part}_loss']:.4f}"
    if "train_loss" in figures:
        shown["last training loss"] = f"{figures['train_loss']:.4f}"
    for name, label, form in (
        ("best_step", "best step", "{:,}"),
        ("parameters", "parameters", "{:,}"),
        ("images_per_second", "training, images/s", "{:,.0f}"),
        ("seconds", "seconds, last process", "{:,.0f}"),
    ):
        if figures.get(name) is not None:
            shown[label] = form.format(figures[name])
    return shown


def _curves(run: Run) -> list[str]:
    names = dict.fromkeys(name for line in run.log for name in line)
    if not names:
        return []
    restarts = [start["step"] for start in run.starts if start["step"]]
    figures = []
    for panel in panels_for(names):
        keys = "".join(
            f'<span><i style="--color:{color}"></i>{_text(label)}</span>'
            for color, label in legend(panel, names)
        )
        caption = f"<figcaption><b>{_text(panel.title)}</b>{keys}</figcaption>"
        figures.append(f"<figure>{caption}{draw_panel(panel, run.log, restarts)}</figure>")
    note = (
        "Over the steps. Training figures are those of single batches, after augmentation; validation figures"
        " are those of the evaluated parameters on whole images."
    )
    if restarts:
        note += f" Dotted: a process went on from there ({', '.join(f'{step:,}' for step in restarts)})."
    evaluated = [line for line in run.log if any(name.startswith("validation") for name in line)]
    columns = list(dict.fromkeys(name for line in evaluated for name in line))
    table = _table(
        [name.replace("_", " ") for name in columns],
        ([_number(line.get(name)) for name in columns] for line in evaluated),
    )
    details = _details(f"Evaluations as a table ({len(evaluated)})", table) if evaluated else ""
    panels = f'<div class="panels">{"".join(figures)}</div>'
    return [_section("Curves", f"<p>{note}</p>", panels, details)]


def _configuration(run: Run) -> list[str]:
    defaults = flatten(default_config(run.config["model"]["arithmetic"]).to_dict())
    values = flatten(run.config)
    changed = [name for name in values if values[name] != defaults.get(name)]
    rows = ([name, _value(values[name]), _value(defaults.get(name))] for name in changed)
    rest = ([name, _value(values[name])] for name in values if name not in changed)
    parts = [
        _table(["field", "value", "default"], rows) if changed else "<p>Every field is at its default.</p>",
        _details(
            f"Fields at their defaults ({len(values) - len(changed)})", _table(["field", "value"], rest)
        ),
    ]
    if run.info:
        model = dataclasses.asdict(RunConfig.parse(run.config).model_config(run.info))
        built = ([name, _value(value)] for name, value in flatten(model).items())
        parts.append(_details("The model as built", _table(["field", "value"], built)))
        info = {name: value for name, value in dataclasses.asdict(run.info).items() if name != "class_names"}
        parts.append(
            _details("The data set", _table(["field", "value"], ([n, _value(v)] for n, v in info.items())))
        )
    return parts


def _environment(run: Run) -> list[str]:
    if not run.starts:
        return ["<p>This workdir has no environment.json: its run began before there was one.</p>"]
    latest = run.starts[-1]
    rows = []
    for name, value in latest.items():
        if name == "packages":
            rows += [[package, _value(version)] for package, version in value.items()]
        elif name == "devices":
            rows.append([name, ", ".join(f"{number} x {kind}" for kind, number in value.items())])
        elif name not in ("step", "started"):
            rows.append([name, _value(value)])
    columns = ("started", "step", "host", "commit")
    starts = _table(columns, ([_value(start.get(name)) for name in columns] for start in run.starts))
    return [_table(["", "the newest process"], rows), _details(f"Starts ({len(run.starts)})", starts)]


def _section(title: str, *parts: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{''.join(parts)}</section>"


def _tiles(figures: dict[str, str]) -> str:
    tiles = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in figures.items())
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>'


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{_text(summary)}</summary>{content}</details>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "unset" if value is None else str(value)


def _text(value: Any) -> str:
    return html.escape(str(value))
