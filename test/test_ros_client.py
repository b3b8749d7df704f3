# SPDX-License-Identifier: Apache-2.0
"""Frames through the live node: all of them, in order, or counted by cause."""

from collections.abc import Iterator
from dataclasses import dataclass
import os
from pathlib import Path
import signal
import subprocess
import sys
import time

import _needs_ros  # noqa: F401
from anomaly_seg_ros.backends import open_backend
from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_file import load_model_file
from anomaly_seg_ros.pipeline import Pipeline
from anomaly_seg_ros.ros.client import (
    reserved_domain_id, run_frames_through_node, transport_environment)
import numpy as np
import pytest
from ros_helpers import make_frame, NAN, STALL, write_tiny_model


@dataclass(frozen=True)
class Sent:
    """A frame as the client takes it."""

    image_rgb: np.ndarray
    stamp_ns: int | None


def frames(count: int, period_ns: int = 50_000_000) -> list[Sent]:
    """Return frames with stamps."""
    return [Sent(make_frame(k), 10**18 + k * period_ns) for k in range(count)]


@pytest.fixture(scope='module')
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny model that stalls for some tenths of a second on demand."""
    return write_tiny_model(tmp_path_factory.mktemp('model') / 'tiny.onnx',
                            stall_iterations=200_000)


def test_every_frame_is_answered_in_order_and_to_the_last_bit(model: Path) -> None:
    pipeline = Pipeline(open_backend(load_model_file(model), 'cpu'))
    sent = frames(40)
    replay = run_frames_through_node(
        sent, model=model, outputs=('labels', 'anomaly', 'obstacle_mask', 'anomaly_u8'))
    answers = list(replay)
    assert [answer.stamp_ns for answer in answers] == [frame.stamp_ns for frame in sent]
    for frame, answer in zip(sent, answers, strict=True):
        expected = pipeline(frame.image_rgb)
        np.testing.assert_array_equal(answer.labels, expected.labels)
        np.testing.assert_array_equal(answer.anomaly, expected.anomaly)
        np.testing.assert_array_equal(answer.mask, expected.mask)
        assert answer.anomaly_u8 is not None and answer.overlay is None
        assert answer.obstacles == len(expected.obstacles)
        latency = answer.latency_ms
        assert 0 < latency['network'] < latency['end_to_end'] < 60_000
        assert answer.backend['backend'] == 'onnxruntime cpu'
    assert replay.sent == 40
    assert set(replay.drops.values()) == {0}


def test_a_frame_is_sent_when_the_one_before_it_is_answered(model: Path) -> None:
    """Else its end-to-end latency would count the time it waited for the other frame."""
    events = []

    def sent() -> Iterator[Sent]:
        for frame in frames(6):
            events.append(('sent', frame.stamp_ns))
            yield frame

    for answer in run_frames_through_node(sent(), model=model):
        events += [('answered', answer.stamp_ns)]
    assert events == [(what, frame.stamp_ns) for frame in frames(6)
                      for what in ('sent', 'answered')]


def test_realtime_drops_are_counted_by_cause_and_add_up(model: Path) -> None:
    sent = frames(60, 20_000_000)
    sent[10] = Sent(make_frame(10, corner=STALL), sent[10].stamp_ns)
    bad = range(40, 50)
    for k in bad:
        sent[k] = Sent(make_frame(k, corner=NAN), sent[k].stamp_ns)
    replay = run_frames_through_node(sent, model=model, realtime=True)
    stamps = [answer.stamp_ns for answer in replay]
    assert len(set(stamps)) == len(stamps) and set(stamps) <= {f.stamp_ns for f in sent}
    assert not {sent[k].stamp_ns for k in bad} & set(stamps)
    assert replay.drops['bad_output'] >= 1
    assert replay.drops['superseded'] >= 1
    assert len(stamps) + sum(replay.drops.values()) == replay.sent == 60
    assert min(replay.drops.values()) >= 0


def test_a_frame_without_an_answer_is_an_error_that_names_it(model: Path) -> None:
    sent = frames(6)
    sent[3] = Sent(make_frame(3, corner=NAN), sent[3].stamp_ns)
    answered = []
    with pytest.raises(UserError, match=f'stamp {sent[3].stamp_ns} ns: bad_output: score'):
        answered.extend(run_frames_through_node(sent, model=model))
    with pytest.raises(UserError, match='no answer to the frame with stamp'):
        list(run_frames_through_node([Sent(make_frame(0, corner=STALL), 5)], model=model,
                                     timeout_s=0.05))


def test_frames_that_cannot_be_matched_are_refused(model: Path) -> None:
    with pytest.raises(UserError, match='two frames have the stamp 7 ns'):
        list(run_frames_through_node([Sent(make_frame(0), 7), Sent(make_frame(1), 7)],
                                     model=model))
    with pytest.raises(UserError, match='a frame has no stamp'):
        list(run_frames_through_node([Sent(make_frame(0), None)], model=model))
    with pytest.raises(ValueError, match='rate must be positive'):
        run_frames_through_node([], model=model, rate=0)


def test_reserved_domains_differ_between_holders() -> None:
    with reserved_domain_id() as first, reserved_domain_id() as second:
        assert first != second
        assert {first, second} <= set(range(1, 102))


def test_the_profile_is_not_imposed_on_who_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ('FASTDDS_DEFAULT_PROFILES_FILE', 'FASTRTPS_DEFAULT_PROFILES_FILE')
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert set(transport_environment()) == set(names)
    assert all(Path(path).is_file() for path in transport_environment().values())
    monkeypatch.setenv(names[0], '/mine.xml')  # which Fast DDS 2 does not read
    assert transport_environment() == {names[1]: '/mine.xml'}
    monkeypatch.setenv(names[1], '/other.xml')
    assert transport_environment() == {}


def test_the_node_ends_with_its_killed_parent(model: Path) -> None:
    code = ('import sys, time; from anomaly_seg_ros.ros.client import NodeRun\n'
            f'with NodeRun({{"model": {str(model)!r}}}) as run:\n'
            '    print(run.pid, flush=True); time.sleep(60)')
    parent = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 15
    while Path(f'/proc/{pid}').exists() and time.monotonic() < deadline:
        if Path(f'/proc/{pid}/stat').read_text().split()[2] == 'Z':
            break
        time.sleep(0.05)
    else:
        assert not Path(f'/proc/{pid}').exists()
