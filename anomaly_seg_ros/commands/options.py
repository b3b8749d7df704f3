# SPDX-License-Identifier: Apache-2.0
"""What commands share: types of options, options in common, printing."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
import inspect as signatures
import math
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

# Names of files are printed as they are: without markup [x] and :car: are text.
CONSOLE = Console(stderr=True, markup=False, emoji=False)  # progress and errors
OUT = Console(markup=False, emoji=False)  # results

FILE = click.Path(path_type=Path)
THREADS = click.IntRange(0, 256)  # as the node's
Command = Callable[..., Any]


class SizeType(click.ParamType):
    """An image size such as 512x1024: height x width in pixels."""

    name = 'HxW'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return (height, width)."""
        if isinstance(value, tuple):
            return value
        try:
            height, width = (int(part) for part in str(value).lower().split('x'))
        except ValueError:
            self.fail(f'{value!r} is not a size such as 512x1024 (height x width)', param, ctx)
        if height < 1 or width < 1:
            self.fail(f'{value!r} is not a size: both must be positive', param, ctx)
        return height, width


class ThreeFloats(click.ParamType):
    """Three numbers such as 0.485,0.456,0.406: one a channel."""

    name = 'A,B,C'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a tuple of three floats."""
        if isinstance(value, tuple):
            return value
        try:
            first, second, third = (float(part) for part in str(value).split(','))
        except ValueError:
            first = second = third = math.nan
        if not all(map(math.isfinite, (first, second, third))):
            self.fail(f'{value!r} is not three numbers such as 0.485,0.456,0.406', param, ctx)
        return first, second, third


class FiniteFloat(click.ParamType):
    """A number; not NaN, not infinite."""

    name = 'NUMBER'

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a float."""
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            self.fail(f'{value!r} is not a finite number', param, ctx)
        return number


class FiniteRange(click.FloatRange):
    """A number in a range; not NaN, which passes every comparison, and not infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return a float."""
        return FiniteFloat().convert(super().convert(value, param, ctx), param, ctx)


class OneOf(click.ParamType):
    """A name out of a table that is imported only when one is given."""

    name = 'NAME'

    def __init__(self, what: str, choices: Callable[[], Iterable[str]]) -> None:
        """Call a name ``what`` in errors, and get the names there are from ``choices``."""
        self._what = what
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the name; wrong usage lists the choices."""
        choices = list(self._choices())
        if value not in choices:
            self.fail(f'no {self._what} {value!r}; choose one of {", ".join(choices)}', param, ctx)
        return value


def _datasets() -> Iterable[str]:
    from anomaly_seg_ros.datasets import DATASETS
    return DATASETS


def _networks() -> Iterable[str]:
    from anomaly_seg_ros.networks import NETWORKS
    return (*NETWORKS, 'onnx')


DATASET = OneOf('data set', _datasets)
NETWORK = OneOf('network', _networks)


def obstacle_options(function: Command) -> Command:
    """Add the options that turn scores into obstacles."""
    for option in (
            click.option('--region', type=click.Choice(['everywhere', 'drivable']),
                         default='everywhere', show_default=True,
                         help='Keep obstacles everywhere, or only those that touch the hull of '
                              'the drivable classes of MODEL, which must have some.'),
            click.option('--minimum-area', 'minimum_area_px', type=click.IntRange(1), default=50,
                         show_default=True, metavar='PIXELS',
                         help='Drop components of fewer camera pixels.'),
            click.option('--threshold', type=FiniteFloat(),
                         help='Anomalous when score >= this. Default: that of the card.')):
        function = option(function)
    return function


def backend_options(function: Command) -> Command:
    """Add the options that choose a device."""
    for option in (
            click.option('--threads', type=THREADS, default=0, show_default=True,
                         help='Threads of the network; 0 takes every core allowed.'),
            click.option('--backend', default='cpu', show_default=True,
                         help='cpu, cuda, tensorrt, openvino, ... or auto.')):
        function = option(function)
    return function


def metrics_options(function: Command) -> Command:
    """Add the options that say where the metrics are computed."""
    for option in (
            click.option('--ray', metavar='ADDRESS',
                         help='Compute the metrics on this Ray cluster instead: auto, local, '
                              'ray://HOST:10001. Its machines must see the same folders.'),
            click.option('--workers', type=click.IntRange(1), default=1, show_default=True,
                         help='Processes that compute the metrics.')):
        function = option(function)
    return function


def bundled_model() -> Path:
    """Return the path of the bundled model."""
    from anomaly_seg_ros.resources import resource
    return resource('models/demo.onnx')


def dataset_source(name: str, root: Path, split: str | None, options: tuple[str, ...],
                   keep_going: bool = False) -> Any:
    """Open a data set with the options of the command line; warn where frames are missing."""
    from anomaly_seg_ros.datasets import DATASETS, open_dataset
    given: dict[str, Any] = {}
    for option in options:
        key, equals, value = option.partition('=')
        if not equals:
            raise click.UsageError(f'--option takes KEY=VALUE, got {option!r}')
        given[key] = value
    if split is not None:
        given['split'] = split
    known = signatures.signature(DATASETS[name]).parameters.keys() - {'root', 'keep_going'}
    wrong = sorted(given.keys() - known)
    if wrong:
        raise click.UsageError(f'{name} has no option {", ".join(wrong)}; it has '
                               f'{", ".join(sorted(known))}')
    if keep_going:
        given['keep_going'] = True
    source = open_dataset(name, root, **given)
    if there := source.shortfall():
        CONSOLE.print(f'{root}: only {there} frames of {name}'
                      f'{f" ({source.split})" if source.split else ""} are here; figures of the '
                      'whole set may differ', style='yellow', highlight=False, soft_wrap=True)
    return source


def frame_source(dataset: str | None, root: Path | None, split: str | None,
                 options: tuple[str, ...], images: Path | None, video: Path | None = None) -> Any:
    """Open the one source of frames that the command line gives."""
    from anomaly_seg_ros.datasets.media import ImageFolder, VideoFile
    if dataset is None and (root is not None or split is not None or options):
        raise click.UsageError('--root, --split and --option belong to --dataset')
    if images is not None:
        return ImageFolder(images)
    if video is not None:
        return VideoFile(video)
    if dataset is None or root is None:
        raise click.UsageError('--dataset needs --root')
    return dataset_source(dataset, root, split, options)


def obstacle_settings(model: Path, threshold: float | None, minimum_area_px: int,
                      region: str) -> Any:
    """Return the settings, with the card's threshold where none is given."""
    from anomaly_seg_ros.model_file import load_model_file
    from anomaly_seg_ros.obstacles import ObstacleSettings
    if threshold is None:
        threshold = load_model_file(model).card.threshold
    return ObstacleSettings(threshold, minimum_area_px, region)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Print the headline figures as a table, and before it what was left out."""
    from anomaly_seg_ros.report import summary_table
    problems = metrics['run'].get('problems') or ()
    if problems:
        CONSOLE.print(f'{len(problems)} problems; these frames were left out:', style='yellow')
        for problem in problems:
            CONSOLE.print(f'  {problem}', highlight=False, markup=False, soft_wrap=True)
    table = Table(show_header=False)
    for name, value in summary_table(metrics):
        table.add_row(name, value)
    OUT.print(table)


def print_path(path: Path) -> None:
    """Print where the results are, on one line."""
    OUT.print(f'\n{path}', highlight=False, markup=False, soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """Give a function (what, done, total) that draws one bar for each ``what``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn
    with Progress(TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(),
                  TimeRemainingColumn(), console=CONSOLE) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=total)
            bars.update(tasks[what], completed=done, total=total)

        yield show
