# SPDX-License-Identifier: Apache-2.0
"""What goes into a network and comes out, by the card, and whether a graph has it."""

from collections.abc import Sequence
from dataclasses import dataclass

from anomaly_seg_ros.errors import UserError
from anomaly_seg_ros.model_card import ModelCard, ModelFile
import numpy as np


@dataclass(frozen=True)
class NetworkOutput:
    """
    What the network says about one frame.

    Attributes
    ----------
    labels
        uint8 (h, w), class ids.
    anomaly
        float32 (h, w), higher is more anomalous.

    """

    labels: np.ndarray
    anomaly: np.ndarray


@dataclass(frozen=True)
class Port:
    """One input or output of a graph: name, numpy dtype name and shape."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]

    def empty(self) -> np.ndarray:
        """Return an array of this type and shape; every dimension must be known."""
        if not all(isinstance(n, int) and n >= 0 for n in self.shape):
            raise ValueError(f'{self} has open dimensions')
        return np.empty([int(str(n)) for n in self.shape], self.dtype)

    def __str__(self) -> str:
        """Return for example ``image float32 1x3x512x1024``."""
        return f'{self.name} {self.dtype} {"x".join(map(str, self.shape))}'


def input_port(card: ModelCard) -> Port:
    """Return the input that the card promises."""
    if card.input_variant == 'device':
        return Port('image', 'uint8', (*(card.frame_size_hw or ()), 3))
    return Port('image', 'float32', (1, 3, *card.input_size_hw))


def output_ports(card: ModelCard) -> tuple[Port, Port]:
    """Return the outputs that the card promises: labels and anomaly."""
    shape = (1, *card.output_size_hw)
    return Port('labels', 'uint8', shape), Port('anomaly', 'float32', shape)


def check_ports(model: ModelFile, inputs: Sequence[Port], outputs: Sequence[Port]) -> None:
    """Raise UserError unless the graph's inputs and outputs are those that the card promises."""
    for what, got, expected in (('inputs', inputs, [input_port(model.card)]),
                                ('outputs', outputs, output_ports(model.card))):
        if sorted(map(str, got)) != sorted(map(str, expected)):
            raise UserError(
                f'{model.path}: card and graph disagree: by the card the {what} are '
                f'{", ".join(map(str, expected))}; in the graph {", ".join(map(str, got))}. '
                'Export the model again.')


def check_input(network_input: np.ndarray, expected: Port) -> None:
    """Raise ValueError unless ``network_input`` is what the graph takes."""
    got = Port(expected.name, str(network_input.dtype), network_input.shape)
    if got != expected:
        raise ValueError(f'this model takes {expected}, got {got}')
