"""How the surrogate's slope is chosen: the scalar ``g_i`` that stands for the network's Jacobian at node i."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from parasolver_core.samplers.recurrence import Recurrence

Float64 = NDArray[np.float64]


class Linearization(ABC):
    """Chooses slopes from what two successive evaluations of a node told; it sees inner products only."""

    @abstractmethod
    def initial(self, recurrence: Recurrence) -> Float64:
        """Slopes (N,) before there is history."""

    @abstractmethod
    def update(self, slope: Float64, moved: Float64, cross: Float64) -> Float64:
        """New slopes of the nodes evaluated in a round.

        Args:
            slope: (n,), the slopes that predicted the network's output.
            moved: (n,), ``<dX, dX>``, how far each node's input moved since its last evaluation; 0 if unknown.
            cross: (n,), ``<dX, r>``, with the defect ``r``: the output minus its prediction.
        """


@dataclass(frozen=True)
class Identity(Linearization):
    """Each step's Jacobian is taken to be the identity: Picard iteration (ParaDiGMS, ParaSolver)."""

    def initial(self, recurrence: Recurrence) -> Float64:
        return recurrence.identity_slope.copy()

    def update(self, slope: Float64, moved: Float64, cross: Float64) -> Float64:
        return slope


@dataclass(frozen=True)
class Secant(Linearization):
    """The scalar that best explains how each node's output last changed with its input.

    ``g = <dX, dM> / <dX, dX>`` (the scalar quasi-Newton step of Barzilai and Borwein, 1988, at every node by itself).
    As the predicted output already held ``g_old dX``, this is ``g_old + <dX, r> / <dX, dX>``: no extra memory.
    """

    def initial(self, recurrence: Recurrence) -> Float64:
        return recurrence.slope.copy()

    def update(self, slope: Float64, moved: Float64, cross: Float64) -> Float64:
        known = moved > 0
        return slope + np.where(known, cross / np.where(known, moved, 1.0), 0.0)
