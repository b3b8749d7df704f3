# SPDX-License-Identifier: Apache-2.0
"""The thread that turns frames into answers."""

from collections.abc import Callable
from dataclasses import dataclass, replace
import threading
import time
import traceback
from typing import Any

from anomaly_seg_ros.heap import give_back_freed_memory
from anomaly_seg_ros.images import BadImage, decode_message, MAX_PIXELS, message_size_hw
from anomaly_seg_ros.memory import Memory
from anomaly_seg_ros.pipeline import BadOutput, Detection
from anomaly_seg_ros.quality import QualityChecker
from anomaly_seg_ros.ros.conversions import described_size_hw
from anomaly_seg_ros.ros.diagnostics import Monitor
from anomaly_seg_ros.ros.inbox import Mailbox
from anomaly_seg_ros.ros.loading import LoadedModel
from anomaly_seg_ros.ros.outputs import Outputs
from anomaly_seg_ros.ros.parameters import NodeParameters
import numpy as np


@dataclass(frozen=True)
class Arrival:
    """
    A frame that has come in.

    Attributes
    ----------
    message
        The Image or CompressedImage.
    stamp_ns
        Its stamp.
    arrived_s
        ``time.perf_counter()`` when its callback began.
    activation
        Number of the activation in which it came; its answer belongs to no other.

    """

    message: Any
    stamp_ns: int
    arrived_s: float
    activation: int


