# SPDX-License-Identifier: Apache-2.0
"""Another model while the node runs: the old one answers until the new one is warm."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import math
import threading
from typing import Any

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import ModelCard, ModelFile
from anomaly_seg_ros.ros.loading import open_model
from anomaly_seg_ros.ros.parameters import NodeParameters
from anomaly_seg_ros.ros.worker import Worker


class ModelSwap:
    """
    One change of the model at a time, on a thread that loads and warms up.

    Attributes
    ----------
    report
        What became of the last change; empty when there was none.
    failed
        Whether the last change was given up.
    given_up
        The ``model`` parameter of the change that was given up, and the one to go back to.
    restoring
        Whether the parameter is being set back right now.

    """

    def __init__(self) -> None:
        """Begin with no change under way."""
        self.report = ''
        self.failed = False
        self.given_up: tuple[str, str] | None = None
        self.restoring = False
        self._checked: ModelFile | None = None
        self._loading: ModelCard | None = None
        self._thread: threading.Thread | None = None
        self._cancelled = False

    def check(self, model: ModelFile, worker: Worker, parameters: NodeParameters) -> None:
        """
        Refuse a change that would be wrong, before the parameter is set.

        The file that runs already is no change; it clears what became of the last one.

        Raises
        ------
        UserError
            If another change is under way, the settings do not fit the new model, or it was made
            for frames of another size; if other parameters change with it.

        """
        self._checked = None
        if self._thread is not None and self._thread.is_alive():
            raise UserError('another model is being loaded; wait until it has taken over')
        newest = worker.models[-1]
        if parameters.model == newest.requested and model.sha256 == newest.about['sha256']:
            self.report, self.failed = '', False
            return
        if others := parameters.differing(worker.parameters) - {'model'}:
            raise UserError(f'set model by itself: {", ".join(sorted(others))} would hold for the '
                            'model that answers now, too. Set what else is to change when the new '
                            'one has taken over.')
        current = worker.model.card
        if _units(current) != _units(model.card) and not math.isnan(parameters.threshold):
            raise UserError(
                f'parameter threshold {parameters.threshold:g} is in units of the score '
                f'{current.score!r}; model {model.path} has {model.card.score!r} '
                f'(temperature {model.card.temperature:g}). Set threshold to .nan first to take '
                'the threshold on its card.')
        wanted_hw, frame_hw = model.card.frame_size_hw, worker.answered_size_hw
        if wanted_hw is not None and frame_hw is not None and wanted_hw != frame_hw:
            raise UserError(
                f'{model.path} was exported for camera frames of {wanted_hw[0]}x{wanted_hw[1]}, '
                f'this camera sends {frame_hw[0]}x{frame_hw[1]}. Export it with that '
                '--frame-size, or as a host model, which takes any size.')
        parameters.obstacle_settings(model.card)
        self._checked = model

    def check_settings(self, worker: Worker, parameters: NodeParameters) -> None:
        """
        Refuse settings that do not fit every model that may answer the next frame.

        Raises
        ------
        UserError
            If one cannot be used with them, or they have different scores and a threshold is set.

        """
        loading = self._loading  # read first: it becomes one of the worker's, never the reverse
        cards = [model.card for model in worker.models] + [card for card in (loading,) if card]
        for card in cards:
            parameters.obstacle_settings(card)
        if not math.isnan(parameters.threshold) \
                and any(_units(card) != _units(cards[0]) for card in cards):
            raise UserError(
                f'model {cards[-1].name!r} with the score {cards[-1].score!r} is about to take '
                f'over from {cards[0].score!r}: set the threshold when it has.')

    def begin(self, parameters: NodeParameters, worker: Worker,
              failed: Callable[[], None]) -> None:
        """
        Load the model that was checked, if any, and hand it to ``worker``; returns at once.

        ``failed`` is called on the loading thread if the change is given up.
        """
        model, self._checked = self._checked, None
        if model is None:
            return
        self.failed, self.given_up = False, None
        self.report = f'{model.path} is being loaded'
        self._loading = model.card
        self._thread = threading.Thread(
            target=self._load,
            args=(model, worker.models[-1].requested, parameters, worker, failed),
            name='anomaly_seg model loader', daemon=True)
        self._thread.start()

    def cancel(self) -> None:
        """Throw away the model that is being loaded, if any."""
        self._cancelled = True

    def join(self, timeout_s: float) -> bool:
        """Wait until nothing is being loaded; False if it takes longer."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self._thread is None or not self._thread.is_alive()

    @contextmanager
    def restore(self) -> Iterator[None]:
        """Mark the time in which the parameter is set back."""
        self.restoring = True
        try:
            yield
        finally:
            self.restoring = False
            self.given_up = None

    def _load(self, model: ModelFile, before: str, parameters: NodeParameters, worker: Worker,
              failed: Callable[[], None]) -> None:
        try:
            loaded = open_model(model, parameters, worker.size_hw)
        except Exception as error:  # whatever it is, the old model goes on
            text = str(error) if isinstance(error, UserError) \
                else f'{model.path}: {type(error).__name__}: {error}'
            self._loading = None
            self.report, self.failed = text, True
            self.given_up = (parameters.model, before)
            failed()
            return
        taken = not self._cancelled and worker.swap(loaded)
        self._loading = None
        if not taken:
            loaded.close()
            return
        self.report = f'{model.path} is warm and takes over with the next frame'


def _units(card: ModelCard) -> tuple[Any, ...]:
    """Return what a threshold depends on."""
    return card.score, card.score_parameters, card.temperature