class Worker:
    """
    One thread that works on one frame at a time, from decoding to publishing.

    The network takes nearly all the time and runs outside Python's lock, so that callbacks go on
    meanwhile. Decoding or publishing on further threads would not lower the latency of a frame:
    its stages follow from one another, and the cores belong to the network.

    The node replaces ``parameters`` whole; each frame uses one set from beginning to end.
    """

    def __init__(self, model: LoadedModel, mailbox: 'Mailbox[Arrival]', outputs: Outputs,
                 monitor: Monitor, parameters: NodeParameters, now_ns: Callable[[], int],
                 log_error: Callable[[str], None],
                 on_swapped: Callable[[LoadedModel], None]) -> None:
        """
        Start the thread, idle.

        Parameters
        ----------
        model
            A warm model; closed by ``stop``.
        mailbox, outputs, monitor
            Where frames come from, where answers go, and who counts.
        parameters:
            The first set.
        now_ns
            The node's clock.
        log_error
            Called with the text of an error.
        on_swapped
            Called on this thread after another model has taken over.

        """
        self.parameters = parameters
        self._model = model
        self._next_model: LoadedModel | None = None
        self._mailbox = mailbox
        self._outputs = outputs
        self._monitor = monitor
        self._now_ns = now_ns
        self._log_error = log_error
        self._on_swapped = on_swapped
        self._quality = QualityChecker()
        self._frame_buffer = Memory(np.uint8)
        self._activation = 0
        self._active = False
        self._stopped = False
        self._size_hw: tuple[int, int] | None = None
        self._answered_size_hw: tuple[int, int] | None = None
        self._swap_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name='anomaly_seg worker', daemon=True)
        self._thread.start()

    @property
    def activation(self) -> int:
        """Number of the present activation."""
        return self._activation

    @property
    def model(self) -> LoadedModel:
        """The model that answers now."""
        return self._model

    @property
    def models(self) -> tuple[LoadedModel, ...]:
        """The model that answers now and, if there is one, that which takes over next."""
        with self._swap_lock:
            return tuple(x for x in (self._model, self._next_model) if x is not None)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Size of the last frame; before the first, what is known of the camera or the model."""
        if self._size_hw is not None:
            return self._size_hw
        info = self._outputs.camera_info
        if info is not None:
            height, width = described_size_hw(info)
            if 0 < height * width <= MAX_PIXELS:
                return height, width
        card, (height, width) = self._model.card, self.parameters.warm_up_size_hw
        return card.frame_size_hw or ((height, width) if height else card.input_size_hw)

    @property
    def answered_size_hw(self) -> tuple[int, int] | None:
        """Size of the last answer; None before the first."""
        return self._answered_size_hw

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def activate(self) -> None:
        """Answer the frames that come from now on."""
        self._quality = QualityChecker()
        with self._outputs.lock:
            self._activation += 1
            self._active = True

    def deactivate(self) -> None:
        """Publish nothing any more; what is being published now is finished first."""
        with self._outputs.lock:
            self._active = False
        if waiting := self._mailbox.clear():
            self._monitor.dropped('deactivated', count=waiting)

    def swap(self, model: LoadedModel) -> bool:
        """
        Let ``model``, which must be warm, take over with the next frame.

        Returns False, and does not take it, if the worker has been stopped meanwhile.
        """
        with self._swap_lock:
            if self._stopped:
                return False
            replaced, self._next_model = self._next_model, model
        if replaced is not None:
            replaced.close()
        return True

    def stop(self, timeout_s: float) -> bool:
        """End the thread and close the model; False if it did not end in time."""
        self._mailbox.close()
        with self._swap_lock:
            self._stopped = True
            if self._next_model is not None:
                self._next_model.close()
                self._next_model = None
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            return False
        self._model.close()
        give_back_freed_memory()
        return True

    def publish_fallback(self, header: Any, size_hw: tuple[int, int] | None = None) -> None:
        """Publish an all-obstacle mask, of this size or the worker's, if the node is active."""
        with self._outputs.lock:
            if self._active:
                self._outputs.publish_fallback(header, size_hw or self.size_hw)
                self._monitor.event('fallback_masks')

    def _run(self) -> None:
        while (arrival := self._mailbox.get()) is not None:
            self._monitor.begun()
            try:
                self._take_over()
                self._handle(arrival)
            except Exception as error:  # one frame's error must not end the node
                self._drop(arrival, 'failed', f'{type(error).__name__}: {error}')
                self._log_error(traceback.format_exc())
            finally:
                self._monitor.idle()
            del arrival  # its memory is free again before the next frame wants as much

    def _take_over(self) -> None:
        with self._swap_lock:
            model, self._next_model = self._next_model, None
            if model is None:
                return
            old, self._model = self._model, model
        old.close()
        del old
        give_back_freed_memory()
        self._on_swapped(model)

    def _handle(self, arrival: Arrival) -> None:
        parameters = self.parameters
        wanted = self._outputs.subscribed()
        if not wanted and parameters.pause_without_subscribers:
            self._monitor.dropped('paused')
            return
        age_ms = (self._now_ns() - arrival.stamp_ns) / 1e6
        if parameters.max_frame_age_ms and age_ms > parameters.max_frame_age_ms:
            self._drop(arrival, 'too_old', f'{age_ms:.0f} ms old')
            return
        try:
            self._answer(arrival, parameters, wanted)
        except BadImage as error:
            self._drop(arrival, 'bad_image', str(error))
        except BadOutput as error:
            self._drop(arrival, 'bad_output', str(error))

    def _answer(self, arrival: Arrival, parameters: NodeParameters,
                wanted: tuple[str, ...]) -> None:
        header = arrival.message.header
        pipeline = self._model.pipeline
        clock = [time.perf_counter()]
        image = decode_message(arrival.message,
                               pipeline.card.reduced_hw if parameters.reduced_decode else None,
                               self._frame_buffer)
        clock.append(time.perf_counter())
        flags = self._quality(image.array) if parameters.quality_checks else ()
        clock.append(time.perf_counter())

        pipeline.settings = parameters.obstacle_settings(pipeline.card)
        self._size_hw = size_hw = image.full_size_hw
        detection = pipeline(image.array, image.channel_order,
                             self._outputs.maps(size_hw, wanted), size_hw)
        distrusted = parameters.fallback_mask and not set(flags).isdisjoint(
            parameters.fallback_flags)
        if distrusted:
            detection = _all_obstacle(detection)

        with self._outputs.lock:
            if not self._active or arrival.activation != self._activation:
                self._monitor.dropped('deactivated')
                return
            if distrusted:
                self._outputs.flag_fallback(header)
                self._monitor.event('fallback_masks')
            convert_ms, publish_ms = self._outputs.publish(
                header, image, detection, pipeline.card, parameters.overlay_opacity, wanted)
            self._answered_size_hw = size_hw
            stages_ms = {
                'wait': (clock[0] - arrival.arrived_s) * 1e3,
                'decode': (clock[1] - clock[0]) * 1e3, 'quality': (clock[2] - clock[1]) * 1e3,
                **detection.stages_ms, 'convert': convert_ms, 'publish': publish_ms,
                'total': (time.perf_counter() - arrival.arrived_s) * 1e3}
            # Counted before the last message goes out: who has that, finds the count as well.
            self._monitor.flagged(flags)
            self._monitor.answered(stages_ms, parameters.max_allowed_processing_time_ms)
            if 'frame' in wanted:
                self._outputs.publish_frame_report(header, {
                    **{f'{stage}_ms': f'{time_ms:.3f}' for stage, time_ms in stages_ms.items()},
                    'arrived_monotonic_s': f'{arrival.arrived_s:.6f}',
                    'obstacles': len(detection.obstacles), 'flags': ' '.join(flags),
                    'fallback': str(distrusted).lower()})

    def _drop(self, arrival: Arrival, cause: str, error: str) -> None:
        self._monitor.dropped(cause, error)
        if self.parameters.fallback_mask:
            try:
                self.publish_fallback(arrival.message.header, _size_of(arrival.message))
            except Exception:  # the thread that answers must not end here
                self._log_error(traceback.format_exc())


def _size_of(message: Any) -> tuple[int, int] | None:
    """Return the size of a frame that was not decoded; None where it cannot be told."""
    try:
        return message_size_hw(message)
    except BadImage:
        return None


def _all_obstacle(detection: Detection) -> Detection:
    return replace(detection, mask=np.full_like(detection.mask, 255))
